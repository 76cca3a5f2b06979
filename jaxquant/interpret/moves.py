"""Layout operations on a `QTensor` that keep it quantized, or `None` where scales forbid it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.numerics import Format, get
from jaxquant.qtensor import QTensor, storage_codes, storage_scale
from jaxquant.spec import PerTensor, QSpec


def _plain_axes(rank: int) -> tuple[tuple[int, ...], ...]:
    return tuple((a,) for a in range(-rank, 0))


def _respec(q: QTensor, fmt: Format, scale_dtype: str) -> QSpec:
    # what a moved tensor's granularity was called no longer matters: axes and blocks say it
    s = q.spec
    return QSpec(fmt, PerTensor(), s.symmetric, s.range, scale_dtype)


def _widened(fmt: Format) -> Format:
    """A format whose codes are whole bytes and which holds every value of `fmt`."""
    if fmt.is_integer:
        return get("int8" if fmt.signed else "uint8")  # type: ignore[return-value]
    if fmt.is_codebook:
        return dataclasses.replace(fmt, bits=8)
    return get("float8_e4m3fn")  # type: ignore[return-value]


def promote(q: QTensor) -> QTensor | None:
    """The same tensor with its batch axes described as core axes, each index its own block."""
    n = len(q.batch)
    if not n:
        return q
    if q.codebook is not None:
        return None
    rank = len(q.core) + n
    scale, dtype = q.scale, q.spec.scale_dtype
    if q.global_scale is not None:
        scale, dtype = storage_scale(q), "float32"
    return dataclasses.replace(
        q,
        scale=scale,
        global_scale=None,
        spec=_respec(q, q.spec.format, dtype),
        core=q.batch + q.core,
        axes=tuple((a,) for a in range(-rank, n - rank)) + q.axes,
        blocks=(1,) * n + q.blocks,
    )


def demote(q: QTensor) -> QTensor | None:
    """The same tensor with its first core axis as a batch axis, as `scan` needs it."""
    rank = len(q.core)
    if q.batch:
        return q
    if (-rank,) not in q.axes or q.global_scale is not None or q.codebook is not None:
        return None
    at = q.axes.index((-rank,))
    if at == len(q.axes) - 1 and q.spec.format.packed:
        return None

    def lead(a: Array | None) -> Array | None:
        return None if a is None else jnp.moveaxis(a, at, 0)

    scale, zero = lead(q.scale), lead(q.zero_point)
    if q.blocks[at] != 1:
        if q.blocks[at] < q.core[0]:
            return None
        scale = jnp.repeat(scale, q.core[0], axis=0)
        zero = None if zero is None else jnp.repeat(zero, q.core[0], axis=0)
    return dataclasses.replace(
        q,
        codes=lead(q.codes),
        scale=scale,
        zero_point=zero,
        core=q.core[1:],
        axes=q.axes[:at] + q.axes[at + 1 :],
        blocks=q.blocks[:at] + q.blocks[at + 1 :],
    )


def _split_block(block: int, sizes: Sequence[int]) -> list[int] | None:
    """Blocks along each of `sizes` that make runs of `block` in their flattened order."""
    blocks: list[int] = []
    for n in reversed(sizes):
        if n and block % n == 0:
            blocks.append(n)
            block //= n
        elif n % block == 0:
            blocks.append(block)
            block = 1
        else:
            return None
    return blocks[::-1] if block == 1 else None


def _merge_blocks(blocks: Sequence[int], sizes: Sequence[int]) -> int | None:
    """Inverse of `_split_block`: the run length in flattened order, if runs are contiguous."""
    flat, whole = 1, True
    for b, n in zip(reversed(blocks), reversed(sizes), strict=True):
        if n == 1:
            continue
        if whole:
            flat *= b
            whole = b == n
        elif b != 1:
            return None
    return flat


def plain(q: QTensor) -> QTensor | None:
    """`q` with codes unpacked to bytes and stored in the order of the array's own axes."""
    rank = len(q.core)
    axes = _plain_axes(rank)
    fmt = q.spec.format
    if q.axes == axes and not fmt.packed:
        return q
    codes, nb = storage_codes(q), len(q.batch)
    widened = _widened(fmt) if fmt.packed else fmt
    if fmt.packed and fmt.is_float:
        from jaxquant.numerics import decode

        codes = decode(codes, fmt, jnp.float32).astype(widened.storage)
    sizes: list[int] = []
    groups: list[int] = []
    blocks: dict[int, int] = {}
    for merged, block, padded in zip(q.axes, q.blocks, q.padded, strict=True):
        dims = [q.core[a] for a in merged]
        if len(merged) == 1:
            split: list[int] | None = [block]
            dims = [padded]
        else:
            split = _split_block(block, dims) if padded == math.prod(dims) else None
        if split is None:
            return None
        sizes += dims
        groups += [-(-n // b) for n, b in zip(dims, split, strict=True)]
        blocks.update(zip(merged, split, strict=True))
    order = [a for merged in q.axes for a in merged]
    perm = list(range(nb)) + [nb + order.index(a) for (a,) in axes]

    def move(a: Array | None, shape: list[int]) -> Array | None:
        return None if a is None else jnp.transpose(a.reshape(*q.batch, *shape), perm)

    return dataclasses.replace(
        q,
        codes=move(codes, sizes),
        scale=move(q.scale, groups),
        zero_point=move(q.zero_point, groups),
        spec=QSpec(
            widened,
            PerTensor(),
            q.spec.symmetric,
            q.spec.range,
            q.spec.scale_dtype,
            q.spec.global_scale,
        ),
        axes=axes,
        blocks=tuple(blocks[a] for (a,) in axes),
    )


def transpose(q: QTensor, perm: Sequence[int]) -> QTensor | None:
    """Permutes axes: only the description changes, unless batch axes move."""
    nb = len(q.batch)
    if list(perm[:nb]) != list(range(nb)):
        promoted = promote(q)
        return None if promoted is None else transpose(promoted, perm)
    rank = len(q.core)
    core = [p - nb - rank for p in perm[nb:]]  # new axis i was old axis core[i], negative
    new = {old: i - rank for i, old in enumerate(core)}
    return dataclasses.replace(
        q,
        core=tuple(q.core[a] for a in core),
        axes=tuple(tuple(new[a] for a in merged) for merged in q.axes),
    )


def squeeze(q: QTensor, dims: Sequence[int]) -> QTensor | None:
    """Takes axes of size 1 away; codes stay as they lie."""
    for d in sorted(dims, reverse=True):
        nb, rank = len(q.batch), len(q.core)
        if d < nb:
            q = jax.tree.map(lambda a, d=d: lax.squeeze(a, [d]), q)
            continue
        gone = d - nb - rank
        at = next(i for i, merged in enumerate(q.axes) if gone in merged)
        alone = len(q.axes[at]) == 1
        if alone and (q.padded[at] != 1 or (at == len(q.axes) - 1 and q.spec.format.packed)):
            return None
        axes = [tuple(a + (a < gone) for a in m if a != gone) for m in q.axes]
        keep = [i for i in range(len(axes)) if not (alone and i == at)]

        def drop(x: Array | None, place: int | None = nb + at if alone else None) -> Array | None:
            return x if x is None or place is None else lax.squeeze(x, [place])

        q = dataclasses.replace(
            q,
            codes=drop(q.codes),
            scale=drop(q.scale),
            zero_point=drop(q.zero_point),
            core=tuple(n for i, n in enumerate(q.core) if i != d - nb),
            axes=tuple(axes[i] for i in keep),
            blocks=tuple(q.blocks[i] for i in keep),
        )
    return q


def expand(q: QTensor, dims: Sequence[int]) -> QTensor:
    """Inserts axes of size 1 at positions of the result; codes stay as they lie."""
    for d in sorted(dims):
        nb = len(q.batch)
        if d <= nb:
            q = jax.tree.map(lambda a, d=d: lax.expand_dims(a, [d]), q)
            continue
        new = d - q.ndim - 1

        def add(x: Array | None, nb: int = nb) -> Array | None:
            return None if x is None else lax.expand_dims(x, [nb])

        q = dataclasses.replace(
            q,
            codes=add(q.codes),
            scale=add(q.scale),
            zero_point=add(q.zero_point),
            core=q.core[: d - nb] + (1,) + q.core[d - nb :],
            axes=((new,), *(tuple(a - (a <= new) for a in m) for m in q.axes)),
            blocks=(1, *q.blocks),
        )
    return q


def _unit_reshape(q: QTensor, shape: tuple[int, ...]) -> QTensor | None:
    """A reshape that only adds and takes away axes of size 1."""
    if [n for n in q.shape if n != 1] != [n for n in shape if n != 1]:
        return None
    bare = squeeze(q, [d for d, n in enumerate(q.shape) if n == 1])
    return None if bare is None else expand(bare, [d for d, n in enumerate(shape) if n == 1])


def reshape(q: QTensor, shape: Sequence[int]) -> QTensor | None:
    """Reshapes; `None` where a run of values that share a scale would be cut unevenly."""
    shape, nb = tuple(shape), len(q.batch)
    if shape == q.shape:
        return q
    unit = _unit_reshape(q, shape)
    if unit is not None:
        return unit
    if shape[:nb] != q.batch:
        promoted = promote(q)
        return None if promoted is None else reshape(promoted, shape)
    flat = plain(q)
    if flat is None or 0 in shape:
        return None
    new = shape[nb:]
    blocks: list[int] = []
    for olds, news in _factors(flat.core, new):
        sizes = [flat.core[a] for a in olds]
        if len(olds) == len(news) == 1:
            blocks.append(flat.blocks[olds[0]])
            continue
        if any(flat.padded[a] != flat.core[a] for a in olds):
            return None
        run = _merge_blocks([flat.blocks[a] for a in olds], sizes)
        split = None if run is None else _split_block(run, [new[a] for a in news])
        if split is None:
            return None
        blocks += split
    padded = tuple(-(-n // b) * b for n, b in zip(new, blocks, strict=True))
    groups = tuple(-(-n // b) for n, b in zip(new, blocks, strict=True))
    return dataclasses.replace(
        flat,
        codes=flat.codes.reshape(*q.batch, *padded),
        scale=flat.scale.reshape(*q.batch, *groups),
        zero_point=_maybe(flat.zero_point, lambda z: z.reshape(*q.batch, *groups)),
        core=new,
        axes=_plain_axes(len(new)),
        blocks=tuple(blocks),
    )


def _factors(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cuts two shapes of equal size into the shortest runs of equal product."""
    runs, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, b, left, right = i, j, 1, 1
        while True:
            if left <= right and i < len(old) and (left < right or i == a):
                left, i = left * old[i], i + 1
            elif j < len(new) and (right < left or j == b):
                right, j = right * new[j], j + 1
            elif left == right:
                break
            else:  # sizes differ: cannot be
                raise AssertionError((old, new))
        runs.append((tuple(range(a, i)), tuple(range(b, j))))
    return runs


def _maybe(a: Array | None, f: Any) -> Any:
    return None if a is None else f(a)


def broadcast(q: QTensor, shape: Sequence[int], dims: Sequence[int]) -> QTensor | None:
    """`broadcast_in_dim`; new axes share the scale of what is repeated."""
    lead = len(q.batch)
    if tuple(dims[:lead]) != tuple(range(lead)) or tuple(shape[:lead]) != q.batch:
        promoted = promote(q)
        return None if promoted is None else _broadcast(promoted, shape, dims)
    return _broadcast(q, shape, dims)


def _broadcast(q: QTensor, shape: Sequence[int], dims: Sequence[int]) -> QTensor | None:
    flat, nb = plain(q), len(q.batch)
    if flat is None:
        return None
    size, group, block = list(shape), [1] * len(shape), list(shape)
    size[:nb] = group[:nb] = q.batch
    for a, d in enumerate(dims[nb:]):
        if flat.core[a] == shape[d]:
            size[d], block[d], group[d] = flat.padded[a], flat.blocks[a], flat.groups[a]
    return dataclasses.replace(
        flat,
        codes=lax.broadcast_in_dim(flat.codes, size, dims),
        scale=lax.broadcast_in_dim(flat.scale, group, dims),
        zero_point=_maybe(flat.zero_point, lambda z: lax.broadcast_in_dim(z, group, dims)),
        core=tuple(shape[nb:]),
        axes=_plain_axes(len(shape) - nb),
        blocks=tuple(max(b, 1) for b in block[nb:]),
    )


def cut(
    q: QTensor, starts: Sequence[Any], sizes: Sequence[int], strides: Sequence[int] | None = None
) -> QTensor | None:
    """A slice, static or dynamic (`starts` may be traced); groups must not be cut through."""
    strides = tuple(strides or (1,) * q.ndim)
    touched = [a for a in range(q.ndim) if sizes[a] != q.shape[a] or strides[a] != 1]
    if not touched:
        return q
    nb = len(q.batch)
    flat = q if max(touched) < nb else plain(q)
    if flat is None:
        return None
    spans: list[tuple[int, int, int, bool]] = []  # axis, block, groups of the result, whole
    blocks = list(flat.blocks)
    for a in touched:
        if a < nb:
            spans.append((a, 1, sizes[a], False))
            continue
        c = a - nb
        if flat.groups[c] == 1:
            blocks[c] = max(sizes[a], 1)
            spans.append((a, 1, 1, True))
        elif flat.blocks[c] == 1:
            spans.append((a, 1, sizes[a], False))
        else:
            start, b = starts[a], flat.blocks[c]
            ends = isinstance(start, int) and (sizes[a] % b == 0 or start + sizes[a] == q.shape[a])
            if strides[a] != 1 or not ends or start % b:
                return None
            spans.append((a, b, -(-sizes[a] // b), False))

    def take(x: Array | None, is_codes: bool) -> Array | None:
        if x is None:
            return None
        for a, b, groups, whole in spans:
            if is_codes:
                count = sizes[a] if b == 1 else groups * b
                x = _slice(x, starts[a], count, strides[a], a)
            elif not whole and a < x.ndim:
                start = starts[a] if b == 1 else starts[a] // b
                x = _slice(x, start, groups, strides[a], a)
        return x

    return dataclasses.replace(
        flat,
        codes=take(flat.codes, True),
        scale=take(flat.scale, False),
        zero_point=take(flat.zero_point, False),
        codebook=take(flat.codebook, False) if flat.codebook is not None else None,
        global_scale=take(flat.global_scale, False),
        core=tuple(sizes[nb:]),
        blocks=tuple(blocks),
    )


def _slice(x: Array, start: Any, size: int, stride: int, axis: int) -> Array:
    if isinstance(start, int):
        limit = start + (size - 1) * stride + 1 if size else start
        return lax.slice_in_dim(x, start, limit, stride, axis)
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def reverse(q: QTensor, dims: Sequence[int]) -> QTensor | None:
    """Reverses axes whose scales are per index or shared by all."""
    flat, nb = plain(q), len(q.batch)
    if flat is None or any(
        d >= nb and flat.groups[d - nb] > 1 and flat.blocks[d - nb] > 1 for d in dims
    ):
        return None

    def rev(x: Array | None) -> Array | None:
        return None if x is None else lax.rev(x, [d for d in dims if d < x.ndim])

    return jax.tree.map(rev, flat)


def concatenate(qs: Sequence[QTensor], axis: int) -> QTensor | None:
    """Joins tensors of one format along an axis where each index or full group has its scale."""
    flats = [plain(q) for q in qs]
    first = flats[0]
    if first is None or any(f is None for f in flats):
        return None
    nb = len(first.batch)
    for f in flats:
        same = f is not None and (len(f.batch), f.spec, f.dtype) == (nb, first.spec, first.dtype)
        if not same or f is None or f.global_scale is not None or f.codebook is not None:
            return None
        if axis >= nb:
            c = axis - nb
            others = [b == o for i, (b, o) in enumerate(zip(f.blocks, first.blocks)) if i != c]
            if not all(others) or f.blocks[c] != first.blocks[c] or f.padded[c] != f.core[c]:
                return None
    joined = [f for f in flats if f is not None]
    core = list(first.core)
    if axis >= nb:
        core[axis - nb] = sum(f.core[axis - nb] for f in joined)
    out = jax.tree.map(lambda *xs: lax.concatenate(xs, axis), *(_neutral(f) for f in joined))
    return dataclasses.replace(first, **{k: getattr(out, k) for k in ("codes", "scale", "zero_point")}, core=tuple(core))


def _neutral(q: QTensor) -> QTensor:
    return dataclasses.replace(q, core=())


def rows(q: QTensor, indices: Array, axis: int, mode: Any, fill: Any) -> QTensor | None:
    """Rows `indices[..., 0]` of one axis: their codes and scales become batch axes.

    Equivalent to a `gather` of whole slices with the result's leading axes those of `indices`.
    """
    del fill
    nb = len(q.batch)
    if axis < nb:
        if axis != 0:
            return None
        at = 0
        flat = q
    else:
        if nb:
            promoted = promote(q)
            return None if promoted is None else rows(promoted, indices, axis, mode, None)
        rank = len(q.core)
        if (axis - rank,) not in q.axes or q.codebook is not None:
            return None
        at = q.axes.index((axis - rank,))
        if at == len(q.axes) - 1 and q.spec.format.packed:
            return None
        if 1 < q.blocks[at] and q.groups[at] > 1:
            return None
        flat = q
    lead = indices.shape[:-1]

    def gather(x: Array | None) -> Array | None:
        if x is None:
            return None
        x = jnp.moveaxis(x, at, 0) if at else x
        if x.shape[0] == 1 and q.shape[axis] != 1:  # one scale for all rows
            return jnp.broadcast_to(x, lead + x.shape[1:])
        dims = lax.GatherDimensionNumbers(
            offset_dims=tuple(range(len(lead), len(lead) + x.ndim - 1)),
            collapsed_slice_dims=(0,),
            start_index_map=(0,),
        )
        return lax.gather(x, indices, dims, (1, *x.shape[1:]), mode=mode)

    if axis < nb:
        return jax.tree.map(gather, flat)
    glob = q.global_scale
    return dataclasses.replace(
        q,
        codes=gather(q.codes),
        scale=gather(q.scale),
        zero_point=gather(q.zero_point),
        global_scale=None if glob is None else jnp.broadcast_to(glob, lead),
        core=q.core[:axis] + q.core[axis + 1 :],
        axes=tuple(
            tuple(a + (a < axis - rank) for a in m) for i, m in enumerate(q.axes) if i != at
        ),
        blocks=tuple(b for i, b in enumerate(q.blocks) if i != at),
    )


def rescale(q: QTensor, factor: Array | float) -> QTensor:
    """Multiplication by a scalar, which acts on the scales."""
    scale = q.scale.astype(jnp.float32) * jnp.asarray(factor).astype(jnp.float32)
    s = q.spec
    spec = QSpec(s.format, s.granularity, s.symmetric, s.range, "float32", s.global_scale)
    return dataclasses.replace(q, scale=scale, spec=spec)
