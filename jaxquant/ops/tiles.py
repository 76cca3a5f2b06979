"""Contractions with a codebook in tiles: a part of the weight is looked up at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from jaxquant.ops import lowering
from jaxquant.ops.operands import Placement
from jaxquant.qtensor import QTensor, storage_codes


def tiling(q: QTensor, at: Placement, rows: int) -> tuple[int, int] | None:
    """The kept storage axis to cut, and how many of its indices to look up at a time.

    `None` where the weight has no learned codebook, or is better looked up at once, or has no such
    axis: one axis of the array, neither padded nor a batch axis, with a divisor that whole groups
    fit in.

    >>> import jax, jaxquant as jq
    >>> from jaxquant.ops.operands import place
    >>> w = jax.random.normal(jax.random.key(0), (32, 64))
    >>> q, _ = jq.kmeans(iterations=1)(w, jq.palette(1), minor=(0,))
    >>> tiling(q, place(q, (0,), ()), rows=1) is None  # so little is looked up at once
    True
    """
    floats = lowering.tile_floats(rows, math.prod(at.padded))
    if floats is None or q.codebook is None or q.batch or at.batch or not at.keep:
        return None
    s = at.keep[0]
    alone = len(at.members[s]) == 1 and at.padded[s] == at.size[s]
    if not alone or not lowering.one_device():
        return None
    size, block = at.size[s], at.block(s) if at.groups[s] > 1 else 1
    most = min(size, floats * size // max(math.prod(at.padded), 1))
    fits = [t for t in range(block, most + 1, block) if size % t == 0]
    return (s, fits[-1]) if fits else None


def tile(q: QTensor, s: int, start: Array, size: int) -> QTensor:
    """Indices `start` to `start + size` of storage axis `s`, of whole groups."""
    shared = q.groups[s] == 1
    block = q.blocks[s]

    def scales(a: Array) -> Array:
        if shared:
            return a
        return lax.dynamic_slice_in_dim(a, start // block, size // block, axis=s)

    (axis,) = q.axes[s]
    core, blocks = list(q.core), list(q.blocks)
    core[axis] = size
    blocks[s] = size if shared else block
    return dataclasses.replace(
        q,
        codes=lax.dynamic_slice_in_dim(q.codes, start, size, axis=s),
        scale=scales(q.scale),
        zero_point=None if q.zero_point is None else scales(q.zero_point),
        codebook=scales(q.codebook)
        if q.codebook is not None and q.grouped_codebook
        else q.codebook,
        core=tuple(core),
        blocks=tuple(blocks),
    )


def by_tiles(
    q: QTensor, s: int, size: int, axis: int, contracted: Callable[[QTensor], Array]
) -> Array:
    """`contracted(q)` put together from its tiles, which come out along `axis`.

    No array of all values is made: codes are bytes, and floats those of one tile.
    """
    fmt, count = q.spec.format, q.padded[s] // size
    if fmt.packed:  # to bytes at once: in a tile, on one core, it takes longer than all the rest
        whole = dataclasses.replace(q.spec, format=dataclasses.replace(fmt, bits=8))
        q = dataclasses.replace(q, codes=lax.optimization_barrier(storage_codes(q)), spec=whole)

    def one(i: Array) -> Array:
        return contracted(tile(q, s, i * size, size))

    out = lax.map(one, jnp.arange(count, dtype=jnp.int32))  # [count, ..., size, ...]
    out = jnp.moveaxis(out, 0, axis)
    return out.reshape(*out.shape[:axis], count * size, *out.shape[axis + 2 :])
