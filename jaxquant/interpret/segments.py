"""Cuts a straight-line program before its marks: what to run next, and what to keep for later.

A segment computes what the next marked activation needs and nothing else. Between segments only
values that depend on inputs and that later segments need are kept; values of parameters alone are
recomputed where they are used. Segments that compute the same have equal keys.
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
    """Marks of the same activation with equal readings: they share their statistics.

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
      group: the marks that it ends before.
      inputs: variables it reads, in a canonical order: parameters, inputs and kept values.
      outputs: variables to keep, those that the group reads first.
      dropped: variables that no later segment needs.
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
    """The marks of a program by the activation they see, in the order of their first marks."""
    numbers = _numbers(flat)
    numbers_of: dict[Hashable, list[int]] = {}
    seen: dict[Hashable, tuple[Var, ...]] = {}
    operands: dict[int, list[Var]] = {}
    for eqn in flat.jaxpr.eqns:
        at = mark_of(eqn)
        if at is not None:
            operands.setdefault(at[0], []).append(eqn.invars[0])
    for number, mark in enumerate(flat.marks):
        kind = (tuple(numbers[v] for v in operands[number]), mark.reading.key)
        numbers_of.setdefault(kind, []).append(number)
        seen.setdefault(kind, tuple(operands[number]))
    return tuple(Group(tuple(marks), seen[kind]) for kind, marks in numbers_of.items())


def segments_of(flat: Flat, groups: Sequence[Group]) -> tuple[Segment, ...]:
    """One segment for each group, in their order."""
    producers: dict[Var, Any] = {}
    alias: dict[Var, Var] = {}
    varying = {v for v, name in zip(flat.jaxpr.invars, flat.names, strict=True) if name is None}
    sources = {*flat.jaxpr.invars, *flat.jaxpr.constvars}
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
        """The equations that compute the targets from sources and done variables, in order."""
        eqns: dict[int, Any] = {}
        stack = list(targets)
        while stack:
            v = _root(alias, stack.pop())
            eqn = None if v in sources or v in done else producers[v]
            if eqn is not None and id(eqn) not in eqns:
                eqns[id(eqn)] = eqn
                stack += [u for u in eqn.invars if not _literal(u)]
        return sorted(eqns.values(), key=lambda eqn: order[id(eqn)])

    targets = [[_root(alias, v) for v in group.seen] for group in groups]
    everything = needed([v for vs in targets for v in vs], set())
    pending: Counter[Var] = Counter()  # uses of kept values still to come
    for eqn in everything:
        if any(v in varying for v in eqn.outvars):
            pending.update({_root(alias, v) for v in eqn.invars if not _literal(v)})
    pending.update(v for vs in targets for v in vs)

    done: set[Var] = set()
    segments = []
    for group, seen in zip(groups, targets, strict=True):
        eqns = needed(seen, done)
        reads = dict.fromkeys(
            _root(alias, v) for eqn in eqns for v in eqn.invars if not _literal(v)
        )
        results = {v for eqn in eqns for v in eqn.outvars}
        inputs = tuple(v for v in (*reads, *seen) if v not in results)
        inputs = tuple(dict.fromkeys(inputs))
        for eqn in eqns:
            if any(v in varying for v in eqn.outvars):
                pending.subtract({_root(alias, v) for v in eqn.invars if not _literal(v)})
        pending.subtract(seen)
        new = [v for eqn in eqns for v in eqn.outvars if v in varying]
        done.update(new)
        outputs = (*seen, *(v for v in new if pending[v] > 0 and v not in seen))
        intermediates = {v for v in (*inputs, *outputs) if v in varying and v not in sources}
        dropped = tuple(v for v in intermediates if pending[v] <= 0)
        key, run = _function(eqns, inputs, outputs, alias)
        segments.append(Segment(group, inputs, outputs, dropped, key, run))
    return tuple(segments)


def _root(alias: Mapping[Var, Var], var: Var) -> Var:
    """The variable that a mark is an alias of, or `var` itself."""
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
    """Value numbers: variables that equal equations compute have the same."""
    known = Expressions()
    sources = (*flat.jaxpr.invars, *flat.jaxpr.constvars)
    number = {v: known.argument(n) for n, v in enumerate(sources)}
    for eqn in flat.jaxpr.eqns:
        operands = [known.read(v, number) for v in eqn.invars]
        results = operands if mark_of(eqn) is not None else known.equation(eqn, operands)
        number.update(zip(eqn.outvars, results, strict=True))
    return number
