"""`lax.dot_general` of two activations, both quantized at run time or on calibrated grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array, lax
from jax.typing import DTypeLike

from jaxquant.ops import lowering
from jaxquant.ops.activations import (
    fake,
    fake_on_grid,
    has_zero,
    on_grid,
    quantize_activation,
    shared_axes,
)
from jaxquant.ops.backward import straight_through_both
from jaxquant.ops.contract import contract
from jaxquant.ops.operands import Operand, integer_range, result_dtype
from jaxquant.ops.out_sharding import Sharding
from jaxquant.qtensor import QSpec, QuantParams


def dot_general_dynamic(
    lhs: Array,
    rhs: Array,
    dimension_numbers: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    lhs_spec: QSpec,
    rhs_spec: QSpec,
    lhs_grid: QuantParams | None = None,
    rhs_grid: QuantParams | None = None,
    out_sharding: Any = None,
) -> Array:
    """`lax.dot_general` of two float arrays, both quantized at run time.

    `y[m, n] = s_l[m] s_r[n] sum_k (q_l[m, k] - z_l[m]) (q_r[k, n] - z_r[n])`, int8 x int8 ->
    int32: attention scores and attention times values. Two specs of one float8 format are summed
    in float32; other pairs are rounded to their specs and contracted in float.

    Args:
      lhs: float array, any axes order.
      rhs: float array.
      dimension_numbers: as for `lax.dot_general`.
      precision: as for `lax.dot_general`; integers are summed exactly.
      preferred_element_type: dtype of the result.
      lhs_spec: `PerChannel()`, one scale for each row (non-contracted index), or `PerTensor()`;
        unsigned formats suit softmax outputs.
      rhs_spec: the same for `rhs`.
      lhs_grid: the calibrated grid of `lhs`, for a `PerTensor()` spec; by default its scale is
        computed at run time.
      rhs_grid: the same for `rhs`.
      out_sharding: sharding of the result, under an explicit mesh.

    Returns:
      `[batch, free of lhs, free of rhs]`. Gradients are those of the contraction with the other
      operand rounded. A row with a non-finite value gives NaN, except on a calibrated grid.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference" (2018), section 2.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> p, v = jnp.array([[0.25, 0.75]]), jnp.array([[4.0], [-8.0]])
    >>> u8, i8 = jq.QSpec("uint8", range="qmax"), jq.QSpec("int8", range="qmax")
    >>> y = dot_general_dynamic(p, v, (((1,), (0,)), ((), ())), lhs_spec=u8, rhs_spec=i8)
    >>> bool(abs(y[0, 0] + 5) < 0.05)
    True
    """
    (lc, rc), (lb, rb) = dimension_numbers
    numbers = ((tuple(lc), tuple(rc)), (tuple(lb), tuple(rb)))
    dtype = result_dtype(lhs.dtype, rhs.dtype, preferred_element_type)
    shared = shared_axes(lhs_spec, lc, lhs.ndim), shared_axes(rhs_spec, rc, rhs.ndim)

    def reference(a: Array, b: Array) -> Array:
        return lax.dot_general(
            a, b, numbers, precision, preferred_element_type, out_sharding=out_sharding
        )

    def codes(a: Array, b: Array) -> tuple[Operand, Operand]:
        return (
            _operand(a, lhs_spec, lhs_grid, shared[0] or (), lc, lb),
            _operand(b, rhs_spec, rhs_grid, shared[1] or (), rc, rb),
        )

    def product(a: Operand, b: Operand) -> Array:
        return contract(
            a, b, precision, Sharding.asked(out_sharding, len(a.batch), len(a.free), len(b.free))
        ).astype(dtype)

    def rounded(a: Array, b: Array) -> tuple[Array, Array]:
        return (
            fake(a, lhs_spec, lc) if lhs_grid is None else fake_on_grid(a, lhs_grid, lhs_spec),
            fake(b, rhs_spec, rc) if rhs_grid is None else fake_on_grid(b, rhs_grid, rhs_spec),
        )

    terms = [lhs.shape[a] for a in lc]
    total = math.prod(terms) if all(isinstance(n, int) for n in terms) else None
    empty = any(isinstance(n, int) and n == 0 for n in (*lhs.shape, *rhs.shape))
    on_codes = None not in shared and not empty and _same_kind(lhs_spec, rhs_spec, total)
    if on_codes:
        return straight_through_both(codes, product, reference)(lhs, rhs)
    return straight_through_both(rounded, reference, reference)(lhs, rhs)


def _same_kind(a: QSpec, b: QSpec, terms: int | None) -> bool:
    """Whether codes of both specs can be multiplied."""
    if a.format.is_float:
        return a.format == b.format and a.format.bits == 8
    integer = all(s.format.is_integer and integer_range(s.format) is not None for s in (a, b))
    return integer and lowering.fits_int32(terms, has_zero(a), has_zero(b))


def _operand(
    x: Array,
    spec: QSpec,
    grid: QuantParams | None,
    shared: Sequence[int],
    contract_: Sequence[int],
    batch: Sequence[int],
) -> Operand:
    """The codes of `x`, in the order of its axes."""
    if grid is None:
        values, scale, zero = quantize_activation(x, spec, shared)
    else:
        grid = jax.tree.map(lambda a: lax.expand_dims(a, range(x.ndim)), grid)
        values, scale, zero = on_grid(x, grid, spec), grid.scale, grid.zero_point
    free = tuple(a for a in range(x.ndim) if a not in contract_ and a not in batch)
    return Operand(values, scale, zero, tuple(batch), free, (), tuple(contract_))
