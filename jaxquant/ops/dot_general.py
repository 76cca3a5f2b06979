"""`lax.dot_general` where an operand may be a QTensor, or both are quantized at run time."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxquant.ops import lowering
from jaxquant.ops.activations import fake, quantize_activation, shared_axes
from jaxquant.ops.backward import straight_through
from jaxquant.ops.contract import contract, contract_limbs
from jaxquant.ops.operands import (
    Operand,
    Placement,
    align,
    arranged,
    int8_codes,
    integer_range,
    moving_scale,
    place,
    weight,
)
from jaxquant.qtensor import QTensor, dequantize, storage_codes, storage_values
from jaxquant.spec import QSpec

Axes = tuple[int, ...]
FROM_USE: Any = object()


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static part of one call, with `x` the float operand and `w` the quantized one."""

    x_contract: Axes
    w_contract: Axes
    x_batch: Axes
    w_batch: Axes
    flipped: bool  # whether `w` is the left operand
    precision: Any
    preferred: Any
    out_sharding: Any
    activations: QSpec | None

    def reference(self, x: Array, w: Array) -> Array:
        """The contraction in float."""
        a, b = (w, x) if self.flipped else (x, w)
        numbers = (
            ((self.w_contract, self.x_contract), (self.w_batch, self.x_batch))
            if self.flipped
            else ((self.x_contract, self.w_contract), (self.x_batch, self.w_batch))
        )
        return lax.dot_general(
            a,
            b,
            numbers,
            precision=self.precision,
            preferred_element_type=self.preferred,
            out_sharding=self.out_sharding,
        )


def dot_general(
    lhs: Array | QTensor,
    rhs: Array | QTensor,
    dimension_numbers: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    out_sharding: Any = None,
    activations: QSpec | None = FROM_USE,
) -> Array:
    """`lax.dot_general` of a float array and a QTensor, on either side."""
    (lc, rc), (lb, rb) = dimension_numbers
    if isinstance(lhs, QTensor) and isinstance(rhs, QTensor):
        # The smaller one becomes the activation.
        if lhs.size <= rhs.size:
            lhs = dequantize(lhs)
        else:
            rhs = dequantize(rhs)
    flipped = isinstance(lhs, QTensor)
    q, x = (lhs, rhs) if isinstance(lhs, QTensor) else (rhs, lhs)
    x = jnp.asarray(x)
    if not isinstance(q, QTensor):
        return lax.dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type,
            out_sharding=out_sharding,
        )  # fmt: skip
    (wc, xc), (wb, xb) = ((lc, rc), (lb, rb)) if flipped else ((rc, lc), (rb, lb))
    preferred = None if preferred_element_type is None else jnp.dtype(preferred_element_type)
    call = _Call(
        tuple(xc), tuple(wc), tuple(xb), tuple(wb), flipped, precision, preferred, out_sharding,
        q.use.activations if activations is FROM_USE else activations,
    )  # fmt: skip
    forward = functools.partial(_forward, call)
    return straight_through(forward, call.reference)(x, q)


def _forward(call: _Call, x: Array, q: QTensor) -> Array:
    at = place(q, call.w_contract, call.w_batch)
    if at is None or not _supported(call, x, q, at):
        return _dequantized(call, x, q)
    out = _product(call, x, q, at)
    if out is None:
        return _dequantized(call, x, q)
    return _finish(call, x, q, at, out)


def _supported(call: _Call, x: Array, q: QTensor, at: Placement) -> bool:
    """Whether the codes can be contracted as they lie."""
    empty = 0 in q.shape or any(isinstance(n, int) and n == 0 for n in x.shape)
    floats = x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
    # a scale for each contracted index must change sides
    moves = not at.varies or (at.uniform and q.zero_point is None)
    return floats and not empty and moves and q.spec.format.bits <= 8 and call.out_sharding is None


def _dequantized(call: _Call, x: Array, q: QTensor) -> Array:
    if call.activations is not None and jnp.issubdtype(x.dtype, jnp.floating):
        x = fake(x, call.activations, call.x_contract)
    return call.reference(x, dequantize(q))


def _product(call: _Call, x: Array, q: QTensor, at: Placement) -> Array | None:
    """`[batch, free of x, kept storage axes]` in float32."""
    spec, fmt = call.activations, q.spec.format
    limits = None if q.codebook is not None else integer_range(fmt)
    if spec is not None:
        shared = shared_axes(spec, call.x_contract, x.ndim)
        wanted = integer_range(spec.format) if spec.format.is_integer else None
        terms = math.prod(at.padded[s] for s in at.contract)
        fits = terms <= lowering.MAX_TERMS
        same_float = spec.format.is_float and fmt.storage == spec.format.storage != "uint8"
        rows = shared is not None and set(shared) in (set(call.x_contract), set(range(x.ndim)))
        if not (rows and fits and ((limits and wanted) or (same_float and fmt.is_float))):
            return _product(
                dataclasses.replace(call, activations=None),
                fake(x, spec, call.x_contract),
                q,
                at,
            )
        moved = _arranged(call, x, q, at)
        everything = set(shared or ()) == set(range(x.ndim))
        axes = tuple(range(moved.values.ndim)) if everything else (*moved.groups, *moved.inner)
        codes, scale, zero = quantize_activation(moved.values, spec, axes)
        left = dataclasses.replace(moved, values=codes, scale=scale, zero=zero)
        right = _int8(q, at) if limits else weight(q, at, storage_codes(q))
        return contract(left, right, call.precision)
    moved = _arranged(call, x, q, at)
    rows = lowering.static_size(moved.values.shape, (*moved.batch, *moved.free))
    if limits and lowering.limbs_win(rows):
        return lowering.by_platform(
            cpu=lambda: contract_limbs(moved, _int8(q, at)),
            default=lambda: contract(moved, _converted(q, at, x.dtype), call.precision),
        )
    return contract(moved, _converted(q, at, x.dtype), call.precision)


def _arranged(call: _Call, x: Array, q: QTensor, at: Placement) -> Operand:
    moved = arranged(x, call.x_contract, call.x_batch, at, call.w_contract)
    if not at.varies:
        return moved
    scale = moving_scale(q, at, len(moved.free))
    return dataclasses.replace(moved, values=moved.values.astype(jnp.float32) * scale)


def _int8(q: QTensor, at: Placement) -> Operand:
    fmt = q.spec.format
    limits = integer_range(fmt)
    assert limits is not None
    codes, shift = int8_codes(storage_codes(q), fmt)
    return weight(q, at, codes, limits[2], shift)


def _converted(q: QTensor, at: Placement, dtype: Any) -> Operand:
    """Values without their scale, exact in any of the float dtypes."""
    op = weight(q, at, storage_values(q).astype(dtype))
    return dataclasses.replace(op, zero=None)


def _finish(call: _Call, x: Array, q: QTensor, at: Placement, out: Array) -> Array:
    """Unpads and splits the kept storage axes, and puts all axes in the result's order."""
    lead = out.ndim - len(at.keep)
    for i, s in enumerate(at.keep):
        if at.padded[s] != at.size[s]:
            out = lax.slice_in_dim(out, 0, at.size[s], axis=lead + i)
    kept = [a for s in at.keep for a in at.members[s]]
    sizes = tuple(q.shape[a] for a in kept)
    if out.shape[lead:] != sizes:
        out = out.reshape(*out.shape[:lead], *sizes)
    nb = len(call.x_batch)
    tail = [lead + kept.index(a) for a in sorted(kept)]
    middle = list(range(nb, lead))
    order = [*range(nb), *(tail + middle if call.flipped else middle + tail)]
    return jnp.transpose(out, order).astype(_result_dtype(x.dtype, q.dtype, call.preferred))


def _result_dtype(x: Any, w: Any, preferred: Any) -> Any:
    return preferred if preferred is not None else jnp.promote_types(x, w)


def dot_general_dynamic(
    lhs: Array,
    rhs: Array,
    dimension_numbers: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    lhs_spec: QSpec,
    rhs_spec: QSpec,
    out_sharding: Any = None,
) -> Array:
    """`lax.dot_general` of two float arrays, both quantized at run time."""
    (lc, rc), _ = dimension_numbers
    return lax.dot_general(
        fake(lhs, lhs_spec, lc), fake(rhs, rhs_spec, rc), dimension_numbers, precision,
        preferred_element_type, out_sharding=out_sharding,
    )  # fmt: skip
