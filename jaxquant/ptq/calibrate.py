"""Parameters whose encoders or rewrites look at what they are contracted with."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxquant.capture import Statistics, arguments
from jaxquant.capture.batches import Alike
from jaxquant.capture.plan import plan_of
from jaxquant.encoders import rtn
from jaxquant.interpret.calls import Call, is_traced
from jaxquant.interpret.sites import Sites, path_str
from jaxquant.observers import Inputs
from jaxquant.params import Encoded, Plan, check_finite, encode_leaf, make_plans
from jaxquant.ptq.encode import encode_members
from jaxquant.ptq.gather import BUDGET, fed_by, members_of, passes
from jaxquant.ptq.moves import Move, folded, moves_of
from jaxquant.ptq.saved import Folder, Path
from jaxquant.ptq.sequential import Walk, fed_alike, quantize_in_order, walk_of
from jaxquant.qtensor import is_qtensor
from jaxquant.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class How:
    """How calibration by inputs goes about it; see `jaxquant.ptq`."""

    sequential: bool = True
    budget: int | None = None
    offload: bool = False
    progress: bool | None = None
    save: Path | None = None
    resume: Path | None = None

    @property
    def bytes(self) -> int:
        """The budget in bytes."""
        return BUDGET if self.budget is None else self.budget


def encoded_by_inputs(
    fn: Callable[..., Any],
    params: Any,
    recipe: Recipe,
    call: Call,
    sites: Sites,
    batches: Sequence[Any] | None,
    stats: Statistics | None,
    key: Array | None,
    how: How,
) -> tuple[dict[str, Encoded], Any]:
    """Encodes all leaves of a recipe some of whose rules look at inputs.

    Args:
      fn: the function, of params and the arguments in a batch.
      params: its float params.
      recipe: the rules.
      call: `fn` traced with the arguments of the first batch.
      sites: its sites.
      batches: the samples; `None` where there are `stats`.
      stats: what was gathered before.
      key: see `encode_leaf`.
      how: in which order, and within which bounds.

    Returns:
      By path, what became of every leaf that a rule quantizes; and the params, of which float
      leaves may have absorbed factors.
    """
    flat = jax.tree.leaves_with_path(params, is_leaf=is_qtensor)
    leaves = {path_str(path): leaf for path, leaf in flat}
    plans = {plan.path: plan for plan in make_plans(list(leaves.items()), recipe, sites)[0]}
    needs = _needs(plans)
    check_finite([(path, leaf) for path, leaf in leaves.items() if plans[path].spec is not None])
    walk = None
    if stats is None and how.sequential:
        walk = walk_of(call, leaves, plans, needs)
    folder = Folder(how.save, how.resume, _about(leaves, recipe, sites, batches, stats, how))
    encoded = {
        path: _by_itself(path, leaves[path], plan, key)
        for path, plan in plans.items()
        if plan.spec is not None and path not in needs
    }
    early = {p: o for p, o in needs.items() if walk is None or p not in walk.paths}
    moves = _moves(call, sites, plans, early, walk, stats)
    if stats is not None:
        encoded |= _encoded(list(early), leaves, plans, stats, moves, key)
    elif early:
        assert batches is not None
        done = folder.read(0)
        if done is None:
            found: dict[str, Encoded] = {}
            for paths, seen in passes(
                *(fn, params, call, sites, batches, early),
                budget=how.bytes,
                progress=how.progress,
            ):
                found |= _encoded(paths, leaves, plans, seen, moves, key)
            done = [found[path] for path in early]
            folder.write(0, done)
        encoded |= dict(zip(early, done, strict=True))
    if walk is not None and walk.paths:
        assert batches is not None
        encoded |= quantize_in_order(
            *(walk, leaves, plans, needs, moves, _samples(batches), encoded),
            key=key,
            budget=how.bytes,
            offload=how.offload,
            progress=how.progress,
            folder=folder,
        )
    encoded, changed = folded(encoded, leaves, moves)
    tree = jax.tree.structure(params, is_leaf=is_qtensor)
    whole = [changed.get(path, leaf) for path, leaf in leaves.items()]
    return encoded, jax.tree.unflatten(tree, whole)


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
        if observer is not None and any(site.primitive != "gather" for site in plan.sites):
            needs[path] = observer
    return needs


def _by_itself(path: str, leaf: Any, plan: Plan, key: Array | None) -> Encoded:
    """A leaf whose encoder looks at nothing else; a table that is only looked up, too."""
    encoder = plan.encoder
    if encoder is None or getattr(encoder, "observer", None) is not None:
        encoder = rtn()
    return encode_leaf(leaf, plan, encoder, key)


def _encoded(
    paths: Sequence[str],
    leaves: Mapping[str, Any],
    plans: Mapping[str, Plan],
    stats: Statistics,
    moves: Mapping[str, Move],
    key: Array | None,
) -> dict[str, Encoded]:
    found: dict[str, Encoded] = {}
    for members, state in members_of(paths, leaves, plans, stats, moves):
        done = encode_members(members, state, key)
        found |= {m.plan.path: one for m, one in zip(members, done, strict=True)}
    return found


def _about(
    leaves: Mapping[str, Any],
    recipe: Recipe,
    sites: Sites,
    batches: Sequence[Any] | None,
    stats: Statistics | None,
    how: How,
) -> dict[str, Any]:
    """What a run and its continuation have in common; checksums only where one is kept."""
    if how.save is None and how.resume is None:
        return {}
    if stats is not None:
        raise ValueError("ptq: save and resume are for calibration by batches, not by stats")
    return {
        "versions": {name: version(name) for name in ("jaxquant", "jax", "jaxlib")},
        "recipe": repr(list(recipe.rules)),
        "sites": zlib.crc32(str(sites).encode()),
        "params": _checksum(list(leaves.values())),
        "batches": _checksum(batches),
        "sequential": how.sequential,
    }


def _checksum(tree: Any) -> int:
    total = 0
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(jnp.asarray(leaf))
            total = zlib.crc32(np.asarray(leaf).tobytes(), total)
        else:
            total = zlib.crc32(repr(leaf).encode(), total)
    return total
