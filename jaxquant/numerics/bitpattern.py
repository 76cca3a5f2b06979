"""Bit patterns of floating-point formats, decoded and encoded by definition.

Only integer arithmetic on float32 bits and exact products of normal numbers are used. float32
subnormals, which bfloat16 and float8_e8m0fnu values may be, are never an operand of float
arithmetic: compiled code flushes them to zero on CPU (and on TPU).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jaxquant.numerics.formats import get
from jaxquant.numerics.records import Format
from jaxquant.numerics.rounding import bernoulli, nearest_even, stochastic

# float32 bits: all but the sign, infinity, the quiet NaN, and the smallest normal value.
_MAGNITUDE, _INFINITY, _QUIET, _NORMAL = 0x7FFFFFFF, 0x7F800000, 0x7FC00000, 0x00800000


class _Fields(NamedTuple):
    """The fields of a float format as plain integers, and the derived bit patterns."""

    format: Format
    e: int
    m: int
    bias: int

    @property
    def shift(self) -> int:
        """Number of mantissa bits that float32 has more than this format."""
        return 23 - self.m

    @property
    def wide(self) -> bool:
        """Whether the exponent range is that of float32, subnormals included."""
        return self.bias == 127

    @property
    def nan(self) -> int:
        """The pattern of the quiet NaN, without sign."""
        ones = 2**self.e - 1
        return (ones << self.m) | (1 << (self.m - 1) if self.format.has_inf else 2**self.m - 1)


def decode_bits(patterns: ArrayLike, format: Any) -> Array:
    """Decodes bit patterns.

    `E != 0: (-1)^s * 2^(E - bias) * (1 + M/2^m)`; `E == 0: (-1)^s * 2^(1 - bias) * M/2^m`; infinity
    and NaN where the format has them. Bits above the format's are ignored.

    Args:
      patterns: unsigned or signed integers of any shape, each with one code in its low bits.
      format: a floating-point format, or its name.

    Returns:
      float32 of the same shape, exact (float32 represents every value of every format).

    Raises:
      ValueError: the format is not floating-point, or patterns are not integers.

    Source: IEEE 754-2019 section 3.4; OCP OFP8 1.0; OCP MX 1.0, element and scale data types.

    >>> decode_bits(jnp.array([0b0_00_1, 0b0_01_0, 0b1_11_1]), "float4_e2m1fn").tolist()
    [0.5, 1.0, -6.0]
    """
    f = _fields(format)
    patterns = jnp.asarray(patterns)
    if not jnp.issubdtype(patterns.dtype, jnp.integer):
        raise ValueError(f"bit patterns are integers, got {patterns.dtype}")
    code = patterns.astype(jnp.uint32)
    magnitude = code & (2 ** (f.e + f.m) - 1)
    mantissa = magnitude & (2**f.m - 1)

    # Normal: fields are shifted to their float32 positions, and the bias becomes that of float32.
    bits = (magnitude << f.shift) + ((127 - f.bias) << 23)
    subnormal = magnitude < 2**f.m
    if not f.m:
        # 2^(E - bias), where 2^-127 is a float32 subnormal.
        if f.wide:
            bits = jnp.where(magnitude == 0, np.uint32(_NORMAL >> 1), bits)
    elif f.wide:
        bits = jnp.where(subnormal, mantissa << f.shift, bits)
    else:
        value = mantissa.astype(jnp.float32) * 2.0 ** (1 - f.bias - f.m)
        bits = jnp.where(subnormal, _bits(value), bits)

    if f.format.has_inf:
        top = magnitude >> f.m == 2**f.e - 1
        special = jnp.where(mantissa == 0, np.uint32(_INFINITY), np.uint32(_QUIET))
        bits = jnp.where(top, special, bits)
    elif f.format.has_nan:
        bits = jnp.where(magnitude == f.nan, np.uint32(_QUIET), bits)
    if f.format.signed:
        bits = bits | ((code >> (f.e + f.m) & 1) << 31)
    return lax.bitcast_convert_type(bits, jnp.float32)


def encode_bits(x: ArrayLike, format: Any, *, key: Array | None = None) -> Array:
    """The bit patterns of the nearest values of a format, saturating.

    Nearest, ties to the even pattern; without mantissa bits, where no pattern is even, to the
    larger value (IEEE 754-2019 section 4.3.1). Values outside `[format.min, format.max]`, even
    infinities, are clipped. With a `key`, rounding is stochastic: to one of the two neighbouring
    values, with expectation `x` for every `x` in that range. NaN becomes the format's NaN, or zero
    where it has none.

    Args:
      x: real numbers of any shape, read as float32.
      format: a floating-point format, or its name.
      key: a PRNG key for stochastic rounding.

    Returns:
      Patterns of the same shape: uint8, uint16 or uint32, the narrowest that fits the format.

    Raises:
      ValueError: the format is not floating-point, or the input is complex.

    Source: OCP OFP8 1.0, conversions in saturating mode; OCP MX 1.0, conversion to MX formats.

    >>> encode_bits(jnp.array([0.5, 1.2, -100.0]), "float4_e2m1fn").tolist()
    [1, 2, 15]
    """
    f = _fields(format)
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise ValueError(f"expected real numbers, got {x.dtype}")
    source = _bits(x.astype(jnp.float32))
    magnitude = source & _MAGNITUDE
    is_nan = magnitude > _INFINITY
    negative = (source >> 31) == 1

    # Clipped as integers, which order like magnitudes and do not flush subnormals.
    magnitude = jnp.minimum(magnitude, np.float32(f.format.max).view(np.uint32))
    if not f.format.signed:
        magnitude = jnp.where(negative, np.uint32(0), magnitude)

    if f.shift == 0:
        code = magnitude
    elif f.m:
        code = _encode_magnitude(magnitude, f, key)
    else:
        code = _encode_power(magnitude, f, key)
    if f.format.signed:
        code = code | (negative.astype(jnp.uint32) << (f.e + f.m))
    code = jnp.where(is_nan, np.uint32(f.nan if f.format.has_nan else 0), code)
    return code.astype(_pattern_dtype(f.format.bits))


def _encode_magnitude(bits: Array, f: _Fields, key: Array | None) -> Array:
    """Rounds the bits of a magnitude; a carry out of the mantissa increments the exponent."""
    code = _round_off(bits, f.shift, key)
    if f.wide:  # the same exponent range: float32 subnormals round like normals
        return code
    normal = code - ((127 - f.bias) << f.m)
    # In units of the smallest subnormal: exact, and float32 subnormals become 0.
    value = lax.bitcast_convert_type(bits, jnp.float32)
    units = jnp.minimum(value, 2.0 ** (1 - f.bias)) * 2.0 ** (f.bias - 1 + f.m)
    units = nearest_even(units) if key is None else stochastic(units, key)
    below = bits < ((1 - f.bias + 127) << 23)
    return jnp.where(below, units.astype(jnp.uint32), normal)


def _encode_power(bits: Array, f: _Fields, key: Array | None) -> Array:
    """Rounds a magnitude to a power of two, the only values of a format without mantissa."""
    bottom = 127 - f.bias  # float32's exponent field of the smallest value
    # Without mantissa bits no code is even: IEEE 754 rounds ties to the larger magnitude.
    half = _NORMAL >> 1
    if not f.wide:
        bits = jnp.maximum(bits, np.uint32(bottom << 23))
    code = (bits + half) >> 23 if key is None else _round_off(bits, 23, key)
    if not f.wide:
        return code - bottom
    # Float32 subnormals have no leading one; the codes 2^-127 and 2^-126 are the middle and the
    # upper end of their range.
    if key is None:
        up = bits >= half + half // 2
    else:
        share = jnp.maximum(bits, np.uint32(half)) - half
        up = bernoulli(jnp.minimum(share, half - 1).astype(jnp.float32) * (1 / half), key)
    return jnp.where(bits < _NORMAL, up.astype(jnp.uint32), code)


def _round_off(bits: Array, shift: int, key: Array | None) -> Array:
    """Drops the low bits: to nearest, ties to even, or stochastically if there is a `key`."""
    if key is None:
        odd = (bits >> shift) & 1
        return (bits + ((1 << (shift - 1)) - 1) + odd) >> shift
    noise = jax.random.bits(key, bits.shape, jnp.uint32) >> (32 - shift)
    return (bits + noise) >> shift


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.uint32)


def _pattern_dtype(bits: int) -> jnp.dtype:
    return jnp.dtype("uint8" if bits <= 8 else "uint16" if bits <= 16 else "uint32")


def _fields(format: Any) -> _Fields:
    fmt = get(format)
    if (
        not isinstance(fmt, Format)
        or fmt.exponent_bits is None
        or fmt.mantissa_bits is None
        or fmt.bias is None
    ):
        raise ValueError(f"expected a floating-point format, got {fmt.name!r}")
    return _Fields(fmt, fmt.exponent_bits, fmt.mantissa_bits, fmt.bias)
