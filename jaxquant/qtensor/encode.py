"""Encodes float arrays into `QTensor`s without checks, with computed or given scales."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.numerics import decode
from jaxquant.qtensor.granularity import PerBlock, PerChannel, PerGroup
from jaxquant.qtensor.laid import Laid, laid
from jaxquant.qtensor.nested import nest
from jaxquant.qtensor.qspec import QSpec
from jaxquant.qtensor.scales import scaled_codes, scales_over
from jaxquant.qtensor.storage import storage_scale, unblocked
from jaxquant.qtensor.tensor import QTensor


@functools.partial(jax.jit, static_argnames=("spec", "storage_last_axes", "batch_axes"))
def encode_stacked(
    w: Array,
    spec: QSpec,
    *,
    key: Array | None = None,
    storage_last_axes: tuple[int, ...] = (),
    batch_axes: int = 0,
) -> QTensor:
    """`quantize` without its checks, jitted: for arrays that may be non-finite."""
    if not batch_axes:
        return _encode(w, key, spec, storage_last_axes)
    rows = w.reshape(-1, *w.shape[batch_axes:])
    keys = None if key is None else jax.random.split(key, rows.shape[0])
    stacked = jax.vmap(lambda row, k: _encode(row, k, spec, storage_last_axes))(rows, keys)
    return jax.tree.map(lambda a: a.reshape(w.shape[:batch_axes] + a.shape[1:]), stacked)


def encode_array(
    w: Array, spec: QSpec, *, key: Array | None = None, storage_last_axes: tuple[int, ...] = ()
) -> QTensor:
    """`quantize` without its checks: for activations, which may be non-finite."""
    return _encode(w, key, spec, storage_last_axes)


def _encode(
    w: Array, key: Array | None, spec: QSpec, storage_last_axes: tuple[int, ...]
) -> QTensor:
    how = laid(storage_layout(w.shape, spec, storage_last_axes, w.dtype.name))
    return _encoded(how, how.lay(w), key)[0]


def _encoded(
    how: Laid, x: Array, key: Array | None, amax: Array | None = None
) -> tuple[QTensor, Array]:
    """The QTensor of `x` as `Laid.lay` returns it, and its codes in the layout of `x`.

    `amax` as for `scales_over`.
    """
    spec = how.blank.spec
    scales = scales_over(x, how.inner, spec, amax)
    # computed once: XLA may round a scale differently in each fusion that recomputes it
    scale, zero, global_scale = scales if amax is None else lax.optimization_barrier(scales)
    q, codes = _filled(how, x, scale, zero, global_scale, key, reused=amax is not None)
    if spec.format.is_codebook and not spec.double and spec.scale_dtype == "float32":
        # codebook blocks of zeros have scale 0, as in bitsandbytes
        q = dataclasses.replace(q, scale=jnp.where(how.empty(x), 0.0, q.scale))
    return q, codes


def encode_measured(
    w: Array,
    spec: QSpec,
    *,
    key: Array | None = None,
    storage_last_axes: tuple[int, ...] = (),
    batch_axes: int = 0,
) -> tuple[QTensor, Array, Array]:
    """`encode_stacked`, with the sums of squared errors and values: `sum (w - r)^2`, `sum w^2`.

    Both sums are in units of the square of the largest magnitude rounded down to a power of two,
    so that neither overflows; only their quotient is meaningful. Where `w` is not finite, all
    scales of its core array are NaN, and so are both sums.

    >>> q, error, signal = encode_measured(
    ...     jnp.array([4.0, 2.0, 0.0]), QSpec("int2", PerChannel(()), range="qmax")
    ... )
    >>> q.scale.tolist(), error.tolist(), signal.tolist()
    ([4.0], 0.25, 1.25)
    """
    q, error, signal = _measured_arrays(w, key, spec, storage_last_axes, batch_axes)
    how = laid(storage_layout(w.shape[batch_axes:], spec, storage_last_axes, w.dtype.name))
    if how.moved:
        # jitted separately: fused with other uses of the codes it takes four times as long on a CPU
        order = (*range(batch_axes), *(batch_axes + a for a in how.order))
        q = dataclasses.replace(q, codes=_transposed(q.codes, order))
    return q, error, signal


_transposed = jax.jit(jnp.transpose, static_argnums=1)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _measured_arrays(
    w: Array, key: Array | None, spec: QSpec, storage_last_axes: tuple[int, ...], batch_axes: int
) -> tuple[QTensor, Array, Array]:
    """`encode_measured` with the axes of the codes in the order of `w`."""
    if not batch_axes:
        return _measured(w, key, spec, storage_last_axes)[:3]
    rows = w.reshape(-1, *w.shape[batch_axes:])
    keys = None if key is None else jax.random.split(key, rows.shape[0])
    stacked, error, signal, shrink = jax.vmap(
        lambda row, k: _measured(row, k, spec, storage_last_axes)
    )(rows, keys)
    q = jax.tree.map(lambda a: a.reshape(w.shape[:batch_axes] + a.shape[1:]), stacked)
    share = jnp.square(jnp.min(shrink, initial=jnp.inf) / shrink)
    return q, jnp.sum(error * share), jnp.sum(signal * share)


def _measured(
    w: Array, key: Array | None, spec: QSpec, storage_last_axes: tuple[int, ...]
) -> tuple[QTensor, Array, Array, Array]:
    """A QTensor, the sums, and their unit's inverse, in as few passes over the array as possible.

    NaN is detected in the sums: a maximum that propagates NaN takes twice as long on a CPU.
    """
    how = laid(storage_layout(w.shape, spec, storage_last_axes, w.dtype.name))
    x = how.lay(w)
    # axes of size 1 prevent vectorisation
    ones = tuple(a for a, n in enumerate(x.shape) if n == 1)
    inner = tuple(a - sum(o < a for o in ones) for a in how.inner if a not in ones)
    bare = jnp.squeeze(x, ones)
    amax = jnp.max(jnp.abs(bare), axis=inner, keepdims=True, initial=0.0)
    amax = jnp.expand_dims(amax, ones)
    q, codes = _encoded(how, x, key, amax)
    shrink = _inverse_power(jnp.max(amax, initial=0.0))
    codes, scale = (jnp.squeeze(a, ones) for a in (codes, how.meet(storage_scale(q))))
    values = decode(codes, spec.format, jnp.float32)
    if q.zero_point is not None:
        values = values - jnp.squeeze(how.meet(q.zero_point.astype(jnp.float32)), ones)
    # one vector for each use: XLA materializes a full array of a scalar, or of a vector with two
    # uses, that is combined with an array in a sum
    vector = jnp.broadcast_to(shrink, (1,) * (bare.ndim - 1) + bare.shape[-1:])
    first, second, third = lax.optimization_barrier((vector,) * 3)
    # the power of two is multiplied last, or a fused multiply-add reports an error where none is
    error = bare * first - (values * scale) * second
    if how.own.padded != how.own.storage:  # padding does not count, and may not decode to 0
        stored = tuple(slice(n) for n in how.own.storage)
        error = unblocked(how.own, jnp.expand_dims(error, ones))[stored]
    signal = jnp.sum(jnp.square(bare * third))
    fine = jnp.isfinite(signal)
    lost = q.scale if q.nested is not None else jnp.asarray(jnp.nan, q.scale.dtype)
    q = dataclasses.replace(q, scale=jnp.where(fine, q.scale, lost))
    total = jnp.sum(error * error)
    return q, jnp.where(fine, total, jnp.nan), jnp.where(fine, signal, jnp.nan), shrink


def _inverse_power(peak: Array) -> Array:
    """`2^-floor(log2(peak))`, from the exponent bits: a product with it is exact.

    With an `exp2` that is off by an ulp, a codebook value that is restored exactly would count as
    an error.
    """
    exponent = lax.bitcast_convert_type(peak, jnp.int32) >> 23
    return lax.bitcast_convert_type(jnp.clip(254 - exponent, 1, 253) << 23, jnp.float32)


def encode_given(
    w: Array,
    scale: Array,
    zero_point: Array | None,
    global_scale: Array | None,
    spec: QSpec,
    *,
    storage_last_axes: tuple[int, ...] = (),
) -> QTensor:
    """Codes of an array on given scales: `q = clip(round(w / S) + Z)`.

    Args:
      w: float array `[*core]`, which may be non-finite.
      scale: `[*groups]`, in the spec's `scale_dtype`, none of them zero or subnormal.
      zero_point: `[*groups]` float32, integral; `None` for a symmetric spec.
      global_scale: `[]` float32; `None` where the spec has none.
      spec: format and granularity, axes named.
      storage_last_axes: axes to store last, as for `quantize`.

    >>> q = encode_given(
    ...     jnp.array([0.4, 3.0]), jnp.ones(1), None, None, QSpec("int8", PerChannel(()))
    ... )
    >>> q.codes.tolist()
    [0, 3]
    """
    blank = storage_layout(w.shape, spec, storage_last_axes, w.dtype.name)
    how = laid(blank)
    zero = None if zero_point is None else how.meet(zero_point)
    return _filled(how, how.lay(w), how.meet(scale), zero, global_scale, None)[0]


def encode_products(w: Array, spec: QSpec, *, storage_last_axes: tuple[int, ...] = ()) -> QTensor:
    """Codes by multiplication, `q = round(w (qmax / max |w|))`: symmetric integers, `range="qmax"`.

    >>> q = encode_products(jnp.array([-1.0, 127.0]), QSpec("int8", PerChannel(()), range="qmax"))
    >>> q.codes.tolist(), q.scale.tolist()
    ([-1, 127], [1.0])
    """
    how = laid(storage_layout(w.shape, spec, storage_last_axes, w.dtype.name))
    x = how.lay(w)
    scale, _, _ = scales_over(x, how.inner, spec)
    amax = jnp.max(jnp.abs(x), axis=how.inner, keepdims=True, initial=0.0)
    # for a smaller `amax`, `qmax / amax` overflows and the scale is subnormal or nearly so
    some = amax > spec.format.qmax * float(jnp.finfo(jnp.float32).tiny)
    x = jnp.where(some, x * (spec.format.qmax / jnp.where(some, amax, 1.0)), x / scale)
    q, _ = _filled(how, x, jnp.ones_like(scale), None, None, None)
    return dataclasses.replace(q, scale=how.groups(scale))


def storage_layout(
    shape: tuple[int, ...], spec: QSpec, storage_last_axes: tuple[int, ...], dtype: str
) -> QTensor:
    """How an array of `shape` is stored: a `QTensor` without batch axes whose leaves are `None`.

    >>> storage_layout((6, 3), QSpec("int8", PerGroup(4, axis=0)), (), "float32").groups
    (3, 2)
    """
    placed = spec.resolve(shape, storage_last_axes)
    none: Any = None
    return QTensor(
        codes=none,
        scale=none,
        zero_point=None,
        codebook=None,
        global_scale=None,
        spec=_negative_axes(spec, len(shape)),
        core=shape,
        axes=placed.axes,
        blocks=placed.blocks,
        dtype=dtype,
    )


def _filled(
    how: Laid,
    x: Array,
    scale: Array,
    zero: Array | None,
    global_scale: Array | None,
    key: Array | None,
    reused: bool = False,
) -> tuple[QTensor, Array]:
    """The QTensor of `x`, and its codes in the layout of `x`; `scale` and `zero` broadcast to `x`.

    With `reused`, the caller uses the codes too, and a barrier keeps XLA from encoding again for
    each use. The stored codes then keep the axis order of `x`.
    """
    blank, fmt = how.blank, how.blank.spec.format
    effective = scale.astype(jnp.float32)
    if global_scale is not None:
        effective = effective * global_scale
    codes = scaled_codes(x, effective, zero, fmt, key=key, divide=how.cut_short())
    codes = lax.optimization_barrier(codes) if reused else codes
    scale, nested = how.groups(scale), None
    if blank.spec.double:
        # scales of blocks of zeros are arbitrary, and would shift the mean
        scale, nested = nest(jnp.where(how.empty(x), 0.0, scale))
    zero_dtype = blank.spec.zero_dtype or fmt.storage
    q = dataclasses.replace(
        blank,
        codes=how.packed(codes) if reused else how.codes(codes),
        scale=scale,
        zero_point=None if zero is None else how.groups(zero).astype(zero_dtype),
        global_scale=global_scale,
        nested=nested,
    )
    return q, codes


def _negative_axes(spec: QSpec, ndim: int) -> QSpec:
    """The spec with negative axes, which the static data of a `QTensor` need."""

    def neg(axes: int | Sequence[int] | None) -> tuple[int, ...]:
        axes = (axes,) if isinstance(axes, int) else tuple(axes or ())
        return tuple(a % ndim - ndim for a in axes)

    gran = spec.granularity
    if isinstance(gran, PerChannel):
        gran = PerChannel(neg(gran.axes), gran.size)
    elif isinstance(gran, PerGroup):
        gran = PerGroup(gran.size, neg(gran.axis))
    elif isinstance(gran, PerBlock) and gran.axes is not None:
        rows, cols = neg(gran.axes)
        gran = PerBlock(gran.rows, gran.cols, (rows, cols))
    return dataclasses.replace(spec, granularity=gran)
