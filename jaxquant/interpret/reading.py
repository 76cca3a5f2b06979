"""How a contraction reads the activation that a parameter meets: as rows of a matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxquant.interpret import _compat
from jaxquant.ops import unfold


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """The static part of a contraction of a parameter with an activation.

    Attributes:
      primitive: of the contraction.
      params: of the primitive.
      side: the operand that the activation is, `lhs` or `rhs`.
      weight: shape of the other operand.
    """

    primitive: str
    params: Mapping[str, Any]
    side: str
    weight: tuple[int, ...]

    def rows(self, x: Array, rest: Sequence[Array] = ()) -> Array:
        """The activation as rows `[*batched, rows, K]`, see `jaxquant.ops.unfold`.

        Raises:
          ValueError: a contraction that is no product of rows and a matrix.
        """
        return unfold(self.primitive, self.params, self.side, x, self.weight, rest)

    def aval(self, x: Any, rest: Sequence[Any] = ()) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the rows; `ValueError` as `rows`."""
        return jax.eval_shape(self.rows, x, tuple(rest))

    @property
    def key(self) -> Hashable:
        """Equal for readings that make the same rows of one activation."""
        at = self.side == "rhs"
        if self.primitive == "dot_general":
            contract, batch = self.params["dimension_numbers"]
            return self.primitive, tuple(contract[at]), tuple(batch[at])
        kept = self.weight
        if self.primitive == "conv_general_dilated":
            out = self.params["dimension_numbers"].rhs_spec[0]
            kept = tuple(n for a, n in enumerate(self.weight) if a != out)
        return self.primitive, self.side, kept, key_of(self.params)


def key_of(value: Any) -> Hashable:
    """A hashable that is equal for parameters of equations that mean the same.

    >>> key_of({"a": [1, 2]}) == key_of({"a": [1, 2]})
    True
    """
    if hasattr(getattr(value, "jaxpr", value), "eqns"):
        return _jaxpr_key(value)
    if isinstance(value, Mapping):
        return tuple((k, key_of(v)) for k, v in sorted(value.items(), key=lambda kv: str(kv[0])))
    if isinstance(value, (tuple, list)):
        return tuple(map(key_of, value))
    try:
        hash(value)
    except TypeError:
        return "other", id(value)
    return type(value).__name__, value  # 1 and True are equal, and not the same


_FORWARD = {"custom_jvp_call": ("call_jaxpr",), "custom_vjp_call": ("call_jaxpr",)}


def kind_of(eqn: Any) -> Hashable:
    """What an equation computes, whatever on: equal for equal helpers traced apart."""
    name, params = eqn.primitive.name, eqn.params
    if name in _FORWARD:  # how they are differentiated makes no difference to what they compute
        params = {k: params[k] for k in _FORWARD[name]}
    return name, key_of(params)


def literal_key(var: Any) -> Hashable:
    """A literal by value and type."""
    value = np.asarray(var.val)
    return "literal", str(var.aval), value.dtype.str, value.shape, value.tobytes()


def _jaxpr_key(value: Any) -> Hashable:
    jaxpr, consts = _compat.opened(value)
    number: dict[Any, int] = {}
    for v in (*jaxpr.constvars, *jaxpr.invars):
        number[v] = len(number)
    lines: list[Hashable] = [tuple(str(v.aval) for v in number), tuple(map(id, consts))]

    def read(v: Any) -> Hashable:
        return literal_key(v) if isinstance(v, _compat.Literal) else number[v]

    for eqn in jaxpr.eqns:
        operands = tuple(map(read, eqn.invars))
        for v in eqn.outvars:
            number[v] = len(number)
        lines.append((kind_of(eqn), operands, tuple(str(v.aval) for v in eqn.outvars)))
    lines.append(tuple(map(read, jaxpr.outvars)))
    return tuple(lines)
