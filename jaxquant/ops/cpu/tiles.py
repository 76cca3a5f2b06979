"""Contractions with a float weight in tiles: a part of it is dequantized at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from jaxquant.ops import lowering
from jaxquant.ops.operands import Placement
from jaxquant.qtensor import QTensor, storage_codes, storage_scale


def tiling(q: QTensor, at: Placement, rows: int) -> tuple[int, int] | None:
    """The kept storage axis to cut, and how many of its indices to dequantize at a time.

    `None` where the weight is better dequantized at once, or converts without a table, a group's
    scale or unpacking, or has no such axis: neither padded nor a batch axis, with a divisor that
    whole groups fit in.

    >>> import jax, jaxquant as jq
    >>> from jaxquant.ops.operands import place
    >>> w = jax.random.normal(jax.random.key(0), (32, 64))
    >>> q, _ = jq.kmeans(iterations=1)(w, jq.palette(1), storage_last_axes=(0,))
    >>> tiling(q, place(q, (0,), ()), rows=1) is None  # so little is looked up at once
    True
    """
    floats = lowering.tile_floats(rows, math.prod(at.padded))
    if floats is None or q.batch or at.batch or not at.keep:
        return None
    if q.codebook is None and not at.split and not q.spec.format.packed:
        return None
    s = at.keep[0]
    packed_along = q.spec.format.packed and s == len(at.padded) - 1
    if at.padded[s] != at.size[s] or packed_along:
        return None
    size, block = at.size[s], at.block(s) if at.groups[s] > 1 else 1
    most = min(size, floats * size // max(math.prod(at.padded), 1))
    fits = [t for t in range(block, most + 1, block) if size % t == 0]
    return (s, fits[-1]) if fits and 4 * fits[-1] >= most else None


def as_stored(q: QTensor) -> QTensor:
    """The array that `q` stores, each storage axis an axis of it, with scales in float32."""
    rank = len(q.axes)
    return dataclasses.replace(
        q,
        scale=storage_scale(q),
        global_scale=None,
        nested=None,
        calibration=None,
        core=q.storage,
        axes=tuple((a - rank,) for a in range(rank)),
    )


def tile(q: QTensor, s: int, start: Array, size: int) -> QTensor:
    """Indices `start` to `start + size` of axis `s` of what `as_stored` gives, of whole groups."""
    shared = q.groups[s] == 1
    block = q.blocks[s]

    def part(a: Array, start: Array, size: int) -> Array:
        return lax.dynamic_slice_in_dim(a, start, size, axis=s, allow_negative_indices=False)

    def scales(a: Array) -> Array:
        return a if shared else part(a, start // block, size // block)

    core, blocks = list(q.core), list(q.blocks)
    core[s] = size
    blocks[s] = size if shared else block
    return dataclasses.replace(
        q,
        codes=part(q.codes, start, size),
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

    No array of all values is made: floats are those of one tile, which caches hold.
    """
    flat, count, fmt = as_stored(q), q.padded[s] // size, q.spec.format
    if fmt.packed and 8 % fmt.bits:  # put together from several planes: in a tile it takes longest
        whole = dataclasses.replace(q.spec, format=dataclasses.replace(fmt, bits=8))
        flat = dataclasses.replace(
            flat, codes=lax.optimization_barrier(storage_codes(q)), spec=whole
        )

    def one(i: Array) -> Array:
        return contracted(tile(flat, s, i * size, size))

    out = lax.map(one, jnp.arange(count, dtype=jnp.int32))  # [count, ..., size, ...]
    out = jnp.moveaxis(out, 0, axis)
    return out.reshape(*out.shape[:axis], count * size, *out.shape[axis + 2 :])
