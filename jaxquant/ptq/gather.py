"""Statistics of inputs by passes over the whole function, within a budget of memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxquant.capture import Statistics, capture_with
from jaxquant.capture.plan import plan_of
from jaxquant.interpret.calls import Call
from jaxquant.interpret.sites import Site, Sites
from jaxquant.observers import Inputs
from jaxquant.params import Plan
from jaxquant.ptq.encode import Member
from jaxquant.ptq.moves import Move
from jaxquant.report import shown

BUDGET = 2**30  # bytes of statistics held at once, unless said otherwise


def passes(
    fn: Callable[..., Any],
    params: Any,
    call: Call,
    sites: Sites,
    batches: Sequence[Any],
    needs: Mapping[str, Inputs],
    *,
    budget: int,
    progress: bool | None,
) -> Iterator[tuple[list[str], Statistics]]:
    """Statistics of what parameters are contracted with, as many at once as a budget allows.

    Args:
      fn: the function.
      params: its float params.
      call: its call, traced.
      sites: its sites.
      batches: the samples.
      needs: the observer for each parameter, by path.
      budget: bytes of statistics.
      progress: see `jaxquant.capture`.

    Yields:
      Paths, and the statistics of their sites.

    Raises:
      ValueError: a single statistic that is larger than the budget.
    """
    plan = plan_of(call, needs, "ptq")
    sizes = {
        name: tree_bytes(seen.state) for name, seen in jax.eval_shape(plan.start).entries.items()
    }
    entries: dict[str, set[str]] = {path: set() for path in needs}
    params_of = {site.key: site.param for site in sites.sites}
    for key, operands in plan.sites:
        path = params_of.get(key)
        if path in entries:
            entries[path] |= {entry for _, entry in operands}
    require_budget({path: sum(sizes[e] for e in found) for path, found in entries.items()}, budget)
    waiting = [path for path in needs if entries[path]]
    while waiting:
        now: list[str] = []
        held: set[str] = set()
        for path in waiting:
            if sum(sizes[e] for e in held | entries[path]) <= budget:
                now.append(path)
                held |= entries[path]
        waiting = [path for path in waiting if path not in now]
        chosen = {path: needs[path] for path in now}
        yield now, capture_with("ptq", fn, params, (), batches, chosen, progress=progress)


def fed_by(stats_sites: Any, sites: Sites, paths: Collection[str]) -> list[list[str]]:
    """Paths of parameters that one activation feeds, by the entries that their sites share.

    Args:
      stats_sites: site keys with their operands and entries, as `Statistics.sites`.
      sites: the sites of the function.
      paths: which parameters.
    """
    groups: dict[str, list[str]] = {}
    for key, operands in stats_sites:
        path = sites[key].param
        for _, entry in operands:
            if path is not None and path in paths:
                groups.setdefault(entry, []).append(path)
    return list(groups.values())


def require_budget(sizes: Mapping[str, int], budget: int) -> None:
    """Raises unless the statistics that are needed together, by name, fit the budget."""
    least = max(sizes.values(), default=0)
    if least > budget:
        name = max(sizes, key=lambda n: sizes[n])
        raise ValueError(
            f"ptq: budget={budget} bytes is too little: the statistics of {shown(name)} alone take "
            f"{least}; the smallest budget for this model is {least}"
        )


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def members_of(
    paths: Sequence[str],
    leaves: Mapping[str, Any],
    plans: Mapping[str, Plan],
    stats: Statistics,
    moves: Mapping[str, Move],
) -> list[tuple[list[Member], Any]]:
    """Leaves grouped by what they are contracted with, and the states of its statistics.

    Raises:
      ValueError: there are no statistics of a site, or none that fit together.
    """
    entries = dict(stats.sites)
    groups: dict[Any, list[Member]] = {}
    states: dict[Any, Any] = {}
    for path in paths:
        plan = plans[path]
        uses = [site for site in plan.sites if site.primitive != "gather"]
        member = dataclasses.replace(_member(path, leaves[path], plan, uses), move=moves.get(path))
        found = [_entry(dict(entries.get(site.key, ())), stats, site) for site in uses]
        kind: Any = found[0] if len(uses) == 1 else path
        if kind not in states:
            seen = [stats.entries[name] for name in found]
            first = seen[0]
            for other in seen[1:]:
                if jax.tree.map(_shape, other.state) != jax.tree.map(_shape, first.state):
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


def _member(path: str, leaf: Any, plan: Plan, uses: Sequence[Site]) -> Member:
    first, rank = uses[0], len(leaf.shape)
    axes = tuple(a - rank for a in first.contracted)
    batched = tuple(a - rank for a in first.batched)
    return Member(plan, leaf, axes, batched, immovable(first, batched, len(uses)))


def immovable(site: Site, batched: tuple[int, ...], uses: int) -> str:
    """Why no scale can move between a parameter and what it is contracted with; empty if it can."""
    if uses != 1:
        return "it is used at several sites"
    if site.primitive != "dot_general":
        return f"scale cannot move across {site.primitive}"
    if batched:
        return "it is contracted with several activations, one for each index of a batch axis"
    return ""
