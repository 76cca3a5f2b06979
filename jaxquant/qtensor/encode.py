"""The arrays of a `QTensor` from a float array, unchecked: laid out, on scales found or given."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.numerics import pack
from jaxquant.qtensor.nested import nest
from jaxquant.qtensor.scales import scaled_codes, scales_over
from jaxquant.qtensor.storage import blocked, spread, to_storage
from jaxquant.qtensor.tensor import QTensor
from jaxquant.spec import PerBlock, PerChannel, PerGroup, QSpec


@functools.partial(jax.jit, static_argnames=("spec", "minor", "batch_axes"))
def encode_stacked(
    w: Array,
    spec: QSpec,
    *,
    key: Array | None = None,
    minor: tuple[int, ...] = (),
    batch_axes: int = 0,
) -> QTensor:
    """`quantize` without its checks, compiled as it is: for arrays that may be non-finite."""
    if not batch_axes:
        return _encode(w, key, spec, minor)
    rows = w.reshape(-1, *w.shape[batch_axes:])
    keys = None if key is None else jax.random.split(key, rows.shape[0])
    stacked = jax.vmap(lambda row, k: _encode(row, k, spec, minor))(rows, keys)
    return jax.tree.map(lambda a: a.reshape(w.shape[:batch_axes] + a.shape[1:]), stacked)


def encode_array(
    w: Array, spec: QSpec, *, key: Array | None = None, minor: tuple[int, ...] = ()
) -> QTensor:
    """`quantize` without its checks: for activations, which may be non-finite."""
    return _encode(w, key, spec, minor)


def _encode(w: Array, key: Array | None, spec: QSpec, minor: tuple[int, ...]) -> QTensor:
    blank = storage_layout(w.shape, spec, minor, w.dtype.name)
    x, inner = _shared(blank, w)
    scale, zero, global_scale = scales_over(x, inner, spec)
    q = _filled(blank, x, scale, zero, global_scale, key)
    if not spec.format.is_codebook or spec.double or spec.scale_dtype != "float32":
        return q
    # of a codebook, blocks of zeros have scale 0, as bitsandbytes stores them
    return dataclasses.replace(q, scale=jnp.where(_empty(blank, x), 0.0, q.scale))


def encode_given(
    w: Array,
    scale: Array,
    zero_point: Array | None,
    global_scale: Array | None,
    spec: QSpec,
    *,
    minor: tuple[int, ...] = (),
) -> QTensor:
    """Codes of an array on given scales: `q = clip(round(w / S) + Z)`.

    Args:
      w: float array `[*core]`, of any values.
      scale: `[*groups]`, in the spec's dtype for scales, none of them zero or subnormal.
      zero_point: `[*groups]` float32, integral; `None` for a symmetric spec.
      global_scale: `[]` float32; `None` where the spec has none.
      spec: format and granularity, axes named.
      minor: axes to store last, as for `quantize`.

    >>> q = encode_given(
    ...     jnp.array([0.4, 3.0]), jnp.ones(1), None, None, QSpec("int8", PerChannel(()))
    ... )
    >>> q.codes.tolist()
    [0, 3]
    """
    blank = storage_layout(w.shape, spec, minor, w.dtype.name)
    x, _ = _shared(blank, w)
    zero = None if zero_point is None else _meeting(blank, zero_point)
    return _filled(blank, x, _meeting(blank, scale), zero, global_scale, None)


def encode_products(w: Array, spec: QSpec, *, minor: tuple[int, ...] = ()) -> QTensor:
    """Codes by products, `q = round(w (qmax / max |w|))`: symmetric integers, `range="qmax"`.

    >>> q = encode_products(jnp.array([-1.0, 127.0]), QSpec("int8", PerChannel(()), range="qmax"))
    >>> q.codes.tolist(), q.scale.tolist()
    ([-1, 127], [1.0])
    """
    blank = storage_layout(w.shape, spec, minor, w.dtype.name)
    x, inner = _shared(blank, w)
    scale, _, _ = scales_over(x, inner, spec)
    amax = jnp.max(jnp.abs(x), axis=inner, keepdims=True, initial=0.0)
    # below this `qmax / amax` overflows, and the scale is subnormal or nearly so
    some = amax > spec.format.qmax * float(jnp.finfo(jnp.float32).tiny)
    x = jnp.where(some, x * (spec.format.qmax / jnp.where(some, amax, 1.0)), x / scale)
    q = _filled(blank, x, jnp.ones_like(scale), None, None, None)
    order = _own_order(blank)
    scale = scale if order is None else jnp.transpose(scale, order)
    return dataclasses.replace(q, scale=scale.reshape(blank.groups))


def storage_layout(
    shape: tuple[int, ...], spec: QSpec, minor: tuple[int, ...], dtype: str
) -> QTensor:
    """How an array of `shape` is stored: a `QTensor` without batch axes that holds no arrays.

    >>> storage_layout((6, 3), QSpec("int8", PerGroup(4, axis=0)), (), "float32").groups
    (3, 2)
    """
    placed = spec.resolve(shape, minor)
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


def _shared(blank: QTensor, w: Array) -> tuple[Array, tuple[int, ...]]:
    """The array in float32, laid out so that a scale is shared over whole axes; and those axes."""
    order = _own_order(blank)
    if order is None:
        return blocked(blank, to_storage(blank, w.astype(jnp.float32))), _inner(blank)
    return w.astype(jnp.float32), _inner(blank)


def _inner(blank: QTensor) -> tuple[int, ...]:
    """The axes that scales are shared over, of an array laid out by `_shared`."""
    order = _own_order(blank)
    if order is None:
        return tuple(range(1, 2 * len(blank.axes), 2))
    whole = (a for a, g, n in zip(order, blank.groups, blank.storage, strict=True) if g < n)
    return tuple(sorted(whole))


def _own_order(blank: QTensor) -> list[int] | None:
    """Where each storage axis lies in the array, if scales belong to whole axes of that; or `None`.

    The array is then quantized as it lies, and its codes are transposed: XLA's loops over an array
    that is transposed and split in blocks take ten times as long on a CPU (2048 x 2048, JAX 0.12:
    scales along columns 2.6 ms and 24 ms, transposed 4.0 ms and 46 ms).
    """
    one = all(len(merged) == 1 for merged in blank.axes)
    whole = all(
        g in (1, n) and n == p
        for g, n, p in zip(blank.groups, blank.storage, blank.padded, strict=True)
    )
    rank = len(blank.core)
    return [merged[0] + rank for merged in blank.axes] if one and whole else None


def _meeting(blank: QTensor, s: Array) -> Array:
    """`[*groups]` laid out to broadcast with the array as `_shared` lays it out."""
    order = _own_order(blank)
    if order is None:
        return spread(blank, s)
    return jnp.transpose(s, [order.index(a) for a in range(s.ndim)])


def _filled(
    blank: QTensor,
    x: Array,
    scale: Array,
    zero: Array | None,
    global_scale: Array | None,
    key: Array | None,
) -> QTensor:
    """The codes of `x`, laid out by `_shared`; `scale` and `zero` broadcast with it."""
    fmt, order = blank.spec.format, _own_order(blank)
    effective = scale.astype(jnp.float32)
    if global_scale is not None:
        effective = effective * global_scale
    codes = scaled_codes(x, effective, zero, fmt, key=key, divide=_cut_short(blank, order))

    def stored(a: Array, shape: tuple[int, ...]) -> Array:
        return (a if order is None else jnp.transpose(a, order)).reshape(shape)

    if order is not None and order != sorted(order):
        codes = lax.optimization_barrier(codes)  # or the loop above would run transposed after all
    codes = stored(codes, blank.padded)
    if fmt.packed:
        codes = pack(codes, fmt.bits)
    scale, nested = stored(scale, blank.groups), None
    if blank.spec.double:
        # scales of what is zero say nothing, and would be seen in the mean
        scale, nested = nest(jnp.where(_empty(blank, x), 0.0, scale))
    zero_dtype = blank.spec.zero_dtype or fmt.storage
    return dataclasses.replace(
        blank,
        codes=codes,
        scale=scale,
        zero_point=None if zero is None else stored(zero, blank.groups).astype(zero_dtype),
        global_scale=global_scale,
        nested=nested,
    )


def _empty(blank: QTensor, x: Array) -> Array:
    """Which blocks of `x`, laid out by `_shared`, are zero throughout: `[*groups]`."""
    empty = jnp.max(jnp.abs(x), axis=_inner(blank), keepdims=True, initial=0.0) == 0
    order = _own_order(blank)
    return (empty if order is None else jnp.transpose(empty, order)).reshape(blank.groups)


def _cut_short(blank: QTensor, order: list[int] | None) -> Array | None:
    """Which blocks are padded, laid out as by `_shared`; `None` where none is."""
    if order is not None or blank.padded == blank.storage:
        return None
    out = jnp.zeros((1,) * (2 * len(blank.axes)), bool)
    for s, (have, want) in enumerate(zip(blank.padded, blank.storage, strict=True)):
        if have != want:
            last = jnp.arange(blank.groups[s]) == blank.groups[s] - 1
            out = out | jnp.expand_dims(last, [i for i in range(out.ndim) if i != 2 * s])
    return out


def _negative_axes(spec: QSpec, ndim: int) -> QSpec:
    """The spec with axes counted from the end, as static data of a `QTensor` must be."""

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
