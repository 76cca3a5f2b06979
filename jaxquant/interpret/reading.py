"""How a contraction with a parameter reads its activation: as rows of a matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
from jax import Array

from jaxquant.interpret.expressions import key_of
from jaxquant.ops import unfold


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """The static part of a contraction of a parameter with an activation.

    Attributes:
      primitive: name of the contraction's primitive.
      params: parameters of the primitive.
      side: which operand the activation is, `lhs` or `rhs`.
      weight: shape of the other operand.
    """

    primitive: str
    params: Mapping[str, Any]
    side: str
    weight: tuple[int, ...]

    def rows(self, x: Array, rest: Sequence[Array] = ()) -> Array:
        """The activation as rows `[*batched, rows, K]`, see `jaxquant.ops.unfold`.

        Raises:
          ValueError: the contraction is not a product of rows and a matrix.
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
        shape = self.weight
        if self.primitive == "conv_general_dilated":
            out = self.params["dimension_numbers"].rhs_spec[0]
            shape = tuple(n for a, n in enumerate(self.weight) if a != out)
        return self.primitive, self.side, shape, key_of(self.params)
