"""The dynamic 8-bit map: 256 values in [-1, 1] or [0, 1], finest near zero, and its codes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding

_DECADES = 7


@functools.cache
def dynamic_map(signed: bool) -> tuple[float, ...]:
    """The 256 values, ascending, rounded to float32.

    For `i = 0 .. 6`: the centres of `n = 2^i` equal parts of `[0.1, 1]` (`2^(i+1)` without sign),
    times `10^(i - 6)`; with their negatives if signed; 0 and 1. There is no -1.

    Source: Dettmers, "8-Bit Approximations for Parallelism in Deep Learning" (2016); Dettmers et
    al., "8-bit Optimizers via Block-wise Quantization" (2021), section 2.

    >>> signed = dynamic_map(True)
    >>> len(signed), signed[127], f"{signed[128]:.2e}", signed[255]
    (256, 0.0, '5.50e-07', 1.0)
    """
    positive: list[float] = []
    for i in range(_DECADES):
        n = 2**i if signed else 2 ** (i + 1)
        k = np.arange(n)
        positive += (10.0 ** (i - 6) * (0.1 + 0.9 * (k + 0.5) / n)).tolist()
    values = [*(-v for v in reversed(positive)), 0.0] if signed else [0.0]
    return tuple(np.asarray([*values, *positive, 1.0], np.float32).tolist())


def encode_dynamic(x: Array, signed: bool) -> Array:
    """The codes of the values nearest to `x`, exactly.

    Ties go to the smaller magnitude. Values beyond the ends, infinities included, take the nearest
    end; in the unsigned map, negative values take the code of zero. NaN takes the code of one end.

    Exponent and leading mantissa bits (6 of them, 7 if unsigned) select one of 1,400 or 2,900
    cells, each with at most one bound between two values. One lookup gives a cell's lowest code and
    its bound, encoded so that adding the remaining bits carries into the code where they exceed the
    bound.

    Args:
      x: float32 of any shape.
      signed: whether to use the signed map.

    Returns:
      uint8 of the same shape.

    >>> encode_dynamic(jnp.array([-2.0, 0.0, 1.0]), True).tolist()
    [0, 127, 255]
    """
    table, lowest, shift = _cells(signed)
    bits = lax.bitcast_convert_type(x, jnp.int32)
    magnitude = bits & 0x7FFFFFFF if signed else jnp.maximum(bits, 0)
    cell = jnp.clip((magnitude >> shift) - lowest, 0, len(table) - 1)
    # the lookup has a single use, so that XLA fuses it with the surrounding operations
    level = (_look_up(table, cell) + (magnitude & ((1 << shift) - 1))) >> shift
    if signed:
        level = jnp.where(bits < 0, jnp.maximum(127 - level, 0), 127 + level)
    return level.astype(jnp.uint8)


def decode_dynamic(codes: Array, signed: bool) -> Array:
    """The values of uint8 codes, float32 of the same shape.

    >>> decode_dynamic(jnp.array([127, 255], jnp.uint8), True).tolist()
    [0.0, 1.0]
    """
    return _look_up(np.asarray(dynamic_map(signed), np.float32), codes)


@functools.cache
def _cells(signed: bool) -> tuple[np.ndarray, int, int]:
    """Table of cells, the number of its first cell, and the number of bits a cell ignores.

    An entry is `code << shift | (2^shift - 1 - bound)`, `bound` the remaining bits of the largest
    float32 that `code` encodes.
    """
    values = np.asarray(dynamic_map(signed), np.float64)
    values = values[values >= 0]
    middle = 0.5 * (values[1:] + values[:-1])  # exact in float64
    bound = middle.astype(np.float32)
    above = bound.astype(np.float64) > middle
    bits = np.where(above, np.nextafter(bound, np.float32(0)), bound).view(np.int32)
    shift = 17 if signed else 16
    last = int(np.float32(1).view(np.int32)) >> shift
    first = int(bits[0]) >> shift
    table = [0]  # for all smaller magnitudes
    for cell in range(first, last):
        inside = bits[bits >> shift == cell]
        assert inside.size <= 1, "a cell holds one bound"
        code = int(np.count_nonzero(bits < (cell << shift)))
        rest = int(inside[0]) & ((1 << shift) - 1) if inside.size else (1 << shift) - 1
        table.append(code << shift | ((1 << shift) - 1 - rest))
    table.append((len(values) - 1) << shift)  # 1 and above, clipped cells included
    return np.asarray(table, np.int32), first - 1, shift


def _look_up(table: np.ndarray, index: Array) -> Array:
    sharding = jax.typeof(index).sharding
    if isinstance(sharding, NamedSharding) and any(s is not None for s in sharding.spec):
        # under a mesh with explicit axes a gather needs an output sharding
        return jnp.asarray(table).at[index].get(mode="promise_in_bounds", out_sharding=sharding)
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds")
