"""An array of optimizer state in 8 bits: codes in the array's shape, and a scale for each block."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.numerics.dynamic_map import decode_dynamic, dynamic_map, encode_dynamic
from jaxquant.qtensor.storage import axis_shardings, shard_count

_TINY = float(jnp.finfo(jnp.float32).tiny)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scale"),
    meta_fields=("signed", "tile", "dtype"),
)
@dataclasses.dataclass(frozen=True)
class Blocks:
    """`r = scale * map[code]`, one scale for each tile of neighbouring values.

    Codes keep the shape of the array, so that they can be sharded, sliced or stacked like the
    parameter.

    Attributes:
      codes: uint8 of the array's shape.
      scale: float32, the largest magnitude of each tile, of the rank of `codes`; the size of an
        axis is the number of tiles along it.
      signed: whether codes are of the signed dynamic map.
      tile: sizes of a tile along each axis; the last tile of an axis may be smaller.
      dtype: name of the dtype the inner transformation uses.
    """

    codes: Array
    scale: Array
    signed: bool
    tile: tuple[int, ...]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded array."""
        return tuple(self.codes.shape)

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes and scales."""
        return sum(a.size * jnp.dtype(a.dtype).itemsize for a in (self.codes, self.scale))

    def __repr__(self) -> str:
        kind = "signed" if self.signed else "unsigned"
        if not hasattr(self.codes, "shape"):  # tree functions replace arrays by any object
            return f"Blocks({self.codes!r}, {self.scale!r}, {kind})"
        return f"Blocks({kind} 8-bit{list(self.shape)}, tile={list(self.tile)})"


def is_blocks(x: Any) -> TypeGuard[Blocks]:
    """Whether `x` is a `Blocks`; for the `is_leaf` argument of tree functions."""
    return isinstance(x, Blocks)


def tile_of(shape: tuple[int, ...], block_size: int) -> tuple[int, ...]:
    """Sizes of tiles of about `block_size` values: from the last axis on, in nearly equal parts.

    >>> tile_of((2048, 768), 256), tile_of((3, 3, 16, 64), 256), tile_of((10, 1000), 256)
    ((1, 256), (1, 1, 4, 64), (1, 250))
    """
    tile, left = [], block_size
    for size in reversed(shape):
        part = max(1, min(size, left))
        part = -(-size // -(-size // part)) if size else 1
        tile.append(part)
        left //= part
    return tuple(reversed(tile))


def zero_blocks(like: Any, signed: bool, block_size: int) -> Blocks:
    """The blocks of zeros, with the shape and sharding of `like`."""
    tile = tile_of(like.shape, block_size)
    zero = dynamic_map(signed).index(0.0)
    codes = jnp.full_like(like, zero, dtype=jnp.uint8)
    scale = magnitudes(jnp.zeros_like(codes, jnp.float32), tile)
    return Blocks(codes, scale, signed, tile, jnp.dtype(like.dtype).name)


def encode(x: Array, old: Blocks) -> Blocks:
    """Encodes `x` with the map and tiles of `old`: `scale = max |x|`, `code = nearest(x / scale)`.

    In the unsigned map, a positive value never becomes zero: with a second moment of zero and a
    first moment that is not, Adam's step would explode. The scale is finite if all values are.
    """
    x = x.astype(jnp.float32)
    scale = magnitudes(x, old.tile)
    # the reciprocal of a subnormal scale may overflow
    inverse = jnp.where(scale < _TINY, 0.0, 1.0 / jnp.maximum(scale, _TINY))
    codes = encode_dynamic(x * _spread(inverse, old.tile, x), old.signed)
    if not old.signed:
        codes = jnp.maximum(codes, (x > 0).astype(jnp.uint8))
    return dataclasses.replace(old, codes=codes, scale=scale)


def decode(q: Blocks) -> Array:
    """The values, float32.

    >>> q = encode(jnp.array([0.5, -1.0, 2.0]), zero_blocks(jnp.zeros(3), True, 256))
    >>> decode(q).tolist()[2]
    2.0
    """
    values = decode_dynamic(q.codes, q.signed)
    return values * _spread(q.scale, q.tile, values)


def magnitudes(x: Array, tile: tuple[int, ...]) -> Array:
    """The largest magnitude in each tile.

    Magnitudes are compared as integers, in vectors of 16: a floating-point maximum must handle NaN,
    which keeps XLA from vectorising it (12 times slower on a CPU). NaN compares as the largest.
    """
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    counts = _counts(x.shape, tile)
    full = tuple(n * t for n, t in zip(counts, tile, strict=True))
    if full != x.shape:
        bits = jnp.pad(bits, [(0, f - n) for f, n in zip(full, x.shape, strict=True)])
    bits = _reshape(bits, [(n, t) for n, t in zip(counts, tile, strict=True)])
    inner = tuple(range(1, bits.ndim, 2))
    if tile and tile[-1] % 16 == 0 and tile[-1] > 16 and not axis_shardings(bits):
        bits = bits.reshape(*bits.shape[:-1], tile[-1] // 16, 16)
        bits = jnp.max(bits, axis=inner)
        inner = (bits.ndim - 1,)
    return lax.bitcast_convert_type(jnp.max(bits, axis=inner), jnp.float32)


def _spread(s: Array, tile: tuple[int, ...], like: Array) -> Array:
    """Repeats each scale over its tile, to the shape of `like`."""
    for axis, (size, length) in enumerate(zip(tile, like.shape, strict=True)):
        if size > 1:
            s = _repeat(s, size, axis, length)
    return s


def _repeat(s: Array, size: int, axis: int, length: int) -> Array:
    spec = axis_shardings(s) or (None,) * s.ndim
    wide = (*s.shape[: axis + 1], size, *s.shape[axis + 1 :])
    dims = tuple(d for d in range(len(wide)) if d != axis + 1)
    sharding = P(*spec[: axis + 1], None, *spec[axis + 1 :]) if any(spec) else None
    s = lax.broadcast_in_dim(s, wide, dims, out_sharding=sharding)
    flat = (*wide[:axis], wide[axis] * size, *wide[axis + 2 :])
    s = lax.reshape(s, flat, out_sharding=P(*spec) if any(spec) else None)
    return lax.slice_in_dim(s, 0, length, axis=axis) if flat[axis] != length else s


def _counts(shape: tuple[int, ...], tile: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-n // t) for n, t in zip(shape, tile, strict=True))


def _reshape(x: Array, pairs: list[tuple[int, int]]) -> Array:
    """`[n0 t0, n1 t1, ...] -> [n0, t0, n1, t1, ...]`, with output sharding for explicit meshes."""
    shape = tuple(size for pair in pairs for size in pair)
    spec = axis_shardings(x)
    if spec is None:
        return x.reshape(shape)
    mesh = jax.typeof(x).sharding.mesh
    fits = tuple(
        s if s is None or n % shard_count(mesh, s) == 0 else None
        for (n, _), s in zip(pairs, spec, strict=True)
    )
    if fits != spec:  # shards would split a tile
        x = jax.sharding.reshard(x, NamedSharding(mesh, P(*fits)))
    return lax.reshape(x, shape, out_sharding=P(*(s for name in fits for s in (name, None))))
