"""A `QTensor` that is made anew from a float array at every step of training."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeGuard

import jax
from jax import Array

from jaxquant.qtensor.tensor import DATA, META, QTensor


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(*DATA, "values", "learned"),
    meta_fields=(*META, "estimator", "gradients"),
)
@dataclasses.dataclass(frozen=True)
class FakeQuantTensor(QTensor):
    """Codes to compute with, and beside them the float array that gradients go to.

    All codes and scales are constants to `jax.grad`. `values` is what they stand for, made from a
    trained array by a function that passes gradients on (see `jaxquant.ste`).

    Attributes:
      values: `dequantize` of this, of the array's own shape and dtype.
      learned: what is learned of the other operand's quantization, float32 `[*batch]` each.
      estimator: how gradients pass the rounding of the other operand, a value of `jaxquant.ste`.
      gradients: how gradients are quantized, a `Gradients`; `None` leaves them in float.
    """

    values: Array | None = None
    learned: dict[str, Array] | None = None
    estimator: Any = None
    gradients: Any = None

    @property
    def constant(self) -> QTensor:
        """The codes and scales alone."""
        return QTensor(**{f.name: getattr(self, f.name) for f in dataclasses.fields(QTensor)})

    def over(self, q: QTensor, values: Array) -> FakeQuantTensor:
        """This with other codes and values: those of the array after it was moved."""
        own = {f.name: getattr(q, f.name) for f in dataclasses.fields(QTensor)}
        return dataclasses.replace(self, **own, values=values)


def is_fake_quant(x: Any) -> TypeGuard[FakeQuantTensor]:
    """Whether `x` is a `FakeQuantTensor`."""
    return isinstance(x, FakeQuantTensor)
