"""Conversion between the axis order of an array and its storage order, blocks and bytes."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.numerics import decode, unpack
from jaxquant.qtensor.nested import unnested
from jaxquant.qtensor.tensor import QTensor

# Codebooks up to this size are decoded by a tree of selects over the bits of a code: as fast as a
# gather on a CPU, and elementwise, which needs no output sharding on meshes with explicit axes.
_SELECT = 16


def to_storage(q: QTensor, w: Array) -> Array:
    """A core array in the storage order of `q`: axes permuted, merged, padded with zeros."""
    order = [a % w.ndim for merged in q.axes for a in merged]
    w = jnp.transpose(w, order) if order != list(range(w.ndim)) else w
    w = w.reshape(q.storage)
    return pad_to(w, q.padded)


def pad_to(w: Array, shape: tuple[int, ...]) -> Array:
    """Pads with zeros at the end of each axis up to `shape`."""
    if w.shape == shape:
        return w
    return jnp.pad(w, [(0, n - m) for n, m in zip(shape, w.shape, strict=True)])


def blocked(q: QTensor, x: Array) -> Array:
    """`[*batch, p0, p1, ...] -> [*batch, g0, b0, g1, b1, ...]`, `g b = p`."""
    lead = x.ndim - len(q.axes)
    pairs = (n for pair in zip(q.groups, q.blocks, strict=True) for n in pair)
    shape = (*x.shape[:lead], *pairs)
    placed = axis_shardings(x)
    if placed is None:
        return x.reshape(shape)
    mesh = jax.typeof(x).sharding.mesh
    fits = [
        g == 1 or g % shard_count(mesh, s) == 0
        for g, s in zip(q.groups, placed[lead:], strict=True)
    ]
    if not all(fits):  # shards would split a group, which no sharding of the result can express
        shards = (s if ok else None for s, ok in zip(placed[lead:], fits, strict=True))
        placed = (*placed[:lead], *shards)
        x = jax.sharding.reshard(x, NamedSharding(mesh, P(*placed)))
    halves = (
        (s, None) if g > 1 else (None, s) for g, s in zip(q.groups, placed[lead:], strict=True)
    )
    return lax.reshape(x, shape, out_sharding=P(*placed[:lead], *(s for h in halves for s in h)))


def shard_count(mesh: Any, names: Any) -> int:
    """How many shards an axis has that is divided over these axes of a mesh."""
    names = names if isinstance(names, tuple) else () if names is None else (names,)
    return math.prod(mesh.shape[name] for name in names)


def unblocked(q: QTensor, x: Array) -> Array:
    """Inverse of `blocked`."""
    lead = x.ndim - 2 * len(q.axes)
    shape = (*x.shape[:lead], *q.padded)
    placed = axis_shardings(x)
    if placed is None:
        return x.reshape(shape)
    pairs = zip(placed[lead::2], placed[lead + 1 :: 2], strict=True)
    return lax.reshape(x, shape, out_sharding=P(*placed[:lead], *(g or b for g, b in pairs)))


def axis_shardings(x: Array) -> tuple[Any, ...] | None:
    """The sharding of each axis under an explicit mesh, where reshapes need an `out_sharding`."""
    spec = jax.typeof(x).sharding.spec
    return None if all(s is None for s in spec) else (*spec, *(None,) * (x.ndim - len(spec)))


def spread(q: QTensor, s: Array) -> Array:
    """`[*batch, g0, g1, ...] -> [*batch, g0, 1, g1, 1, ...]`, to broadcast with `blocked` codes."""
    lead = s.shape[: s.ndim - len(q.axes)]
    return s.reshape(*lead, *(n for g in q.groups for n in (g, 1)))


def storage_codes(q: QTensor) -> Array:
    """Unpacked codes `[*batch, *padded storage]`, in the format's storage dtype."""
    fmt = q.spec.format
    if not fmt.packed:
        return q.codes
    return unpack(q.codes, fmt.bits, q.padded[-1], fmt.signed and fmt.is_integer)


def storage_scale(q: QTensor) -> Array:
    """Scales `[*batch, *groups]` in float32, decoded, the global scale multiplied in."""
    if q.nested is not None:
        return unnested(q.scale, q.nested)
    scale = q.scale.astype(jnp.float32)
    if q.global_scale is None:
        return scale
    lead = q.global_scale.shape
    return scale * q.global_scale.reshape(lead + (1,) * (scale.ndim - len(lead)))


def storage_values(q: QTensor) -> Array:
    """`q - Z` or `codebook[q]` in float32, unscaled, `[*batch, *padded storage]`."""
    codes = storage_codes(q)
    if q.codebook is not None:
        return looked_up(q, codes, q.codebook)
    values = decode(codes, q.spec.format, jnp.float32)
    if q.zero_point is None:
        return values
    zero = spread(q, q.zero_point.astype(jnp.float32))
    return unblocked(q, blocked(q, values) - zero)


def looked_up(q: QTensor, codes: Array, table: Array) -> Array:
    """The values `[*batch, *padded storage]` of `codes` in a learned codebook.

    Args:
      q: how codes are stored.
      codes: unpacked, `[*batch, *padded storage]`.
      table: `[*batch, levels]`, or `[*batch, *groups, levels]` where `q.grouped_codebook`.
    """
    levels, grouped = table.shape[-1], q.grouped_codebook
    at = blocked(q, codes) if grouped else codes
    if levels > _SELECT:
        index = at.astype(jnp.int32)
        if grouped:
            number = jnp.arange(math.prod(q.groups), dtype=jnp.int32).reshape(q.groups)
            index = index + levels * spread(q, number)
        flat = table.reshape(*q.batch, -1)
        entries = jnp.take_along_axis(flat, index.reshape(*q.batch, -1), axis=-1, mode="clip")
        return entries.reshape(codes.shape)

    def entry(i: int) -> Array:
        level = table[..., min(i, levels - 1)]
        return spread(q, level) if grouped else level.reshape(*q.batch, *(1,) * len(q.axes))

    values = [entry(i) for i in range(1 << (levels - 1).bit_length())]
    bit = 1
    while len(values) > 1:  # the lowest bit first
        odd = (at & bit) != 0
        values = [jnp.where(odd, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
        bit *= 2
    values = [jnp.broadcast_to(values[0], at.shape)]
    return unblocked(q, values[0]) if grouped else values[0]


def from_storage(q: QTensor, x: Array) -> Array:
    """Inverse of `to_storage`, batch axes allowed: unpads, splits, permutes."""
    nb = x.ndim - len(q.axes)
    for axis, (have, want) in enumerate(zip(q.padded, q.storage, strict=True)):
        if have != want:
            x = lax.slice_in_dim(x, 0, want, axis=nb + axis)
    order = [a for merged in q.axes for a in merged]
    x = x.reshape(*x.shape[:nb], *(q.core[a] for a in order))
    rank = len(q.core)
    place = [nb + order.index(a - rank) for a in range(rank)]
    perm = list(range(nb)) + place
    return jnp.transpose(x, perm) if perm != list(range(x.ndim)) else x
