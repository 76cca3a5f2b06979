"""`lax.ragged_dot_general` with a QTensor of experts on the right."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxquant.ops import lowering
from jaxquant.ops.activations import fake, has_zero, quantize_activation, shared_axes
from jaxquant.ops.backward import straight_through
from jaxquant.ops.dot_general import FROM_TENSOR
from jaxquant.ops.operands import Placement, int8_codes, integer_range, place, result_dtype
from jaxquant.qtensor import (
    QSpec,
    QTensor,
    dequantize,
    storage_codes,
    storage_scale,
    storage_values,
)


def ragged_dot_general(
    lhs: Array,
    rhs: QTensor,
    group_sizes: Array,
    ragged_dot_dimension_numbers: lax.RaggedDotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    group_offset: Array | None = None,
    *,
    out_sharding: Any = None,
    activations: QSpec | None = FROM_TENSOR,
) -> Array:
    """`lax.ragged_dot_general` of float rows and a QTensor, one matrix for each expert.

    `y[m, :] = s_x[m] s_w[e(m), :] sum_k q_x[m, k] q_w[e(m), k, :]`, `lhs` `[m, k]`, `rhs`
    `[experts, k, n]`, int8 x int8 -> int32, or in float with `activations=None`. `rhs` is
    dequantized first for a ragged contracting or batch dimension, scales that vary along `k`, zero
    points, a `group_offset` and an `out_sharding`.

    Raises:
      TypeError: `rhs` is differentiated.

    Source: Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts" (2022).

    >>> import jax, jaxquant as jq
    >>> w = jax.random.normal(jax.random.key(0), (2, 4, 3))
    >>> q = jq.quantize(w, jq.QSpec("int8", jq.PerChannel((0, 2))))
    >>> numbers = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
    >>> ragged_dot_general(jnp.ones((5, 4)), q, jnp.array([2, 3]), numbers).shape
    (5, 3)
    """
    numbers = ragged_dot_dimension_numbers
    spec = rhs.contraction.activations if activations is FROM_TENSOR else activations
    ((xc, wc), (xb, _)) = numbers.dot_dimension_numbers
    ragged, group = tuple(numbers.lhs_ragged_dimensions), tuple(numbers.rhs_group_dimensions)

    def reference(x: Array, w: Array) -> Array:
        return lax.ragged_dot_general(
            x, w, group_sizes, numbers, precision, preferred_element_type, group_offset,
            out_sharding=out_sharding,
        )  # fmt: skip

    def forward(x: Array, q: QTensor) -> Array:
        plain = ragged == group == (0,) and tuple(xc) == (1,) and not xb and x.ndim == 2
        at = place(q, tuple(wc), group) if plain and q.ndim == 3 else None
        if at is None or group_offset is not None or out_sharding is not None or not _simple(q, at):
            if spec is not None:
                x = fake(x, spec, xc)
            return reference(x, dequantize(q))
        return _forward(x, q, at, group_sizes, spec, precision, preferred_element_type)

    return straight_through(forward, reference)(lhs, rhs)


def _simple(q: QTensor, at: Placement) -> bool:
    """Whether scales are shared along `k`, with no zero point and no padding."""
    unpadded = all(at.padded[s] == at.size[s] for s in range(len(at.size)))
    shared = all(at.groups[s] == 1 for s in at.contract) and len(at.contract) == len(at.keep) == 1
    blocks = all(at.groups[s] == 1 or at.block(s) == 1 for s in range(len(at.size)))
    return unpadded and shared and blocks and q.zero_point is None and 0 not in q.shape


def _same_kind(q: QTensor, spec: QSpec, at: Placement) -> bool:
    """Whether both have symmetric codes, activations integers, and an int32 holds their sums."""
    symmetric = not has_zero(spec) and not has_zero(q.spec)
    integer = spec.format.is_integer and integer_range(spec.format) is not None
    rows = shared_axes(spec, (1,), 2) in ((1,), (0, 1))
    return (
        symmetric
        and integer
        and rows
        and lowering.fits_int32(at.size[at.contract[0]], False, False)
    )


def _forward(
    x: Array,
    q: QTensor,
    at: Placement,
    group_sizes: Array,
    spec: QSpec | None,
    precision: lax.PrecisionLike,
    preferred: DTypeLike | None,
) -> Array:
    fmt = q.spec.format
    limits = None if q.codebook is not None else integer_range(fmt)
    shared = None if spec is None else shared_axes(spec, (1,), 2)
    scale = storage_scale(q)
    numbers = lax.RaggedDotDimensionNumbers((((1,), at.contract), ((), ())), (0,), at.batch)
    integer = spec is not None and limits is not None and _same_kind(q, spec, at)
    if integer and spec is not None and limits is not None:
        codes, x_scale, _ = quantize_activation(x, spec, shared or ())
        values, _ = int8_codes(storage_codes(q), fmt)
        total = lax.ragged_dot_general(
            codes, values, group_sizes, numbers, preferred_element_type=jnp.int32
        ).astype(jnp.float32) * (limits[2] * x_scale)
    else:
        if spec is not None:
            x = fake(x, spec, (1,))
        total = lax.ragged_dot_general(
            x, storage_values(q).astype(x.dtype), group_sizes, numbers, precision, jnp.float32
        )
    # rows beyond the last group are zero, whatever their scale
    expert = jnp.sum(jnp.arange(x.shape[0])[:, None] >= jnp.cumsum(group_sizes)[None, :], axis=1)
    order = (*at.batch, *at.keep, *at.contract)
    columns = jnp.transpose(scale, order)[..., 0]
    columns = (
        columns[jnp.minimum(expert, columns.shape[0] - 1)] if columns.shape[0] > 1 else columns
    )
    return (total * columns).astype(result_dtype(x.dtype, q.dtype, preferred))
