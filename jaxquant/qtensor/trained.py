"""A `QTensor` that each training step makes again from a float array."""

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
    """Codes for the forward pass, and the float array that receives gradients.

    All codes and scales are constants to `jax.grad`. `values` is the dequantized array, computed
    from a trained array by a function that passes gradients on (see `jaxquant.ste`).

    Attributes:
      values: `dequantize` of this, of the array's own shape and dtype.
      learned: learned quantization parameters of the other operand, float32 `[*batch]` each.
      estimator: gradient estimator for the rounding of the other operand, from `jaxquant.ste`.
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
        """This with the codes and values of a rearranged array."""
        fields = {f.name: getattr(q, f.name) for f in dataclasses.fields(QTensor)}
        return dataclasses.replace(self, **fields, values=values)


def is_fake_quant(x: Any) -> TypeGuard[FakeQuantTensor]:
    """Whether `x` is a `FakeQuantTensor`."""
    return isinstance(x, FakeQuantTensor)
