"""Scales and zero points from the range of values, and codes from both."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxquant.numerics import Format, clamp, encode, is_nan, nearest_even, number, select
from jaxquant.qtensor.qspec import QSpec


def scaled_codes(
    x: Array,
    scale: Array,
    zero: Array | None,
    fmt: Format,
    *,
    key: Array | None = None,
    divide: Array | None = None,
) -> Array:
    """Codes of `x / scale + zero`, rounded and clipped to the format.

    For codebooks, `x` is multiplied by the reciprocal, except where `divide`, as in bitsandbytes.
    """
    if fmt.is_codebook:
        v = over(x, scale)
        if divide is not None:
            # without a barrier, XLA turns a division by a broadcast into a product
            each = lax.optimization_barrier(jnp.broadcast_to(scale, x.shape))
            v = jnp.where(divide, x / each, v)
    else:
        v = lax.div(x, scale)
    if fmt.is_integer:
        # amax / (amax / (qmax + 1/2)) may be one ulp short of the tie that rounds to qmin
        v = select(lax.lt(v, number(-fmt.qmax, v)), lax.mul(v, number(1 + 2**-21, v)), v)
        if zero is not None:
            v = lax.add(v, zero)
    return encode(v, fmt, key=key)


def over(x: Array, scale: Array) -> Array:
    """`x (1 / scale)` in float32, for any magnitudes of both.

    >>> over(jnp.float32(-3e38), jnp.float32(3e38)).tolist()
    -1.0
    """
    # the reciprocal of a very large scale is subnormal, which XLA flushes to 0
    unit = jnp.where(jnp.abs(scale) > 2.0**64, 2.0**-64, 1.0)
    return (x * unit) * (1.0 / (scale * unit))


def scales_over(
    x: Array, inner: tuple[int, ...], spec: QSpec, amax: Array | None = None
) -> tuple[Array, Array | None, Array | None]:
    """Scale, zero point and global scale of float32 `x`, shared over the axes `inner` (kept as 1).

    The scale of values that are not all finite is NaN, so that they dequantize to NaN; the largest
    magnitudes `amax` decide that where they are passed.
    """
    # symmetric specs need only one reduction: activations are quantized at every call
    if amax is None:
        amax = largest_magnitude(x, inner)
    if spec.symmetric and spec.range != "signed":
        low, high = -amax, amax
    else:
        high = jnp.max(x, axis=inner, keepdims=True, initial=0.0)
        low = jnp.min(x, axis=inner, keepdims=True, initial=0.0)
    scale, zero, total = scales_of_range(low, high, amax, spec)
    return select(lax.is_finite(amax), scale, jnp.nan), zero, total


def magnitude(x: Array) -> Array:
    """`|x|`, and infinity for NaN, which XLA's maximum over many values loses on a CPU.

    >>> magnitude(jnp.array([-2.0, jnp.nan])).tolist()
    [2.0, inf]
    """
    return select(is_nan(x), jnp.inf, lax.abs(x))


def largest_magnitude(x: Array, inner: tuple[int, ...]) -> Array:
    """`max |x|` over the axes `inner` (kept as 1): 0 if empty, infinite for non-finite values.

    >>> largest_magnitude(jnp.array([[-2.0, 1.0], [jnp.nan, 1.0]]), (-1,)).tolist()
    [[2.0], [inf]]
    """
    axes = tuple(a % x.ndim for a in inner)
    largest = lax.reduce_max(magnitude(x), axes)
    return lax.expand_dims(lax.max(largest, number(0, x)), axes)


def scales_of_range(
    low: Array, high: Array, amax: Array, spec: QSpec
) -> tuple[Array, Array | None, Array | None]:
    """Scale, zero point and global scale for values in `[low, high]`, `low <= 0 <= high`.

    `amax` is the largest magnitude, `max(-low, high)`. The zero point is float32, integral without
    `zero_dtype`; the global scale, if the spec has one, is shared by all of `amax`.
    """
    fmt = spec.format
    if not spec.symmetric:
        steps = fmt.qmax - fmt.qmin
        # halved first, since max - min may overflow; halving is exact, so that fusing the products
        # and the difference does not change the result
        scale = store_scale((0.5 * high - 0.5 * low) / (0.5 * steps), spec, signed=False)
        zero = -low / scale.astype(jnp.float32)
        if spec.zero_dtype is None:
            zero = nearest_even(zero)
        zero = clamp(fmt.qmin, fmt.qmin + zero, fmt.qmax)
        if spec.zero_dtype is not None:
            zero = zero.astype(spec.zero_dtype).astype(jnp.float32)
        return scale, zero, None
    if not fmt.is_integer:
        largest = max(abs(fmt.min), fmt.max)
        if spec.global_scale:
            top = float(jnp.finfo(spec.scale_dtype).max)
            total = jnp.max(amax, initial=0.0) / np.float32(largest * top)
            total = jnp.where(total > 0, jnp.maximum(total, _tiny("float32")), 1.0)
            return store_scale(amax / largest / total, spec, signed=False), None, total
        return store_scale(amax / largest, spec, signed=False), None, None
    if spec.range == "signed" and fmt.signed:
        extreme = select(high > -low, high, low)
        return store_scale(extreme / fmt.qmin, spec), None, None
    most = fmt.qmax + (0.5 if spec.range == "half" else 0.0)
    return store_scale(lax.div(amax, number(most, amax)), spec, signed=False), None, None


def _tiny(dtype: str) -> float:
    return float(jnp.finfo(dtype).tiny)


def store_scale(scale: Array, spec: QSpec, signed: bool = True) -> Array:
    """Casts scales to their stored dtype so that none is zero, subnormal or infinite.

    `signed=False` assumes that none is negative.

    Scale 0 becomes 1, and a subnormal scale the smallest normal number. Power-of-two scales are
    rounded up, so that no value of a block is clipped: `2^ceil(log2(amax / max))`. OCP
    Microscaling Formats v1.0, section 6.3, rounds down and clips instead, which on normal data
    costs 0.2 dB (mxfp4) to 1.2 dB (mxfp8). Rounding up follows Mishra et al., "Recipes for
    Pre-training LLMs with MXFP8" (2025).
    """
    info = jnp.finfo(spec.scale_dtype)
    if spec.scale_dtype == "float8_e8m0fnu":
        mantissa, exponent = jnp.frexp(scale)  # scale = mantissa * 2^exponent, mantissa >= 1/2
        exponent = jnp.where(mantissa > 0.5, exponent, exponent - 1)
        power = jnp.exp2(jnp.clip(exponent, -126, 126).astype(jnp.float32))
        return jnp.where(scale == 0, 1.0, power).astype(spec.scale_dtype)
    # the largest |q - Z| times S must stay finite, after S is rounded to its dtype
    low, high = spec.format.min, spec.format.max
    largest = max(abs(low), high) if spec.symmetric else high - low
    limit = float(jnp.finfo(jnp.float32).max) * (1 - 2 * float(info.eps))
    top = min(float(info.max), limit / max(largest, 1.0))
    stored = clamp(float(info.tiny), lax.abs(scale) if signed else scale, top)
    if signed:
        stored = select(scale < 0, -stored, stored)
    stored = select(lax.eq(scale, number(0, scale)), 1.0, stored)
    return lax.convert_element_type(stored, spec.scale_dtype)
