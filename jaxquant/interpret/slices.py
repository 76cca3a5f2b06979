"""Slices, lookups, concatenation and broadcasts that keep a `QTensor` quantized, or `None`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.interpret.reshapes import (
    calibrated,
    opened,
    place_of,
    plain,
    plain_axes,
    promote,
    rebuilt,
    with_arrays,
    with_grouped_codebook,
)
from jaxquant.qtensor import QTensor, with_plain_scales


def broadcast(q: QTensor, shape: Sequence[int], dims: Sequence[int]) -> QTensor | None:
    """`broadcast_in_dim`; repeated values share their scale."""
    lead = len(q.batch)
    if tuple(dims[:lead]) != tuple(range(lead)) or tuple(shape[:lead]) != q.batch:
        promoted = promote(q)
        return None if promoted is None else _broadcast(promoted, shape, dims)
    return _broadcast(q, shape, dims)


def _broadcast(q: QTensor, shape: Sequence[int], dims: Sequence[int]) -> QTensor | None:
    flat, nb = plain(with_plain_scales(q)), len(q.batch)
    if flat is None:
        return None
    size, group, block = list(shape), [1] * len(shape), list(shape)
    size[:nb] = group[:nb] = q.batch
    for a, d in enumerate(dims[nb:]):
        if flat.core[a] == shape[d]:
            size[d], block[d], group[d] = flat.padded[a], flat.blocks[a], flat.groups[a]
    return rebuilt(
        flat,
        lambda a: lax.broadcast_in_dim(a, size, dims),
        lambda a: lax.broadcast_in_dim(a, group, dims),
        core=tuple(shape[nb:]),
        axes=plain_axes(len(shape) - nb),
        blocks=tuple(max(b, 1) for b in block[nb:]),
    )


def cut(
    q: QTensor, starts: Sequence[Any], sizes: Sequence[int], strides: Sequence[int] | None = None
) -> QTensor | None:
    """A slice, static or dynamic (`starts` may be traced); `None` if it would split a group."""
    strides = tuple(strides or (1,) * q.ndim)
    touched = [a for a in range(q.ndim) if sizes[a] != q.shape[a] or strides[a] != 1]
    if not touched:
        return q
    nb = len(q.batch)
    if any(a >= nb for a in touched):
        q = with_plain_scales(q)
    flat = opened(q, touched)
    if flat is None:
        return None
    core, blocks = tuple(sizes[nb:]), list(flat.blocks)
    spans: list[_Span] = []
    for a in touched:
        at, start, size = place_of(flat, a), starts[a], sizes[a]
        assert at is not None
        if at < nb or flat.blocks[at - nb] == 1:
            spans.append(_Span(at, start, size, start, size, strides[a]))
            continue
        block = flat.blocks[at - nb]
        if flat.groups[at - nb] == 1:
            blocks[at - nb] = max(size, 1)
            spans.append(_Span(at, start, size, 0, 1, strides[a]))
            continue
        fits = isinstance(start, int) and (size % block == 0 or start + size == q.shape[a])
        if strides[a] != 1 or not fits or start % block:
            return None
        groups = -(-size // block)
        spans.append(_Span(at, start, groups * block, start // block, groups, 1))

    def take_codes(x: Array) -> Array:
        for s in spans:
            x = _slice(x, s.start, s.size, s.stride, s.at)
        return x

    def take_scales(x: Array) -> Array:
        for s in spans:
            if s.at < x.ndim and x.shape[s.at] != 1:
                x = _slice(x, s.first, s.groups, s.stride, s.at)
        return x

    static: dict[str, Any] = {"core": core, "blocks": tuple(blocks)}
    for name in ("codebook", "global_scale"):  # these have batch axes only
        if name == "codebook" and flat.grouped_codebook:
            continue  # cut like scales
        array = getattr(flat, name)
        static[name] = None if array is None else _leading(array, spans, nb)
    static["calibration"] = calibrated(flat, lambda a: _leading(a, spans, nb))
    static["nested"] = jax.tree.map(lambda a: _leading(a, spans, nb), flat.nested)
    return rebuilt(flat, take_codes, take_scales, **static)


class _Span(NamedTuple):
    """A slice of one axis: `start`, `size` of the codes, `first`, `groups` of the scales."""

    at: int
    start: Any
    size: int
    first: Any
    groups: int
    stride: int


def _leading(x: Array, spans: Sequence[_Span], nb: int) -> Array:
    for s in spans:
        if s.at < nb:
            x = _slice(x, s.start, s.size, s.stride, s.at)
    return x


def _slice(x: Array, start: Any, size: int, stride: int, axis: int) -> Array:
    if isinstance(start, int):
        limit = start + (size - 1) * stride + 1 if size else start
        return lax.slice_in_dim(x, start, limit, stride, axis)
    # the primitive clamps a start that is out of range, where jnp-like slicing would wrap it
    start = jnp.clip(start, 0, x.shape[axis] - size)
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def reverse(q: QTensor, dims: Sequence[int]) -> QTensor | None:
    """Reverses axes whose scales are per index or shared by all."""
    flat, nb = opened(with_plain_scales(q), dims), len(q.batch)
    if flat is None:
        return None
    places = [at for at in (place_of(flat, d) for d in dims) if at is not None]
    core_axes = [at - nb for at in places if at >= nb]
    if any(flat.groups[c] > 1 and flat.blocks[c] > 1 for c in core_axes):
        return None
    if any(flat.padded[c] != flat.storage[c] for c in core_axes):
        return None
    lead = [at for at in places if at < nb]
    out = rebuilt(flat, lambda a: lax.rev(a, places), lambda a: lax.rev(a, places))
    names = ("global_scale",) if flat.grouped_codebook else ("codebook", "global_scale")
    batch_arrays = {
        name: None if getattr(flat, name) is None else lax.rev(getattr(flat, name), lead)
        for name in names
    }
    calibration = calibrated(flat, lambda a: lax.rev(a, lead))
    return with_arrays(out, **batch_arrays, calibration=calibration)


def concatenate(qs: Sequence[QTensor], axis: int) -> QTensor | None:
    """Joins tensors with equal specs and blocks along an axis of full groups."""
    qs = [with_plain_scales(q) for q in qs]
    same_layout = all((q.axes, len(q.batch)) == (qs[0].axes, len(qs[0].batch)) for q in qs)
    opens = [opened(q, [axis]) if same_layout else plain(q) for q in qs]
    flats = [None if q is None else with_grouped_codebook(q) for q in opens]
    first = flats[0]
    if first is None:
        return None
    nb, at = len(first.batch), place_of(first, axis)
    joined: list[QTensor] = []
    for f in flats:
        if f is None or at is None or not _joins(f, first, at - nb):
            return None
        joined.append(f)
    core = list(first.core)
    if axis >= nb:
        core[axis - nb] = sum(f.core[axis - nb] for f in joined)

    parts: dict[str, Any] = {}
    for name in ("codes", "scale", "zero_point", "codebook"):
        arrays = [getattr(f, name) for f in joined]
        parts[name] = None if arrays[0] is None else lax.concatenate(arrays, at or 0)
    rest = None if axis < nb else calibrated(first, lambda a: a)
    parts["calibration"] = None if rest is None else dataclasses.replace(rest, output=None)
    return with_arrays(dataclasses.replace(first, core=tuple(core)), **parts)


def _joins(f: QTensor, first: QTensor, c: int) -> bool:
    """Whether two tensors differ at most in their size along storage axis `c`."""
    if any(q.calibration is not None and q.calibration.divisor is not None for q in (f, first)):
        return False
    static = ("spec", "dtype", "axes")
    if any(getattr(f, name) != getattr(first, name) for name in static):
        return False
    if f.global_scale is not None or len(f.batch) != len(first.batch):
        return False
    if (f.codebook is None) != (first.codebook is None):
        return False
    if c < 0:
        return f.blocks == first.blocks
    return f.blocks == first.blocks and f.padded[c] == f.storage[c]


def rows(q: QTensor, indices: Array, axis: int, mode: Any) -> QTensor | None:
    """Rows `indices[..., 0]` of one axis; the axes of `indices` become batch axes.

    Equivalent to a `gather` of whole slices whose result leads with the axes of `indices`.
    """
    nb, rank, lead = len(q.batch), len(q.core), indices.shape[:-1]
    if nb and axis:
        promoted = promote(q)
        return None if promoted is None else rows(promoted, indices, axis, mode)
    at = place_of(q, axis)
    if at is None:
        return None
    q = q if nb else with_plain_scales(q)
    shared = not nb and q.groups[at] == 1 and q.shape[axis] != 1
    if not nb and q.blocks[at] > 1 and not shared:
        return None
    if shared and mode == lax.GatherScatterMode.FILL_OR_DROP:
        return None  # a row out of bounds is filled by its scale, and all rows share one

    def gather(x: Array) -> Array:
        x = jnp.moveaxis(x, at, 0)
        if x.shape[0] == 1 and q.shape[axis] != 1:
            return jnp.broadcast_to(x, lead + x.shape[1:])
        dims = lax.GatherDimensionNumbers(
            offset_dims=tuple(range(len(lead), len(lead) + x.ndim - 1)),
            collapsed_slice_dims=(0,),
            start_index_map=(0,),
        )
        return lax.gather(x, indices, dims, (1, *x.shape[1:]), mode=mode)

    if nb:
        return jax.tree.map(gather, q)
    glob, book = q.global_scale, q.codebook
    if book is not None and not q.grouped_codebook:
        book = jnp.broadcast_to(book, (*lead, *book.shape))
    core_axis = axis - rank
    return rebuilt(
        q,
        gather,
        gather,
        codebook=book,  # a codebook per group is gathered by `rebuilt`
        global_scale=None if glob is None else jnp.broadcast_to(glob, lead),
        calibration=None,
        core=q.core[:axis] + q.core[axis + 1 :],
        axes=tuple(tuple(a + (a < core_axis) for a in m) for i, m in enumerate(q.axes) if i != at),
        blocks=tuple(b for i, b in enumerate(q.blocks) if i != at),
    )


def rescale(q: QTensor, factor: Array | float) -> QTensor:
    """Multiplication by a scalar, which acts on the scales."""
    factor = jnp.asarray(factor).astype(jnp.float32)
    if q.nested is not None:
        return dataclasses.replace(q, nested=jax.tree.map(lambda a: a * factor, q.nested))
    scale = q.scale.astype(jnp.float32) * factor
    spec = dataclasses.replace(q.spec, scale_dtype="float32")
    return dataclasses.replace(q, scale=scale, spec=spec)
