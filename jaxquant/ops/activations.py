"""Quantization of activations: by the rules of weights at run time, or on calibrated grids."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxquant.numerics import Format, clamp, decode, encode, nearest_even
from jaxquant.ops.operands import int8_codes, integer_range
from jaxquant.qtensor import (
    PerChannel,
    PerTensor,
    QSpec,
    QuantParams,
    dequantize,
    encode_array,
    scaled_codes,
    scales_over,
)


def shared_axes(spec: QSpec, contracted: Sequence[int], ndim: int) -> tuple[int, ...] | None:
    """Axes of an activation that share one scale; `None` unless they include all contracted ones.

    `PerTensor()` shares over all, `PerChannel()` over those contracted: one scale for each row.

    >>> shared_axes(QSpec("int8"), (2,), 3), shared_axes(QSpec("int8", PerTensor()), (2,), 3)
    ((2,), (0, 1, 2))
    """
    gran = spec.granularity
    if isinstance(gran, PerTensor):
        return tuple(range(ndim))
    if not isinstance(gran, PerChannel) or gran.size != 1:
        return None
    if gran.axes is None:
        return tuple(sorted(contracted))
    named = (gran.axes,) if isinstance(gran.axes, int) else gran.axes
    scaled = {a % ndim for a in named}
    return None if scaled & set(contracted) else tuple(a for a in range(ndim) if a not in scaled)


def has_zero(spec: QSpec) -> bool:
    """Whether the int8 codes of a spec have a zero point."""
    return not spec.symmetric or (spec.format.is_integer and spec.format.qmax > 127)


def quantize_activation(
    x: Array, spec: QSpec, shared: Sequence[int], key: Array | None = None
) -> tuple[Array, Array, Array | None]:
    """Codes, scale and zero point of an activation, the scale shared over the axes `shared`.

    `q = clip(round(x / S) + Z)`, computed in float32. Codes of integer formats are int8: unsigned
    8-bit ones are shifted by 128, `Z = -128`. Codes of float formats have the format's dtype, or
    are decoded to float32 if it has none. A non-finite value makes its scale NaN, and so products.

    Args:
      x: float array.
      spec: format and range rule; its granularity is ignored.
      shared: axes that share one scale, as `shared_axes` returns them.
      key: PRNG key for stochastic rounding; `None` rounds to nearest.

    Returns:
      `(codes, scale, zero)`, the last two of rank `x.ndim`, `zero` int32 or `None`.

    >>> codes, scale, zero = quantize_activation(jnp.array([[1.0, -2.0]]), QSpec("int8"), (1,))
    >>> codes.tolist(), zero
    ([[64, -128]], None)
    """
    return _quantized(x, key, spec, tuple(shared))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _quantized(
    x: Array, key: Array | None, spec: QSpec, inner: tuple[int, ...]
) -> tuple[Array, Array, Array | None]:
    """Activations with equal shapes and specs share one trace and one lowered function."""
    x, fmt = x.astype(jnp.float32), spec.format
    scale, zero, total = scales_over(x, inner, spec)
    scale = scale.astype(jnp.float32)
    if total is not None:
        scale = scale * total
    codes = scaled_codes(x, scale, zero, fmt, key=key)
    if integer_range(fmt) is None or not fmt.is_integer:
        return codes, scale, None
    codes, shift = int8_codes(codes, fmt)
    if zero is not None:
        return codes, scale, zero.astype(jnp.int32) - shift
    return codes, scale, jnp.full((1,) * x.ndim, -shift, jnp.int32) if shift else None


def on_grid(x: Array, grid: QuantParams, spec: QSpec) -> Array:
    """Codes of an activation on a calibrated grid: `q = clip(round(x (1 / S)) + Z)`, int8.

    8-bit unsigned codes are shifted as in `quantize_activation`; 8-bit float codes have the
    format's dtype. Values outside the grid, also infinite ones, are clipped to it; NaN becomes 0.

    >>> grid = QuantParams(jnp.float32(0.5), jnp.int32(-128))
    >>> on_grid(jnp.array([0.0, 1.0, 1000.0]), grid, QSpec("uint8", PerTensor())).tolist()
    [-128, -126, 127]
    """
    # not by a division: XLA may replace it by this or not, and results would differ
    v, fmt = x.astype(jnp.float32) * (1.0 / grid.scale), spec.format
    if not fmt.is_integer:
        return encode(v, fmt)
    low, high = int8_limits(fmt)
    # by way of int32, which a CPU converts to int8 faster than float32
    codes = clamp(-512.0, nearest_even(v), 512.0).astype(jnp.int32)
    codes = codes if grid.zero_point is None else codes + grid.zero_point
    return clamp(low, codes, high).astype(jnp.int8)


def grid_of(scale: Array, zero_point: Array | None, spec: QSpec, source: str = "") -> QuantParams:
    """The grid of a scale and a zero point, the latter in the format's own codes.

    >>> int(grid_of(jnp.float32(1.0), jnp.int32(3), QSpec("uint8", symmetric=False)).zero_point)
    -125
    """
    fmt = spec.format
    shift = 128 if fmt.is_integer and fmt.qmax > 127 else 0
    if zero_point is None:
        zero = jnp.full(scale.shape, -shift, jnp.int32) if shift else None
    else:
        zero = zero_point.astype(jnp.int32) - shift
    return QuantParams(scale.astype(jnp.float32), zero, spec, source)


def fake_on_grid(x: Array, grid: QuantParams, spec: QSpec) -> Array:
    """An activation rounded to a calibrated grid, in its own dtype.

    >>> grid = QuantParams(jnp.float32(0.5), None)
    >>> fake_on_grid(jnp.array([0.7, 100.0]), grid, QSpec("int8", PerTensor())).tolist()
    [0.5, 63.5]
    """
    codes = on_grid(x, grid, spec)
    values = codes.astype(jnp.float32) if spec.format.is_integer else decode(codes, spec.format)
    if grid.zero_point is not None:
        values = values - grid.zero_point.astype(jnp.float32)
    return (values * grid.scale).astype(x.dtype)


def own_zero_point(grid: QuantParams, spec: QSpec) -> Array | None:
    """The zero point of a grid in the format's own codes: the inverse of `grid_of`.

    >>> grid = grid_of(jnp.float32(1.0), jnp.int32(3), QSpec("uint8", symmetric=False))
    >>> int(own_zero_point(grid, QSpec("uint8", symmetric=False)))
    3
    """
    if grid.zero_point is None:
        return None
    return grid.zero_point + (spec.format.qmin - int8_limits(spec.format)[0])


def int8_limits(fmt: Format) -> tuple[int, int]:
    """The least and greatest code of an integer format, as int8.

    >>> int8_limits(QSpec("uint8").format), int8_limits(QSpec("int4").format)
    ((-128, 127), (-8, 7))
    """
    shift = 128 if fmt.qmax > 127 else 0
    return fmt.qmin - shift, fmt.qmax - shift


def fake(x: Array, spec: QSpec, contracted: Sequence[int], key: Array | None = None) -> Array:
    """An activation quantized by `spec` and dequantized, in its own dtype.

    Args:
      x: float array.
      spec: any granularity; axes that it leaves open follow from `contracted`.
      contracted: axes of `x` that will be summed over.
      key: PRNG key for stochastic rounding; `None` rounds to nearest.

    >>> fake(jnp.array([[1.0, -127.0]]), QSpec("int8", range="qmax"), (1,)).tolist()
    [[1.0, -127.0]]
    """
    return dequantize(encode_array(x, spec.at(tuple(contracted), x.ndim), key=key))
