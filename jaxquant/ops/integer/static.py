"""Contractions with calibrated activations: int32 sums, with precomputed zero-point terms."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.ops import lowering
from jaxquant.ops.activations import has_zero
from jaxquant.ops.contract import integer_sums
from jaxquant.ops.convolve import Conv, window_sum_int32
from jaxquant.ops.operands import Placement, arranged, int8_codes, integer_range, place, weight
from jaxquant.qtensor import (
    ContractionConfig,
    QTensor,
    QuantParams,
    from_storage,
    storage_codes,
    storage_scale,
    storage_values,
)

Lay = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Sums:
    """Integer sums of a contraction, and the layout of vectors over its channels.

    Attributes:
      total: int32 `sum q_x (q_w - Z_w)`, in the axes of the result.
      lay: expands `[*kept]`, the weight's kept axes in order, to broadcast with `total`.
      channels: axes of the result that come from the weight, ascending.
    """

    total: Array
    lay: Lay
    channels: tuple[int, ...]


def plain_place(q: QTensor, contracted: Sequence[int]) -> Placement | None:
    """The placement of `q`, if sums over `contracted` have one scale for each kept channel.

    `None` for groups along contracted axes, padding, codes that are not integers of at most 8
    bits, and a storage axis that merges kept and contracted axes.
    """
    at = place(q, contracted, ())
    if at is None or at.split or at.varies or at.padded != at.size or 0 in q.shape:
        return None
    if q.codebook is not None or not q.spec.format.is_integer:
        return None
    if q.spec.zero_dtype is not None:  # float zero points
        return None
    return at if integer_range(q.spec.format) is not None else None


def kept_vector(q: QTensor, at: Placement, a: Array) -> Array:
    """An array of storage rank, size 1 along contracted axes, as `[*kept]`, axes ascending.

    Scales shared along kept axes are repeated.
    """
    for s in at.keep:
        a = _spread(a, s, at.size[s])
    axes = [m for s in at.keep for m in at.members[s]]
    a = lax.squeeze(a, at.contract).reshape([q.shape[m] for m in axes])
    return jnp.transpose(a, [axes.index(m) for m in sorted(axes)])


def _spread(a: Array, axis: int, size: int) -> Array:
    """Repeats one value per group for each index."""
    if a.shape[axis] == size:
        return a
    return jnp.repeat(a, size // a.shape[axis], axis=axis, total_repeat_length=size)


def zero_offset(q: QTensor, contracted: Sequence[int], zero_point: Array) -> Array | None:
    """`-Z_x sum_k (q_w - Z_w)`, int32 `[*kept]`; `None` where `plain_place` is.

    >>> import jaxquant as jq
    >>> spec = jq.QSpec("int8", jq.PerTensor(), range="qmax")
    >>> q = jq.quantize(jnp.array([[3.0], [-127.0]]), spec)
    >>> zero_offset(q, (0,), jnp.int32(-128)).tolist()
    [-15872]
    """
    at = plain_place(q, contracted)
    if at is None:
        return None
    codes, zero = _codes(q, at)
    codes = codes.astype(jnp.int32)
    codes = codes if zero is None else codes - zero
    sums = jnp.sum(codes, axis=at.contract, keepdims=True, dtype=jnp.int32)
    return -zero_point * kept_vector(q, at, sums)


def with_fine_scales(q: QTensor, contracted: Sequence[int]) -> QTensor:
    """The tensor, with its smallest scale for channels whose values are all zero.

    They allow any scale, and biases are rounded to multiples of it.
    """
    at = place(q, [a + len(q.batch) for a in contracted], ())
    if at is None or q.nested is not None or q.scale.ndim != len(q.padded) + len(q.batch):
        return q
    if q.scale.shape != tuple(1 if s in at.contract else n for s, n in enumerate(at.padded)):
        return q
    bare = dataclasses.replace(
        q, calibration=None, contraction=ContractionConfig()
    )  # equal layers compile once
    return dataclasses.replace(q, scale=_fine_scales(bare, at.contract))


@functools.partial(jax.jit, static_argnums=1)
def _fine_scales(q: QTensor, contract: tuple[int, ...]) -> Array:
    zero = jnp.all(storage_values(q) == 0, axis=contract, keepdims=True)
    tail = tuple(range(len(q.batch), zero.ndim))
    least = jnp.min(jnp.where(zero, jnp.inf, q.scale), axis=tail, keepdims=True)
    return jnp.where(zero & jnp.isfinite(least), least, q.scale).astype(q.scale.dtype)


def _codes(q: QTensor, at: Placement) -> tuple[Array, Array | None]:
    """Storage codes as int8, and their zero point: one for all, or one for each kept index."""
    codes, shift = int8_codes(storage_codes(q), q.spec.format)
    if q.zero_point is None:
        return codes, jnp.full((1,) * codes.ndim, -shift, jnp.int32) if shift else None
    zero = q.zero_point.astype(jnp.int32) - shift
    for s in at.keep:
        zero = zero if zero.shape[s] == 1 else _spread(zero, s, at.size[s])
    return codes, zero


def dot_sums(
    codes: Array,
    q: QTensor,
    over: tuple[Sequence[int], Sequence[int]],
    flipped: bool,
    spare: int = 0,
) -> Sums | None:
    """Sums of int8 `codes` times a QTensor over `over`, axes of the codes and of the QTensor.

    `flipped`: the QTensor is the left operand; `spare`: the largest magnitude that is added to the
    sums later. `None` if the form has no integer sums, or an int32 may not hold them.
    """
    x_over, w_over = over
    at = plain_place(q, w_over)
    if at is None or not lowering.fits_int32(_terms(at), True, _has_zero(q), spare):
        return None
    x = arranged(codes, x_over, (), at, w_over)
    values, zero = _codes(q, at)
    w = dataclasses.replace(weight(q, at, values), scale=None, zero=zero)
    total = integer_sums(x, w)
    free = len(x.free)
    axes = [m for s in at.keep for m in at.members[s]]
    if len(axes) != len(at.keep):
        total = total.reshape(*total.shape[:free], *(q.shape[m] for m in axes))
    kept = [free + axes.index(m) for m in sorted(axes)]
    rows = list(range(free))
    total = jnp.transpose(total, kept + rows if flipped else rows + kept)
    channels = tuple(range(len(kept)) if flipped else range(free, free + len(kept)))
    others = [a for a in range(total.ndim) if a not in channels]
    return Sums(total, lambda a: lax.expand_dims(a, others), channels)


def conv_sums(
    conv: Conv, codes: Array, zero_point: Array | None, q: QTensor, spare: int = 0
) -> Sums | None:
    """Sums of a convolution of int8 `codes`; padding is filled with the zero point of `codes`."""
    spec = conv.numbers.rhs_spec
    at = plain_place(q, spec[1:])
    if at is None or conv.batch_groups != 1 or len(at.keep) != 1:
        return None
    if not lowering.fits_int32(_terms(at), True, _has_zero(q), spare):
        return None
    values, zero = _codes(q, at)
    values = from_storage(q, values)
    total, windows = window_sum_int32(conv, codes, values, zero_point, zero is not None)
    if zero is not None and windows is not None:
        channel_zero = jnp.ravel(kept_vector(q, at, zero)).astype(jnp.int32)
        total = total - conv.per_channel(channel_zero) * windows
    return Sums(total, conv.per_channel, (conv.numbers.out_spec[1],))


def dot_static(
    codes: Array,
    q: QTensor,
    grid: QuantParams,
    over: tuple[Sequence[int], Sequence[int]],
    flipped: bool,
) -> Array | None:
    """`S_x S_w sum (q_x - Z_x)(q_w - Z_w)`, float32, by vectors over channels."""
    sums = dot_sums(codes, q, over, flipped)
    return None if sums is None else _scaled(sums, q, grid, over[1])


def conv_static(conv: Conv, codes: Array, q: QTensor, grid: QuantParams) -> Array | None:
    """`dot_static` of a convolution."""
    sums = conv_sums(conv, codes, grid.zero_point, q)
    return None if sums is None else _scaled(sums, q, grid, conv.numbers.rhs_spec[1:])


def _scaled(sums: Sums, q: QTensor, grid: QuantParams, contracted: Sequence[int]) -> Array:
    scale, offset = sum_scale(q, grid, contracted), sum_offset(q, grid, contracted)
    total = sums.total if offset is None else sums.total + sums.lay(offset)
    return total.astype(jnp.float32) * sums.lay(scale)


def sum_scale(q: QTensor, grid: QuantParams, contracted: Sequence[int]) -> Array:
    """`S_x S_w` for each channel, `[*kept]`."""
    at = plain_place(q, contracted)
    assert at is not None
    return kept_vector(q, at, storage_scale(q)) * grid.scale


def sum_offset(q: QTensor, grid: QuantParams, contracted: Sequence[int]) -> Array | None:
    """The term of the activation's zero point in the sums, precomputed if calibration did so."""
    if grid.zero_point is None:
        return None
    offset = None if q.calibration is None else q.calibration.offset
    return zero_offset(q, contracted, grid.zero_point) if offset is None else offset


def _terms(at: Placement) -> int:
    total = 1
    for s in at.contract:
        total *= at.size[s]
    return total


def _has_zero(q: QTensor) -> bool:
    return q.zero_point is not None or has_zero(q.spec)
