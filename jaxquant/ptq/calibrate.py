"""Encodes parameters whose encoders or rewrites look at their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax import Array

from jaxquant.capture import Statistics, arguments
from jaxquant.capture.batches import Alike
from jaxquant.capture.plan import plan_of
from jaxquant.encoders import rtn
from jaxquant.interpret.calls import Call, is_traced
from jaxquant.interpret.sites import Sites, path_str
from jaxquant.observers import Inputs
from jaxquant.params import Encoded, Plan, check_finite, encode_leaf
from jaxquant.ptq.absorb import Move, folded, moves_of, stuck
from jaxquant.ptq.encode import encode_members, placed
from jaxquant.ptq.gather import BUDGET, expected_stats, fed_by, members_of, misfits, passes
from jaxquant.ptq.run import run_of
from jaxquant.ptq.saved import Folder
from jaxquant.ptq.sequential import Walk, fed_alike, quantize_in_order, walk_of, walked_misfits
from jaxquant.ptq.state import State
from jaxquant.qtensor import PerChannel, is_qtensor
from jaxquant.report import shown


def encoded_by_inputs(state: State) -> tuple[dict[str, Encoded], Any, dict[str, list[str]]]:
    """Encodes all leaves of a recipe in which some rules look at inputs.

    Returns:
      The encoded leaves by path; the params, whose float leaves may have absorbed factors; and
      notes on these float leaves.
    """
    call, sites, batches, stats = state.call, state.sites, state.batches, state.stats
    options, key = state.options, state.options.key
    budget = BUDGET if options.budget is None else options.budget
    assert batches is None or isinstance(batches, Sequence)
    flat = jax.tree.leaves_with_path(state.params, is_leaf=is_qtensor)
    leaves = {path_str(path): leaf for path, leaf in flat}
    plans = {plan.path: plan for plan in state.planned[0]}
    needs = _needs(plans)
    check_finite([(path, leaf) for path, leaf in leaves.items() if plans[path].spec is not None])
    _rehearse(leaves, plans, needs, key)
    _check_static(plans)
    walk = None
    if stats is None and options.sequential:
        walk = walk_of(call, leaves, plans, needs)
    early = {p: o for p, o in needs.items() if walk is None or p not in walk.paths}
    if stats is None:
        _require_fitting(call, walk, leaves, plans, early)
    saved = options.save is not None or options.resume is not None
    if saved and stats is not None:
        raise ValueError("ptq: save and resume are for calibration by batches, not by stats")
    run = run_of(call, leaves, state.recipe, batches, key) if saved else {}
    folder = Folder(
        options.save, options.resume, run | {"sequential": options.sequential} if saved else {}
    )
    encoded = {
        path: _by_itself(path, leaves[path], plan, key)
        for path, plan in plans.items()
        if plan.spec is not None and path not in needs
    }
    moves = _moves(call, sites, plans, early, walk, stats)
    if stats is not None:
        for done in _encoded(list(early), leaves, plans, stats, moves, key):
            encoded |= done
    elif early:
        assert batches is not None
        number = {path: f"beforehand_{n:05d}" for n, path in enumerate(early)}
        # one file per activation, named after the first parameter it feeds
        for path in early:
            loaded = folder.read(number[path]) or {}
            encoded |= {p: placed(one, leaves[p]) for p, one in loaded.items()}
        waiting = {path: o for path, o in early.items() if path not in encoded}
        for paths, seen in passes(
            *(state.fn, state.params, call, plans, batches, waiting),
            budget=budget,
            progress=options.progress,
        ):
            for done in _encoded(paths, leaves, plans, seen, moves, key):
                if options.sequential:
                    done = {path: _beforehand(one, plans[path]) for path, one in done.items()}
                folder.write(number[next(iter(done))], done)
                encoded |= done
    if walk is not None and walk.paths:
        assert batches is not None
        encoded |= quantize_in_order(
            *(walk, leaves, plans, needs, moves, _samples(batches), encoded),
            key=key,
            budget=budget,
            offload=options.offload,
            progress=options.progress,
            folder=folder,
        )
    encoded, changed, notes = folded(encoded, leaves, moves)
    tree = jax.tree.structure(state.params, is_leaf=is_qtensor)
    new_leaves = [changed.get(path, leaf) for path, leaf in leaves.items()]
    return encoded, jax.tree.unflatten(tree, new_leaves), notes


def _moves(
    call: Call,
    sites: Sites,
    plans: Mapping[str, Plan],
    early: Mapping[str, Inputs],
    walk: Walk | None,
    stats: Statistics | None,
) -> dict[str, Move]:
    """Finds where the factors of all parameters with a rewrite can go."""
    wanted = {p for p in plans if plans[p].rewrite is not None}
    if not wanted:
        return {}
    groups = [] if walk is None else fed_alike(walk)
    if early and wanted & set(early):
        known = plan_of(call, early, "ptq").sites if stats is None else stats.sites
        groups += fed_by(known, sites, early)
    return moves_of(call, groups, plans)


def _samples(batches: Sequence[Any]) -> list[list[Any]]:
    """Returns the arrays in each batch.

    Raises:
      ValueError: there are no batches, or one differs from the first.
    """
    if not batches:
        raise ValueError("ptq: no batches; expected at least one")
    alike, samples = Alike(), []
    for index, batch in enumerate(batches):
        args = arguments(batch)
        difference = alike.difference(args)
        if difference is not None:
            raise ValueError(f"ptq: batch {index}: {difference}")
        samples.append([leaf for leaf in jax.tree.leaves(args) if is_traced(leaf)])
    return samples


def _needs(plans: Mapping[str, Plan]) -> dict[str, Inputs]:
    """Returns the observer of each leaf that needs statistics."""
    needs = {}
    for path, plan in plans.items():
        observer = None if plan.spec is None else plan.gathers
        if (plan.encoder is None or plan.encoder.observer is None) and stuck(plan):
            continue  # its rewrite does not apply
        if observer is not None and any(site.primitive != "gather" for site in plan.sites):
            needs[path] = observer
    return needs


def _require_fitting(
    call: Call,
    walk: Walk | None,
    leaves: Mapping[str, Any],
    plans: Mapping[str, Plan],
    early: Mapping[str, Inputs],
) -> None:
    """Raises if statistics would not fit the shape of a leaf, naming all such leaves."""
    reasons = misfits(call, leaves, plans, early)
    if walk is not None:
        reasons |= walked_misfits(walk, leaves)
    if reasons:
        each = "; ".join(f"{shown(path)}: {why}" for path, why in reasons.items())
        raise ValueError(
            f"{each}. Give {'it' if len(reasons) == 1 else 'them'} a rule whose encoder and "
            "rewrite look at no inputs, or skip=True"
        )


def _rehearse(
    leaves: Mapping[str, Any],
    plans: Mapping[str, Plan],
    needs: Mapping[str, Inputs],
    key: Array | None,
) -> None:
    """Runs every encoder on shapes alone, so that it raises before the calibration.

    Raises:
      ValueError: naming the leaf.
    """
    tried = set()
    for path, plan in plans.items():
        encoder, leaf = plan.encoder, leaves[path]
        if plan.spec is None or encoder is None:
            continue
        stats = None
        if encoder.observer is not None:
            if path not in needs:
                continue  # it has no inputs
            stats = expected_stats(plan, leaf.shape)
        where = None if stats is None else (stats.axes, stats.batched)
        kind = (
            leaf.shape,
            leaf.dtype,
            plan.spec,
            plan.storage_last_axes,
            plan.batch_axes,
            encoder,
            where,
        )
        if kind not in tried:
            tried.add(kind)
            abstract = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            encode_leaf(abstract, plan, encoder, key, stats)


def _by_itself(path: str, leaf: Any, plan: Plan, key: Array | None) -> Encoded:
    """Encodes a leaf without input statistics; a table that is only looked up has none."""
    encoder = plan.encoder or rtn()
    if encoder.observer is None:
        encoded = encode_leaf(leaf, plan, encoder, key)
        why = stuck(plan) if plan.rewrite is not None else ""
        return encoded._replace(notes=(*encoded.notes, f"not rewritten: {why}")) if why else encoded
    other = encoder.without_inputs or rtn()
    encoded = encode_leaf(leaf, plan, other, key)
    return encoded._replace(
        notes=(*encoded.notes, f"meets no inputs: {other} in place of {encoder}")
    )


def _encoded(
    paths: Sequence[str],
    leaves: Mapping[str, Any],
    plans: Mapping[str, Plan],
    stats: Statistics,
    moves: Mapping[str, Move],
    key: Array | None,
) -> Iterator[dict[str, Encoded]]:
    """Yields, for each activation, the encoded leaves it feeds, by path."""
    for members, state in members_of(paths, leaves, plans, stats, moves):
        done = encode_members(members, state, key)
        yield {m.plan.path: one for m, one in zip(members, done, strict=True)}


def _beforehand(one: Encoded, plan: Plan) -> Encoded:
    count = sum(site.primitive != "gather" for site in plan.sites)
    sites = "" if count == 1 else f" at {count} sites"
    return one._replace(notes=(*one.notes, f"calibrated on inputs of the float function{sites}"))


def _check_static(plans: Mapping[str, Plan]) -> None:
    """Raises if per-channel scales of an activation would meet factors or moments."""
    for path, plan in plans.items():
        spec = None if plan.rule is None else plan.rule.activations
        per_channel = spec is not None and spec.granularity in (PerChannel(-1), PerChannel((-1,)))
        if plan.gathers is not None and per_channel:
            method = plan.encoder if plan.rewrite is None else plan.rewrite
            raise ValueError(
                f"{shown(path)}: {method} beside activations with a scale for each channel: both "
                "would scale the weight's channels; give activations one scale"
            )
