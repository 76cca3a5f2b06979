"""Gathers input statistics in passes over the whole function, within a memory budget."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.capture import Statistics, capture_with
from jaxquant.capture.plan import plan_of
from jaxquant.interpret.calls import Call
from jaxquant.interpret.sites import Site, Sites
from jaxquant.observers import Inputs, InputStats
from jaxquant.params import Plan
from jaxquant.ptq.absorb import Move, immovable
from jaxquant.ptq.encode import Member
from jaxquant.report import shown

BUDGET = 2**30  # bytes of statistics in memory at once, by default


def passes(
    fn: Callable[..., Any],
    params: Any,
    call: Call,
    plans: Mapping[str, Plan],
    batches: Sequence[Any],
    needs: Mapping[str, Inputs],
    *,
    budget: int,
    progress: bool | None,
) -> Iterator[tuple[list[str], Statistics]]:
    """Gathers statistics of the parameters' inputs, as many per pass as the budget allows.

    Args:
      fn: the function.
      params: its float params.
      call: its call, traced.
      plans: how its leaves are encoded, by path.
      batches: the samples.
      needs: the observer for each parameter, by path.
      budget: bytes of statistics.
      progress: see `jaxquant.capture`.

    Yields:
      Paths, and the statistics of their sites.

    Raises:
      ValueError: the statistics of one parameter exceed the budget.
    """
    names, asked = _asked(plans, needs)
    plan = plan_of(call, asked, "ptq")
    sizes = {
        name: tree_bytes(seen.state) for name, seen in jax.eval_shape(plan.start).entries.items()
    }
    of_site = {key: {entry for _, entry in operands} for key, operands in plan.sites}
    entries: dict[str, set[str]] = {
        path: set().union(*(of_site.get(site.key, set()) for site in plans[path].sites))
        for path in needs
    }
    require_budget({path: sum(sizes[e] for e in found) for path, found in entries.items()}, budget)
    waiting = [path for path in needs if entries[path]]
    while waiting:
        now: list[str] = []
        in_pass: set[str] = set()
        for path in waiting:
            if sum(sizes[e] for e in in_pass | entries[path]) <= budget:
                now.append(path)
                in_pass |= entries[path]
        waiting = [path for path in waiting if path not in now]
        chosen = {name: asked[name] for path in now for name in names[path]}
        yield now, capture_with("ptq", fn, params, (), chosen, batches=batches, progress=progress)


def _asked(
    plans: Mapping[str, Plan], needs: Mapping[str, Inputs]
) -> tuple[dict[str, set[str]], dict[str, Inputs]]:
    """Returns the names that sites use for each leaf, and the observer by name.

    Sites name only one of several leaves that are the same array.
    """
    names = {path: {site.param or path for site in plans[path].sites} for path in needs}
    return names, {name: needs[path] for path in needs for name in names[path]}


def misfits(
    call: Call,
    leaves: Mapping[str, Any],
    plans: Mapping[str, Plan],
    needs: Mapping[str, Inputs],
) -> dict[str, str]:
    """Why statistics would not fit a leaf, by path, from shapes alone."""
    if not needs:
        return {}
    plan = plan_of(call, _asked(plans, needs)[1], "ptq")
    entries = dict(plan.sites)
    reasons: dict[str, str] = {}
    for path in needs:
        stats = expected_stats(plans[path], leaves[path].shape)
        layers = tuple(leaves[path].shape[: plans[path].batch_axes])
        uses = [site for site in plans[path].sites if site.primitive != "gather"]
        if len({(site.contracted, site.batched) for site in uses}) > 1:
            reasons[path] = (
                f"it is contracted differently at its sites {', '.join(shown(s.key) for s in uses)}"
                ", so that their statistics do not add up"
            )
            continue
        for site in uses:
            for _, entry in entries.get(site.key, ()):
                place, observer = plan.observed[entry]
                why = misfit(functools.partial(place.seen, observer), stats, len(layers))
                if not why and tuple(place.lead) != layers:
                    why = (
                        f"it has statistics for layers {list(place.lead)} but is encoded for "
                        f"layers {list(layers)}: only scans over leading axes are supported"
                    )
                if why:
                    reasons[path] = why
    return reasons


def misfit(seen: Callable[[], Any], stats: InputStats, layers: int) -> str:
    """Why rows `[*batched, rows, K]` do not fit a weight's shape; empty if they do."""
    try:
        shape = tuple(seen().shape)
    except ValueError as error:
        return str(error)
    expected = tuple(stats.absmax.shape[layers:])
    got = (*shape[:-2], shape[-1])
    if got == expected:
        return ""
    return (
        f"it is sliced or reshaped before its contraction: expected rows of {list(expected)} "
        f"values, got {list(got)}"
    )


def fed_by(stats_sites: Any, sites: Sites, paths: Collection[str]) -> list[list[str]]:
    """Groups the paths of parameters by the activation that feeds them, a shared entry.

    Args:
      stats_sites: site keys with their operands and entries, as `Statistics.sites`.
      sites: the sites of the function.
      paths: the parameters to group.
    """
    groups: dict[str, list[str]] = {}
    for key, operands in stats_sites:
        path = sites[key].param
        for _, entry in operands:
            if path is not None and path in paths:
                groups.setdefault(entry, []).append(path)
    return list(groups.values())


def require_budget(sizes: Mapping[str, int], budget: int) -> None:
    """Raises if a size in `sizes`, bytes of statistics needed together, exceeds the budget."""
    least = max(sizes.values(), default=0)
    if least > budget:
        name = max(sizes, key=lambda n: sizes[n])
        raise ValueError(
            f"ptq: budget={budget} bytes is too little: the statistics of {shown(name)} alone take "
            f"{least}; the smallest budget for this model is {least}"
        )


def tree_bytes(tree: Any) -> int:
    """Returns the total bytes of the arrays of a tree."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def members_of(
    paths: Sequence[str],
    leaves: Mapping[str, Any],
    plans: Mapping[str, Plan],
    stats: Statistics,
    moves: Mapping[str, Move],
) -> list[tuple[list[Member], Any]]:
    """Groups leaves by their activation, each group with the state of its statistics.

    Raises:
      ValueError: a site has no statistics, or those of several sites cannot be merged.
    """
    entries = dict(stats.sites)
    groups: dict[Any, list[Member]] = {}
    states: dict[Any, Any] = {}
    for path in paths:
        plan = plans[path]
        uses = [site for site in plan.sites if site.primitive != "gather"]
        member = dataclasses.replace(_member(path, leaves[path], plan, uses), move=moves.get(path))
        names = [_entry(dict(entries.get(site.key, ())), stats, site) for site in uses]
        kind: Any = names[0] if len(uses) == 1 else path
        if kind not in states:
            seen = [stats.entries[name] for name in names]
            first = seen[0]
            for use, other in zip(uses[1:], seen[1:], strict=True):
                same = (use.contracted, use.batched) == (uses[0].contracted, uses[0].batched)
                shapes = [jax.tree.map(_shape, seen.state) for seen in (first, other)]
                if not same or shapes[0] != shapes[1]:
                    raise ValueError(
                        f"{shown(path)}: it is contracted differently at its sites "
                        f"{', '.join(shown(s.key) for s in uses)}, so that their statistics do not "
                        "add up; give it a rule whose encoder looks at no data"
                    )
            state = first.state
            for other in seen[1:]:
                state = first.observer.merge(state, other.state)
            states[kind] = state
        lead = tuple(states[kind]["updates"].shape)
        if lead != tuple(leaves[path].shape[: plan.batch_axes]):
            raise ValueError(
                f"{shown(path)}: expected statistics for layers "
                f"{list(leaves[path].shape[: plan.batch_axes])}, got {list(lead)}; only scans over "
                "leading axes have statistics of their own"
            )
        groups.setdefault(kind, []).append(member)
    return [(members, states[kind]) for kind, members in groups.items()]


def _shape(a: Any) -> tuple[int, ...]:
    return tuple(a.shape)


def _entry(operands: Mapping[str, str], stats: Statistics, site: Site) -> str:
    for entry in operands.values():
        if isinstance(stats.entries[entry].observer, Inputs):
            return entry
    raise ValueError(
        f"{shown(site.key)}: its rule's encoder or rewrite looks at inputs, but there are no "
        "statistics of them; capture with jaxquant.observers.inputs(), or pass batches"
    )


def expected_stats(plan: Plan, shape: tuple[int, ...]) -> InputStats:
    """Returns the statistics of a leaf's first contraction as abstract arrays."""
    site = next(site for site in plan.sites if site.primitive != "gather")
    axes, batched = (
        tuple(a - len(shape) for a in some) for some in (site.contracted, site.batched)
    )
    lead = (*shape[: plan.batch_axes], *(shape[a] for a in batched))
    k = math.prod(shape[a] for a in axes)

    def array(*sizes: int) -> Any:
        return jax.ShapeDtypeStruct((*lead, *sizes), jnp.float32)

    return InputStats(array(), array(k), array(k), array(k, k), axes, batched)


def _member(path: str, leaf: Any, plan: Plan, uses: Sequence[Site]) -> Member:
    first, rank = uses[0], len(leaf.shape)
    axes = tuple(a - rank for a in first.contracted)
    batched = tuple(a - rank for a in first.batched)
    return Member(plan, leaf, axes, batched, immovable(first, len(uses)))
