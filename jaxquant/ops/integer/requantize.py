"""Rescales int32 sums to codes of the next layer, by a float32 or an int32 multiplier."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def rescaled(total: Array, multiplier: Array, shift: Array | None = None) -> Array:
    """`round(total * M)` as float32 or int32, to nearest.

    Without `shift` the product is float32, and ties round to even. With it,
    `M = multiplier 2^-31 2^-shift`, all in int32: a rounding doubling high multiplication, then a
    rounding right shift, ties away from zero. A negative `shift` first shifts left and saturates.

    Args:
      total: int32 sums.
      multiplier: float32, or int32 with `shift`; any shape that broadcasts.
      shift: int32 like `multiplier`, from -31 to 31.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference" (2018), section 2.2; gemmlowp's
    `SaturatingRoundingDoublingHighMul` and `RoundingDivideByPOT`.

    >>> total = jnp.array([100, -100, 7], jnp.int32)
    >>> rescaled(total, jnp.float32(0.055)).tolist()
    [6.0, -6.0, 0.0]
    >>> rescaled(total, *fixed_point(jnp.float32(0.055))).tolist()
    [6, -6, 0]
    """
    if shift is None:
        return jnp.round(total.astype(jnp.float32) * multiplier)
    left, right = jnp.maximum(-shift, 0), jnp.maximum(shift, 0)
    most, least = jnp.int32(2**31 - 1), jnp.int32(-(2**31))
    shifted = total << left
    shifted = jnp.where(total > (most >> left), most, shifted)
    shifted = jnp.where(total < (least >> left), least, shifted)
    return _divide_by_power(_high_product(shifted, multiplier), right)


def fixed_point(scale: Array) -> tuple[Array, Array]:
    """`(multiplier, shift)`, int32, with `scale ~ multiplier 2^-31 2^-shift`.

    `2^30 <= |multiplier| < 2^31`: 31 bits hold the 24 of float32 exactly. A scale of 0 or below
    2^-32 is `(0, 0)`.

    >>> [int(x) for x in fixed_point(jnp.float32(0.75))]
    [1610612736, 0]
    """
    mantissa, exponent = jnp.frexp(scale.astype(jnp.float32))  # |mantissa| in [1/2, 1)
    # exact: a mantissa has 24 bits
    multiplier = (mantissa * np.float32(2.0**24)).astype(jnp.int32) << 7
    tiny = (scale == 0) | (exponent < -31)
    shift = jnp.clip(-exponent, -31, 31).astype(jnp.int32)
    return jnp.where(tiny, 0, multiplier), jnp.where(tiny, 0, shift)


def _high_product(a: Array, b: Array) -> Array:
    """`round(a b / 2^31)` of int32, ties towards plus infinity, without 64-bit integers.

    In gemmlowp `-2^31` times itself saturates; here `b` is never `-2^31`.
    """
    a, b = jnp.broadcast_arrays(a, b)
    negative = (a < 0) ^ (b < 0)
    x, y = (_magnitude(v) for v in (a, b))
    xl, xh, yl, yh = x & 0xFFFF, x >> 16, y & 0xFFFF, y >> 16
    low = xl * yl
    middle = xh * yl + (low >> 16)  # below 2^32: (2^15)(2^16 - 1) + 2^16
    cross = xl * yh + (middle & 0xFFFF)
    high = xh * yh + (middle >> 16) + (cross >> 16)
    low = (cross << 16) | (low & 0xFFFF)
    # the nudge of 2^30 rounds; one less for a negative product, so that all ties round up
    nudge = jnp.where(negative, jnp.uint32(2**30 - 1), jnp.uint32(2**30))
    nudged = low + nudge
    high = high + (nudged < low).astype(jnp.uint32)
    size = ((high << 1) | (nudged >> 31)).astype(jnp.int32)
    return jnp.where(negative, -size, size)


def _magnitude(v: Array) -> Array:
    bits = lax.bitcast_convert_type(v, jnp.uint32)
    return jnp.where(v < 0, jnp.uint32(0) - bits, bits)


def _divide_by_power(x: Array, exponent: Array) -> Array:
    """`round(x / 2^exponent)` of int32, ties away from zero."""
    mask = (jnp.int32(1) << exponent) - 1  # exponent 31: all bits but the sign
    mask = jnp.where(exponent == 31, jnp.int32(2**31 - 1), mask)
    rest = x & mask
    half = (mask >> 1) + (x < 0).astype(jnp.int32)
    return (x >> exponent) + (rest > half).astype(jnp.int32)
