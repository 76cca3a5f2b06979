"""Layout operations on a `QTensor` that keep it quantized, or `None` where scales forbid it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.interpret.shape_factors import factors, merge_blocks, split_block
from jaxquant.numerics import Format, decode, get
from jaxquant.qtensor import (
    Calibration,
    PerTensor,
    QSpec,
    QTensor,
    storage_codes,
    storage_scale,
    with_plain_scales,
)


def rebuilt(
    q: QTensor, codes: Callable[[Array], Array], scales: Callable[[Array], Array], **static: Any
) -> QTensor:
    """`q` with one function applied to its codes and one to its scales.

    `scales` also applies to zero points and to each level of a codebook per group.
    """
    zero = None if q.zero_point is None else scales(q.zero_point)
    if q.grouped_codebook:
        assert q.codebook is not None
        static["codebook"] = jax.vmap(scales, in_axes=-1, out_axes=-1)(q.codebook)
    return dataclasses.replace(
        q, codes=codes(q.codes), scale=scales(q.scale), zero_point=zero, **static
    )


def with_arrays(q: QTensor, **arrays: Any) -> QTensor:
    """`q` with some of its arrays replaced."""
    return dataclasses.replace(q, **arrays)


def calibrated(q: QTensor, batch: Callable[[Array], Array]) -> Calibration | None:
    """The part of `q`'s calibration that holds after a move; `batch` acts on its batch axes."""
    return None if q.calibration is None else q.calibration.moved(batch)


def with_grouped_codebook(q: QTensor) -> QTensor | None:
    """`q` with its codebook in the layout of scales; `None` if several groups share it."""
    if q.codebook is None or q.grouped_codebook:
        return q
    if not q.axes or any(n != 1 for n in q.groups):
        return None
    shape = (*q.batch, *q.groups, q.codebook.shape[-1])
    return dataclasses.replace(q, codebook=q.codebook.reshape(shape))


def plain_axes(rank: int) -> tuple[tuple[int, ...], ...]:
    """The storage axes of a tensor that is stored in the order of its axes."""
    return tuple((a,) for a in range(-rank, 0))


def _respec(q: QTensor, fmt: Format, scale_dtype: str) -> QSpec:
    # axes and blocks define the granularity of a moved tensor, not the spec
    s = q.spec
    return QSpec(fmt, PerTensor(), s.symmetric, s.range, scale_dtype, zero_dtype=s.zero_dtype)


def _widened(fmt: Format) -> Format:
    """A format with codes of whole bytes that holds every value of `fmt`."""
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
    grouped = with_grouped_codebook(q)
    if grouped is None:
        return None
    q, rank = with_plain_scales(grouped), len(q.core) + n
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
        calibration=None,  # an index no longer has a grid of its own
    )


def demote(q: QTensor) -> QTensor | None:
    """The same tensor with its first core axis as a batch axis, as `scan` needs it."""
    rank = len(q.core)
    if q.batch:
        return q
    if (-rank,) not in q.axes or q.global_scale is not None:
        return None
    at = q.axes.index((-rank,))
    if at == len(q.axes) - 1 and q.spec.format.packed:
        return None

    block = q.blocks[at]
    if block not in (1, max(q.core[0], 1)):
        return None
    q = with_plain_scales(q)

    def scales(a: Array) -> Array:
        a = jnp.moveaxis(a, at, 0)
        return a if block == 1 else jnp.repeat(a, q.core[0], axis=0)

    book = q.codebook
    if book is not None and not q.grouped_codebook:
        book = jnp.broadcast_to(book, (q.core[0], *book.shape))
    return rebuilt(
        q,
        lambda a: jnp.moveaxis(a, at, 0),
        scales,
        codebook=book,  # a codebook per group is moved by `rebuilt`
        core=q.core[1:],
        axes=q.axes[:at] + q.axes[at + 1 :],
        blocks=q.blocks[:at] + q.blocks[at + 1 :],
        calibration=calibrated(q, lambda a: jnp.broadcast_to(a, (q.core[0], *a.shape))),
    )


def plain(q: QTensor) -> QTensor | None:
    """`q` with codes unpacked to bytes and stored in the order of the array's own axes."""
    rank = len(q.core)
    axes = plain_axes(rank)
    fmt = q.spec.format
    if q.axes == axes and not fmt.packed:
        return q
    q = with_plain_scales(q)
    codes, nb = storage_codes(q), len(q.batch)
    widened = _widened(fmt) if fmt.packed else fmt
    if fmt.packed and fmt.is_float:
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
            split = split_block(block, dims) if padded == math.prod(dims) else None
        if split is None:
            return None
        sizes += dims
        groups += [-(-n // b) for n, b in zip(dims, split, strict=True)]
        blocks.update(zip(merged, split, strict=True))
    order = [a for merged in q.axes for a in merged]
    perm = list(range(nb)) + [nb + order.index(a) for (a,) in axes]

    spec = QSpec(
        widened, PerTensor(), q.spec.symmetric, q.spec.range, q.spec.scale_dtype,
        q.spec.global_scale, zero_dtype=q.spec.zero_dtype,
    )  # fmt: skip
    return rebuilt(
        dataclasses.replace(q, codes=codes),
        lambda a: jnp.transpose(a.reshape(*q.batch, *sizes), perm),
        lambda a: jnp.transpose(a.reshape(*q.batch, *groups), perm),
        spec=spec,
        axes=axes,
        blocks=tuple(blocks[a] for (a,) in axes),
    )


def place_of(q: QTensor, axis: int) -> int | None:
    """The axis of `codes` that stores an axis; `None` if that is packed or merged with others."""
    nb = len(q.batch)
    if axis < nb:
        return axis
    name = (axis - nb - len(q.core),)
    at = q.axes.index(name) if name in q.axes else -1
    packed = q.spec.format.packed and at == len(q.axes) - 1
    return None if at < 0 or packed else nb + at


def opened(q: QTensor, axes: Sequence[int]) -> QTensor | None:
    """`q` if each of `axes` has a place in its codes, else its `plain` form."""
    return plain(q) if any(place_of(q, a) is None for a in axes) else q


def transpose(q: QTensor, perm: Sequence[int]) -> QTensor | None:
    """Permutes axes: only the description changes, unless batch axes move."""
    nb = len(q.batch)
    if list(perm[:nb]) != list(range(nb)):
        promoted = promote(q)
        return None if promoted is None else transpose(promoted, perm)
    rank = len(q.core)
    core = [p - nb - rank for p in perm[nb:]]  # new axis i was old axis core[i], negative
    new = {old: i - rank for i, old in enumerate(core)}
    calibration = q.calibration
    if calibration is not None and calibration.outliers is not None:
        over = tuple(new[a] for a in calibration.over)
        calibration = dataclasses.replace(calibration, over=over)
    return dataclasses.replace(
        q,
        calibration=calibration,
        core=tuple(q.core[a] for a in core),
        axes=tuple(tuple(new[a] for a in merged) for merged in q.axes),
    )


def squeeze(q: QTensor, dims: Sequence[int]) -> QTensor | None:
    """Removes axes of size 1; codes keep their storage order."""
    for d in sorted(dims, reverse=True):
        nb, rank = len(q.batch), len(q.core)
        if d < nb:
            q = jax.tree.map(lambda a, d=d: lax.squeeze(a, [d]), q)
            continue
        axis = d - nb - rank
        at = next(i for i, merged in enumerate(q.axes) if axis in merged)
        alone = len(q.axes[at]) == 1
        if alone and (q.padded[at] != 1 or (at == len(q.axes) - 1 and q.spec.format.packed)):
            return None
        axes = [tuple(a + (a < axis) for a in m if a != axis) for m in q.axes]
        keep = [i for i in range(len(axes)) if not (alone and i == at)]

        def drop(a: Array, place: int | None = nb + at if alone else None) -> Array:
            return a if place is None else lax.squeeze(a, [place])

        q = rebuilt(
            q,
            drop,
            drop,
            core=tuple(n for i, n in enumerate(q.core) if i != d - nb),
            axes=tuple(axes[i] for i in keep),
            blocks=tuple(q.blocks[i] for i in keep),
        )
    return q


def expand(q: QTensor, dims: Sequence[int]) -> QTensor:
    """Inserts axes of size 1 at positions of the result; codes keep their storage order."""
    for d in sorted(dims):
        nb = len(q.batch)
        if d <= nb:
            q = jax.tree.map(lambda a, d=d: lax.expand_dims(a, [d]), q)
            continue
        new = d - q.ndim - 1

        def add(a: Array, nb: int = nb) -> Array:
            return lax.expand_dims(a, [nb])

        q = rebuilt(
            q,
            add,
            add,
            core=(*q.core[: d - nb], 1, *q.core[d - nb :]),
            axes=((new,), *(tuple(a - (a <= new) for a in m) for m in q.axes)),
            blocks=(1, *q.blocks),
        )
    return q


def _unit_reshape(q: QTensor, shape: tuple[int, ...]) -> QTensor | None:
    """A reshape that only adds and removes axes of size 1."""
    if [n for n in q.shape if n != 1] != [n for n in shape if n != 1]:
        return None
    bare = squeeze(q, [d for d, n in enumerate(q.shape) if n == 1])
    return None if bare is None else expand(bare, [d for d, n in enumerate(shape) if n == 1])


def reshape(q: QTensor, shape: Sequence[int]) -> QTensor | None:
    """Reshapes; `None` if values that share a scale would be split unevenly."""
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
    for olds, news in factors(flat.core, new):
        sizes = [flat.core[a] for a in olds]
        if len(olds) == len(news) == 1:
            blocks.append(flat.blocks[olds[0]])
            continue
        if any(flat.padded[a] != flat.core[a] for a in olds):
            return None
        run = merge_blocks([flat.blocks[a] for a in olds], sizes)
        split = None if run is None else split_block(run, [new[a] for a in news])
        if split is None:
            return None
        blocks += split
    padded = tuple(-(-n // b) * b for n, b in zip(new, blocks, strict=True))
    groups = tuple(-(-n // b) for n, b in zip(new, blocks, strict=True))
    return rebuilt(
        flat,
        lambda a: a.reshape(*q.batch, *padded),
        lambda a: a.reshape(*q.batch, *groups),
        core=new,
        axes=plain_axes(len(new)),
        blocks=tuple(blocks),
    )
