"""Codes of 1 to 7 bits as a stream of bytes along the last axis, in a layout for vector units.

The axis is padded with zeros to a multiple of 8 and split into tiles of `tile_size` codes; a tile
of t codes takes `t * bits / 8` consecutive bytes, so a sharded axis splits at tiles. Within a tile
the bits of a code are split over planes, the high bits in the widest: 3 = 2 + 1, 5 = 4 + 1,
6 = 4 + 2 and 7 = 4 + 2 + 1. A plane of w bits is `t * w / 8` bytes, and its byte j contains the
codes `j, j + t*w/8, j + 2*t*w/8, ...`, the first in the lowest bits. Unpacking then takes shifts,
masks and one concatenation, but no interleave of neighbours, which is slow on vector units.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

_TILES = (64, 32, 16, 8)
_WIDTHS = (4, 2, 1)


def padded_size(size: int) -> int:
    """Codes stored for an axis of `size` codes: the next multiple of 8.

    >>> [padded_size(n) for n in (0, 1, 8, 100)]
    [0, 8, 8, 104]
    """
    return -(-size // 8) * 8


def tile_size(size: int) -> int:
    """Codes per tile: the largest of 64, 32, 16 and 8 that divides `padded_size(size)`.

    >>> [tile_size(n) for n in (1, 16, 90, 100, 384)]
    [8, 16, 32, 8, 64]
    """
    return next(t for t in _TILES if padded_size(size) % t == 0)


def packed_bytes(size: int, bits: int) -> int:
    """Bytes for an axis of `size` codes of `bits` bits; `ValueError` unless 1 <= bits <= 7.

    >>> packed_bytes(128, 4), packed_bytes(9, 3)
    (64, 6)
    """
    _check_bits(bits)
    return padded_size(size) * bits // 8


def pack(codes: ArrayLike, bits: int, *, axis: int = -1) -> Array:
    """Packs the low bits of integer codes along an axis, `n` codes into `packed_bytes(n, bits)`.

    Signed codes keep their two's complement bits. The module docstring describes the layout.
    Raises `ValueError` for bits outside 1 to 7, codes that are not integers, or a scalar.

    >>> pack(jnp.arange(8, dtype=jnp.uint8), 4).tolist()
    [64, 81, 98, 115]
    """
    _check_bits(bits)
    codes = jnp.asarray(codes)
    if not jnp.issubdtype(codes.dtype, jnp.integer) or codes.ndim == 0:
        raise ValueError(
            f"pack takes integer codes with at least one axis, got {codes.dtype}{codes.shape}"
        )
    axis %= codes.ndim
    lead, size, rest = codes.shape[:axis], codes.shape[axis], codes.shape[axis + 1 :]
    tile, padded = tile_size(size), padded_size(size)
    more = [(0, padded - size if a == axis else 0) for a in range(codes.ndim)]
    codes = jnp.pad(codes.astype(jnp.uint8), more)
    tiles = codes.reshape(*lead, padded // tile, tile, *rest)
    planes = []
    for width, shift in _planes(bits):
        plane = (tiles >> shift) & (2**width - 1)
        per_byte = 8 // width
        parts = jnp.split(plane, per_byte, axis=axis + 1)
        joined = parts[0]
        for k in range(1, per_byte):
            joined = joined | (parts[k] << (k * width))
        planes.append(joined)
    packed = planes[0] if len(planes) == 1 else jnp.concatenate(planes, axis=axis + 1)
    return packed.reshape(*lead, padded * bits // 8, *rest)


def unpack(packed: ArrayLike, bits: int, size: int, signed: bool) -> Array:
    """Inverse of `pack`: uint8 `[..., packed_bytes(size, bits)]` to codes `[..., size]`.

    Codes are int8, sign-extended, if `signed`, else uint8. Raises `ValueError` for bits outside 1
    to 7, or bytes whose dtype or last axis differs from that of `pack` for `size` codes.

    >>> unpack(pack(jnp.array([-4, 3, 0]), 3), 3, 3, signed=True).tolist()
    [-4, 3, 0]
    """
    packed = jnp.asarray(packed)
    expected = packed_bytes(size, bits)
    if packed.dtype != jnp.uint8 or packed.shape[-1:] != (expected,):
        raise ValueError(
            f"{size} codes of {bits} bits are uint8[..., {expected}], "
            f"got {packed.dtype}{packed.shape}"
        )
    lead = packed.shape[:-1]
    tile, padded = tile_size(size), padded_size(size)
    tiles = packed.reshape(*lead, padded // tile, tile * bits // 8)
    planes = _planes(bits)
    # A tile consists of runs of codes whose bits are consecutive bytes, with one shift, in every
    # plane. One concatenation of unpacked runs is up to 4 times faster on CPU than one per plane.
    run = tile * planes[-1][0] // 8
    runs = []
    for first in range(0, tile, run):
        codes, plane = None, 0
        for width, shift in planes:
            length = tile * width // 8
            turn, byte = divmod(first, length)
            part = tiles[..., plane + byte : plane + byte + run] >> (turn * width)
            part = (part & (2**width - 1)) << shift
            codes = part if codes is None else codes | part
            plane += length
        assert codes is not None
        # Shifted left until the sign bit is on top, then arithmetically back, which extends it.
        runs.append((codes << (8 - bits)).astype(jnp.int8) >> (8 - bits) if signed else codes)
    return jnp.concatenate(runs, axis=-1).reshape(*lead, padded)[..., :size]


def _planes(bits: int) -> list[tuple[int, int]]:
    """`(width, shift)` of each plane, widest and highest first."""
    planes, left = [], bits
    for width in _WIDTHS:
        if left >= width:
            left -= width
            planes.append((width, left))
    return planes


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 7:
        raise ValueError(f"codes of 1 to 7 bits are packed, got {bits} bits")
