"""Convolutions of arrays: their static parameters, and sums in float32 or int32."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxquant.ops import lowering
from jaxquant.ops.operands import result_dtype
from jaxquant.qtensor import QSpec


@dataclasses.dataclass(frozen=True)
class Conv:
    """The static parameters of one convolution."""

    strides: tuple[int, ...]
    padding: Any
    lhs_dilation: tuple[int, ...] | None
    rhs_dilation: tuple[int, ...] | None
    numbers: lax.ConvDimensionNumbers
    groups: int
    batch_groups: int
    precision: Any
    preferred: Any
    activations: QSpec | None

    def __call__(self, x: Array, w: Array) -> Array:
        """The convolution, both operands in their common dtype."""
        if x.dtype != w.dtype:
            dtype = result_dtype(x.dtype, w.dtype, None)
            x, w = x.astype(dtype), w.astype(dtype)
        return lax.conv_general_dilated(
            x, w, self.strides, self.padding, self.lhs_dilation, self.rhs_dilation, self.numbers,
            self.groups, self.batch_groups, self.precision, self.preferred,
        )  # fmt: skip

    def per_batch(self, s: Array) -> Array:
        """`[n]` or `[1]` along the image's batch, expanded to broadcast with the result."""
        return self._expand(s, self.numbers.out_spec[0])

    def per_channel(self, s: Array) -> Array:
        """`[out]` or `[1]` of the kernel, expanded to broadcast with the result."""
        return self._expand(s, self.numbers.out_spec[1])

    def _expand(self, s: Array, axis: int) -> Array:
        return lax.expand_dims(s, [a for a in range(len(self.numbers.out_spec)) if a != axis])


def conv_of(
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None,
    rhs_dilation: Sequence[int] | None,
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int,
    batch_group_count: int,
    precision: Any,
    preferred_element_type: Any,
) -> Conv:
    """The static parameters of a `lax.conv_general_dilated`, whose argument names these are."""
    return Conv(
        tuple(window_strides),
        padding if isinstance(padding, str) else tuple(map(tuple, padding)),
        None if lhs_dilation is None else tuple(lhs_dilation),
        None if rhs_dilation is None else tuple(rhs_dilation),
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        precision,
        None if preferred_element_type is None else jnp.dtype(preferred_element_type),
        None,
    )


def window_sum(conv: Conv, x: Array, w: Array) -> Array:
    """The convolution in float32, the only result of GPU kernels; integers are summed exactly."""
    integer = jnp.issubdtype(x.dtype, jnp.integer)
    kind = jnp.dtype(jnp.int32 if integer else jnp.float32)
    exact = dataclasses.replace(conv, preferred=kind, precision=None if integer else conv.precision)

    def direct() -> Array:
        return exact(x, w).astype(jnp.float32)

    spec = conv.numbers.rhs_spec
    taps = math.prod(w.shape[a] for a in spec[2:])
    if lowering.taps_win(conv.groups, w.shape[spec[1]], taps):
        return lowering.by_platform(cpu=lambda: _taps(conv, x, w), default=direct)
    return direct()


def window_sum_int32(
    conv: Conv, x: Array, w: Array, zero_point: Array | None, windows: bool
) -> tuple[Array, Array | None]:
    """The convolution of int8 codes in int32, padded with `zero_point`, the code of 0.

    With `windows`, also the sum of `x` over each window, in the result's axes: by `reduce_window`,
    so that a zero point of the kernel costs no second convolution.
    """
    if zero_point is not None or windows:
        pads, conv = padding(conv, x, w)
        fill = jnp.int8(0) if zero_point is None else zero_point.astype(jnp.int8)
        x = pad(x, pads, fill)
    exact = dataclasses.replace(conv, preferred=jnp.dtype(jnp.int32), precision=None)
    spec = conv.numbers.rhs_spec
    taps = math.prod(w.shape[a] for a in spec[2:])
    if lowering.taps_win(conv.groups, w.shape[spec[1]], taps):
        total = lowering.by_platform(
            cpu=lambda: _taps(conv, x, w, jnp.int32), default=lambda: exact(x, w)
        )
    else:
        total = exact(x, w)
    return total, _windows(conv, x, w) if windows else None


def _windows(conv: Conv, x: Array, w: Array) -> Array:
    """The sum of the padded `x` over each window and group of input channels."""
    image, spec, out = conv.numbers.lhs_spec, conv.numbers.rhs_spec, conv.numbers.out_spec
    groups = conv.groups
    shape = list(x.shape)
    shape[image[1] : image[1] + 1] = [groups, x.shape[image[1]] // groups]
    sums = jnp.sum(x.reshape(shape), axis=image[1] + 1, dtype=jnp.int32)
    window, strides, dilation = [1] * x.ndim, [1] * x.ndim, [1] * x.ndim
    for i, a in enumerate(image[2:]):
        window[a], strides[a] = w.shape[spec[2 + i]], conv.strides[i]
        dilation[a] = (conv.rhs_dilation or (1,) * len(conv.strides))[i]
    sums = lax.reduce_window(
        sums, jnp.int32(0), lax.add, window, strides, "VALID", window_dilation=dilation
    )
    sums = jnp.transpose(sums, [image[out.index(a)] for a in range(x.ndim)])
    return jnp.repeat(sums, w.shape[spec[0]] // groups, axis=out[1])


def _taps(conv: Conv, x: Array, w: Array, kind: Any = jnp.float32) -> Array:
    """A depthwise convolution as a sum of shifted products, one for each window position."""
    pads, conv = padding(conv, x, w)
    x = pad(x, pads)
    image, kernel = conv.numbers.lhs_spec, conv.numbers.rhs_spec
    channels, outputs = x.shape[image[1]], w.shape[kernel[0]]
    w = jnp.transpose(w, (*kernel[2:], kernel[0], kernel[1]))  # [*window, out, 1]
    dilation = conv.rhs_dilation or (1,) * len(conv.strides)
    x = jnp.repeat(x.astype(kind), outputs // channels, axis=image[1])
    total: Array | None = None
    for tap in itertools.product(*(range(n) for n in w.shape[:-2])):
        start, stop, step = [0] * x.ndim, list(x.shape), [1] * x.ndim
        for i, a in enumerate(image[2:]):
            reach = x.shape[a] - ((w.shape[i] - 1) * dilation[i] + 1)
            start[a] = tap[i] * dilation[i]
            stop[a] = start[a] + reach + 1
            step[a] = conv.strides[i]
        weights = w[tap][:, 0].astype(kind)
        weights = lax.expand_dims(weights, [a for a in range(x.ndim) if a != image[1]])
        product = lax.slice(x, start, stop, step) * weights
        total = product if total is None else total + product
    assert total is not None
    return jnp.transpose(total, [image[conv.numbers.out_spec.index(a)] for a in range(x.ndim)])


def padding(conv: Conv, x: Array, w: Array) -> tuple[list[tuple[int, int, int]], Conv]:
    """The `lax.pad` configuration of the image, and the convolution without padding."""
    spatial = conv.numbers.lhs_spec[2:]
    dilation = conv.rhs_dilation or (1,) * len(spatial)
    kernel = [w.shape[a] for a in conv.numbers.rhs_spec[2:]]
    window = [(n - 1) * d + 1 for n, d in zip(kernel, dilation, strict=True)]
    pads = conv.padding
    if isinstance(pads, str):
        pads = lax.padtype_to_pads([x.shape[a] for a in spatial], window, conv.strides, pads)
    inside = conv.lhs_dilation or (1,) * len(spatial)
    config = [(0, 0, 0)] * x.ndim
    for a, (low, high), d in zip(spatial, pads, inside, strict=True):
        config[a] = (low, high, d - 1)
    return config, dataclasses.replace(conv, padding="VALID", lhs_dilation=None)


def pad(x: Array, config: Sequence[tuple[int, int, int]], fill: Array | None = None) -> Array:
    """`lax.pad` with `fill`, by default zeros."""
    return lax.pad(x, jnp.zeros((), x.dtype) if fill is None else fill, config)
