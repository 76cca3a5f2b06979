"""Value numbering: which values, and which programs, compute the same."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxquant.interpret import _compat, primitives


class Expressions:
    """Value numbers: equal equations on equally numbered operands give equally numbered results.

    Programs that share one instance can be compared result by result. An equation with effects
    equals no other.
    """

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    @property
    def key(self) -> Hashable:
        """All expressions, in the order of their numbers."""
        return tuple(self._numbers)

    def argument(self, position: int, aval: Any = None) -> int:
        """The number of an argument."""
        return self._number(("argument", position, str(aval)))

    def results(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[int]) -> list[int]:
        """Numbers of a jaxpr's results; constants are equal if they are the same object."""
        env = dict(zip(jaxpr.invars, arguments, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self._number(("constant", id(const)))
        for eqn in jaxpr.eqns:
            operands = [self.read(atom, env) for atom in eqn.invars]
            env.update(zip(eqn.outvars, self.equation(eqn, operands), strict=True))
        return [self.read(atom, env) for atom in jaxpr.outvars]

    def read(self, atom: Any, env: Mapping[Any, int]) -> int:
        """The number of a variable or a literal."""
        if not isinstance(atom, _compat.Literal):
            return env[atom]
        value = np.asarray(atom.val)
        key = "literal", str(atom.aval), value.dtype.str, value.shape, value.tobytes()
        return self._number(key)

    def equation(self, eqn: Any, operands: Sequence[int]) -> list[int]:
        """Numbers of an equation's results."""
        if eqn.primitive.name == "jit":
            return self.results(*_compat.body(eqn), operands)
        if primitives.of(eqn).move == "barrier":
            return list(operands)
        avals = tuple(str(v.aval) for v in eqn.outvars)
        key: tuple[Hashable, ...] = (kind_of(eqn), tuple(operands), avals)
        if eqn.effects:
            key = (*key, len(self._numbers))
        return [self._number((*key, n)) for n in range(len(eqn.outvars))]

    def _number(self, key: Hashable) -> int:
        return self._numbers.setdefault(key, len(self._numbers))


def kind_of(eqn: Any) -> Hashable:
    """What an equation computes of its operands; equal for equal helpers traced separately."""
    name, params = eqn.primitive.name, eqn.params
    if (
        primitives.of(eqn).kind == "call" and "call_jaxpr" in params
    ):  # its derivative rule does not change its results
        params = {"call_jaxpr": params["call_jaxpr"]}
    return name, key_of(params)


def key_of(value: Any) -> Hashable:
    """A hashable key of an equation's parameter; equal where parameters mean the same.

    >>> key_of({"a": [1, 2]}) == key_of({"a": [1, 2]})
    True
    """
    if hasattr(getattr(value, "jaxpr", value), "eqns"):
        jaxpr, consts = _compat.opened(value)
        inner = Expressions()
        arguments = [inner.argument(n, v.aval) for n, v in enumerate(jaxpr.invars)]
        results = inner.results(jaxpr, consts, arguments)
        return inner.key, tuple(results)
    if isinstance(value, Mapping):
        return tuple((k, key_of(v)) for k, v in sorted(value.items(), key=lambda kv: str(kv[0])))
    if isinstance(value, (tuple, list)):
        return tuple(map(key_of, value))
    try:
        hash(value)
    except TypeError:
        return "other", id(value)
    return type(value).__name__, value  # 1 == True, but as parameters they differ
