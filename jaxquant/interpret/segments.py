"""A straight program cut in front of its marks: what to run next, and what to keep for later.

A segment computes what the next marked activation needs and nothing else. Between segments only
values that depend on inputs and that later segments need are kept; what follows from parameters
alone is computed where it is used. Segments that do the same are told by a key.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from jaxquant.interpret import _compat
from jaxquant.interpret.expressions import Expressions
from jaxquant.interpret.flatten import Flat, mark_of

Var = Any


@dataclasses.dataclass(frozen=True)
class Group:
    """Marks of one and the same activation, read alike: they share their statistics.

    Attributes:
      marks: numbers of the marks, in execution order.
      seen: the activation and further operands of the contraction.
    """

    marks: tuple[int, ...]
    seen: tuple[Var, ...]


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of the program.

    Attributes:
      group: the marks in front of which it ends.
      inputs: variables it reads, in a canonical order: parameters, inputs, and what was kept.
      outputs: variables to keep, the group's own first.
      dropped: variables that nothing needs any more after it.
      key: what it computes; segments with equal keys are one function of their inputs.
      run: that function, from a list of values to a list of values.
    """

    group: Group
    inputs: tuple[Var, ...]
    outputs: tuple[Var, ...]
    dropped: tuple[Var, ...]
    key: Hashable
    run: Callable[[Sequence[Any]], list[Any]]


def groups_of(flat: Flat) -> tuple[Group, ...]:
    """The marks of a program that see the same activation, in the order of their first."""
    numbers = _numbers(flat)
    found: dict[Hashable, list[int]] = {}
    seen: dict[Hashable, tuple[Var, ...]] = {}
    operands: dict[int, list[Var]] = {}
    for eqn in flat.jaxpr.eqns:
        at = mark_of(eqn)
        if at is not None:
            operands.setdefault(at[0], []).append(eqn.invars[0])
    for number, mark in enumerate(flat.marks):
        kind = (tuple(numbers[v] for v in operands[number]), mark.reading.key)
        found.setdefault(kind, []).append(number)
        seen.setdefault(kind, tuple(operands[number]))
    return tuple(Group(tuple(marks), seen[kind]) for kind, marks in found.items())


def segments_of(flat: Flat, groups: Sequence[Group]) -> tuple[Segment, ...]:
    """One segment for each group, in their order."""
    producers: dict[Var, Any] = {}
    alias: dict[Var, Var] = {}
    varying = {v for v, name in zip(flat.jaxpr.invars, flat.names, strict=True) if name is None}
    given = {*flat.jaxpr.invars, *flat.jaxpr.constvars}
    order: dict[int, int] = {}
    for n, eqn in enumerate(flat.jaxpr.eqns):
        order[id(eqn)] = n
        if mark_of(eqn) is not None:
            alias[eqn.outvars[0]] = _root(alias, eqn.invars[0])
            continue
        live = any(not _literal(v) and _root(alias, v) in varying for v in eqn.invars)
        for v in eqn.outvars:
            producers[v] = eqn
            if live:
                varying.add(v)

    def needed(targets: Sequence[Var], done: set[Var]) -> list[Any]:
        """The equations that lead to the targets from what is given or done, in order."""
        found: dict[int, Any] = {}
        stack = list(targets)
        while stack:
            v = _root(alias, stack.pop())
            eqn = None if v in given or v in done else producers[v]
            if eqn is not None and id(eqn) not in found:
                found[id(eqn)] = eqn
                stack += [u for u in eqn.invars if not _literal(u)]
        return sorted(found.values(), key=lambda eqn: order[id(eqn)])

    targets = [[_root(alias, v) for v in group.seen] for group in groups]
    everything = needed([v for vs in targets for v in vs], set())
    pending: Counter[Var] = Counter()  # uses of what is kept that are still to come
    for eqn in everything:
        if any(v in varying for v in eqn.outvars):
            pending.update({_root(alias, v) for v in eqn.invars if not _literal(v)})
    pending.update(v for vs in targets for v in vs)

    done: set[Var] = set()
    segments = []
    for group, own in zip(groups, targets, strict=True):
        eqns = needed(own, done)
        reads = dict.fromkeys(
            _root(alias, v) for eqn in eqns for v in eqn.invars if not _literal(v)
        )
        made = {v for eqn in eqns for v in eqn.outvars}
        inputs = tuple(v for v in (*reads, *own) if v not in made)
        inputs = tuple(dict.fromkeys(inputs))
        for eqn in eqns:
            if any(v in varying for v in eqn.outvars):
                pending.subtract({_root(alias, v) for v in eqn.invars if not _literal(v)})
        pending.subtract(own)
        new = [v for eqn in eqns for v in eqn.outvars if v in varying]
        done.update(new)
        outputs = (*own, *(v for v in new if pending[v] > 0 and v not in own))
        kept = {v for v in (*inputs, *outputs) if v in varying and v not in given}
        dropped = tuple(v for v in kept if pending[v] <= 0)
        key, run = _function(eqns, inputs, outputs, alias)
        segments.append(Segment(group, inputs, outputs, dropped, key, run))
    return tuple(segments)


def _root(alias: Mapping[Var, Var], var: Var) -> Var:
    """The variable behind marks."""
    return alias.get(var, var)


def _literal(var: Any) -> bool:
    return isinstance(var, _compat.Literal)


def _function(
    eqns: Sequence[Any], inputs: Sequence[Var], outputs: Sequence[Var], alias: Mapping[Var, Var]
) -> tuple[Hashable, Callable[[Sequence[Any]], list[Any]]]:
    """What a segment computes, as a key and as a function."""
    known = Expressions()
    number = {v: known.argument(n, v.aval) for n, v in enumerate(inputs)}
    for eqn in eqns:
        read = [v if _literal(v) else _root(alias, v) for v in eqn.invars]
        results = known.equation(eqn, [known.read(v, number) for v in read])
        number.update(zip(eqn.outvars, results, strict=True))
    key = known.key, tuple(number[v] for v in outputs)

    def run(values: Sequence[Any]) -> list[Any]:
        env: dict[Var, Any] = dict(zip(inputs, values, strict=True))
        for eqn in eqns:
            data = [v.val if _literal(v) else env[_root(alias, v)] for v in eqn.invars]
            with _compat.context(eqn):
                env.update(zip(eqn.outvars, _compat.bind(eqn, data), strict=True))
        return [env[v] for v in outputs]

    return key, run


def _numbers(flat: Flat) -> dict[Var, int]:
    """Numbers of values: variables computed alike from the same have the same."""
    known = Expressions()
    given = (*flat.jaxpr.invars, *flat.jaxpr.constvars)
    number = {v: known.argument(n) for n, v in enumerate(given)}
    for eqn in flat.jaxpr.eqns:
        operands = [known.read(v, number) for v in eqn.invars]
        results = operands if mark_of(eqn) is not None else known.equation(eqn, operands)
        number.update(zip(eqn.outvars, results, strict=True))
    return number
