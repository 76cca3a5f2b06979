"""Parameters whose encoders or rewrites look at what they are contracted with."""

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
    """Encodes all leaves of a recipe some of whose rules look at inputs.

    Returns:
      By path, what became of every leaf that a rule quantizes; the params, of which float leaves
      may have absorbed factors; and notes on those.
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
    about = run_of(call, leaves, state.recipe, batches, key) if saved else {}
    folder = Folder(
        options.save, options.resume, about | {"sequential": options.sequential} if saved else {}
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
        for path in early:  # a file holds all that one activation feeds, by the first of them
            kept = folder.read(number[path]) or {}
            encoded |= {p: placed(one, leaves[p]) for p, one in kept.items()}
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
    whole = [changed.get(path, leaf) for path, leaf in leaves.items()]
    return encoded, jax.tree.unflatten(tree, whole), notes


def _moves(
    call: Call,
    sites: Sites,
    plans: Mapping[str, Plan],
    early: Mapping[str, Inputs],
    walk: Walk | None,
    stats: Statistics | None,
) -> dict[str, Move]:
    """Where factors of rewrites can go, for all parameters that have one."""
    wanted = {p for p in plans if plans[p].rewrite is not None}
    if not wanted:
        return {}
    groups = [] if walk is None else fed_alike(walk)
    if early and wanted & set(early):
        known = plan_of(call, early, "ptq").sites if stats is None else stats.sites
        groups += fed_by(known, sites, early)
    return moves_of(call, groups, plans)


def _samples(batches: Sequence[Any]) -> list[list[Any]]:
    """The arrays in each batch.

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
    """The leaves that statistics are needed of."""
    needs = {}
    for path, plan in plans.items():
        observer = None if plan.spec is None else plan.gathers
        if (plan.encoder is None or plan.encoder.observer is None) and stuck(plan):
            continue  # its rewrite has nothing to do
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
    """Raises where statistics would not be those of a matrix that the leaf is, naming all such."""
    found = misfits(call, leaves, plans, early)
    if walk is not None:
        found |= walked_misfits(walk, leaves)
    if found:
        each = "; ".join(f"{shown(path)}: {why}" for path, why in found.items())
        raise ValueError(
            f"{each}. Give {'it' if len(found) == 1 else 'them'} a rule whose encoder and rewrite "
            "look at no inputs, or skip=True"
        )


def _rehearse(
    leaves: Mapping[str, Any],
    plans: Mapping[str, Plan],
    needs: Mapping[str, Inputs],
    key: Array | None,
) -> None:
    """Has every encoder look at shapes alone, so that what it refuses is known at once.

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
                continue  # meets no inputs
            stats = expected_stats(plan, leaf.shape)
        where = None if stats is None else (stats.axes, stats.batched)
        how = (
            leaf.shape,
            leaf.dtype,
            plan.spec,
            plan.storage_last_axes,
            plan.batch_axes,
            encoder,
            where,
        )
        if how not in tried:
            tried.add(how)
            abstract = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            encode_leaf(abstract, plan, encoder, key, stats)


def _by_itself(path: str, leaf: Any, plan: Plan, key: Array | None) -> Encoded:
    """A leaf whose encoder looks at nothing else; a table that is only looked up, too."""
    encoder = plan.encoder or rtn()
    if encoder.observer is None:
        made = encode_leaf(leaf, plan, encoder, key)
        why = stuck(plan) if plan.rewrite is not None else ""
        return made._replace(notes=(*made.notes, f"not rewritten: {why}")) if why else made
    other = encoder.without_inputs or rtn()
    made = encode_leaf(leaf, plan, other, key)
    return made._replace(notes=(*made.notes, f"meets no inputs: {other} in place of {encoder}"))


def _encoded(
    paths: Sequence[str],
    leaves: Mapping[str, Any],
    plans: Mapping[str, Plan],
    stats: Statistics,
    moves: Mapping[str, Move],
    key: Array | None,
) -> Iterator[dict[str, Encoded]]:
    """By path, what one activation after the other feeds."""
    for members, state in members_of(paths, leaves, plans, stats, moves):
        done = encode_members(members, state, key)
        yield {m.plan.path: one for m, one in zip(members, done, strict=True)}


def _beforehand(one: Encoded, plan: Plan) -> Encoded:
    count = sum(site.primitive != "gather" for site in plan.sites)
    sites = "" if count == 1 else f", {count} sites together"
    return one._replace(notes=(*one.notes, f"by inputs of the float function{sites}"))


def _check_static(plans: Mapping[str, Plan]) -> None:
    """Raises where a scale for each channel of an activation would meet factors or moments."""
    for path, plan in plans.items():
        spec = None if plan.rule is None else plan.rule.activations
        per_channel = spec is not None and spec.granularity in (PerChannel(-1), PerChannel((-1,)))
        if plan.gathers is not None and per_channel:
            what = plan.encoder if plan.rewrite is None else plan.rewrite
            raise ValueError(
                f"{shown(path)}: {what} beside activations with a scale for each channel, which "
                "move into the weight by themselves; give activations one scale"
            )
