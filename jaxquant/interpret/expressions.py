"""Values as expressions of their arguments: which of them, and which programs, are the same."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxquant.interpret import _compat, primitives


class Expressions:
    """Numbers for expressions: what is computed alike from the same arguments has the same.

    Programs that share one instance can be compared result by result. What has effects is equal
    to nothing else.
    """

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    @property
    def key(self) -> Hashable:
        """All expressions, in the order in which they were met."""
        return tuple(self._numbers)

    def argument(self, position: int, aval: Any = None) -> int:
        """The number of an argument."""
        return self._number(("argument", position, str(aval)))

    def results(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[int]) -> list[int]:
        """Numbers of the results of a jaxpr; constants are the same if they are one object."""
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
    """What an equation computes, whatever on: equal for equal helpers traced apart."""
    name, params = eqn.primitive.name, eqn.params
    if (
        primitives.of(eqn).kind == "call" and "call_jaxpr" in params
    ):  # how it is differentiated makes no difference to what it computes
        params = {"call_jaxpr": params["call_jaxpr"]}
    return name, key_of(params)


def key_of(value: Any) -> Hashable:
    """A hashable that is equal for parameters of equations that mean the same.

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
    return type(value).__name__, value  # 1 and True are equal, and not the same
