"""`lax.conv_general_dilated` where an operand may be a QTensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxquant.ops.activations import fake
from jaxquant.ops.backward import straight_through
from jaxquant.ops.dot_general import FROM_USE
from jaxquant.qtensor import QTensor, dequantize
from jaxquant.spec import QSpec


def conv_general_dilated(
    lhs: Array | QTensor,
    rhs: Array | QTensor,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    out_sharding: Any = None,
    activations: QSpec | None = FROM_USE,
) -> Array:
    """`lax.conv_general_dilated` of an image and a QTensor of kernels."""
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)

    def conv(a: Array, b: Array) -> Array:
        return lax.conv_general_dilated(
            a, b, window_strides, padding, lhs_dilation, rhs_dilation, numbers,
            feature_group_count, batch_group_count, precision, preferred_element_type,
        )  # fmt: skip

    if isinstance(lhs, QTensor):
        if isinstance(rhs, QTensor):
            rhs = dequantize(rhs)
        return straight_through(
            lambda x, q: conv(dequantize(q), x), lambda x, w: conv(w, x)
        )(rhs, lhs)
    spec = rhs.use.activations if activations is FROM_USE else activations

    def forward(x: Array, q: QTensor) -> Array:
        if spec is not None:
            x = fake(x, spec, numbers.lhs_spec[1:])
        return conv(x, dequantize(q))

    return straight_through(forward, conv)(lhs, rhs)
