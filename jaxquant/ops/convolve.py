"""A convolution of arrays: its static part, and integer sums of it."""

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
from jaxquant.spec import QSpec


@dataclasses.dataclass(frozen=True)
class Conv:
    """The static part of one call."""

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
        """The convolution; operands of two float dtypes become one."""
        if x.dtype != w.dtype:
            dtype = result_dtype(x.dtype, w.dtype, None)
            x, w = x.astype(dtype), w.astype(dtype)
        return lax.conv_general_dilated(
            x, w, self.strides, self.padding, self.lhs_dilation, self.rhs_dilation, self.numbers,
            self.groups, self.batch_groups, self.precision, self.preferred,
        )  # fmt: skip

    def per_batch(self, s: Array) -> Array:
        """`[n]` or `[1]` of the image's batch, laid out for the result."""
        return self._expand(s, self.numbers.out_spec[0])

    def per_channel(self, s: Array) -> Array:
        """`[out]` or `[1]` of the kernel, laid out for the result."""
        return self._expand(s, self.numbers.out_spec[1])

    def _expand(self, s: Array, axis: int) -> Array:
        return lax.expand_dims(s, [a for a in range(len(self.numbers.out_spec)) if a != axis])


def window_sum(conv: Conv, x: Array, w: Array) -> Array:
    """The convolution in float32, of integers exactly: GPU kernels have no other result."""
    whole = jnp.issubdtype(x.dtype, jnp.integer)
    kind = jnp.dtype(jnp.int32 if whole else jnp.float32)
    exact = dataclasses.replace(conv, preferred=kind, precision=None if whole else conv.precision)

    def direct() -> Array:
        return exact(x, w).astype(jnp.float32)

    spec = conv.numbers.rhs_spec
    taps = math.prod(w.shape[a] for a in spec[2:])
    if lowering.taps_win(conv.groups, w.shape[spec[1]], taps):
        return lowering.by_platform(cpu=lambda: _taps(conv, x, w), default=direct)
    return direct()


def _taps(conv: Conv, x: Array, w: Array) -> Array:
    """A depthwise convolution as one shifted product for each window position, summed."""
    pads, conv = padding(conv, x, w)
    x = pad(x, pads)
    image, kernel = conv.numbers.lhs_spec, conv.numbers.rhs_spec
    channels, outputs = x.shape[image[1]], w.shape[kernel[0]]
    w = jnp.transpose(w, (*kernel[2:], kernel[0], kernel[1]))  # [*window, out, 1]
    dilation = conv.rhs_dilation or (1,) * len(conv.strides)
    x = jnp.repeat(x.astype(jnp.float32), outputs // channels, axis=image[1])
    total: Array | None = None
    for tap in itertools.product(*(range(n) for n in w.shape[:-2])):
        start, stop, step = [0] * x.ndim, list(x.shape), [1] * x.ndim
        for i, a in enumerate(image[2:]):
            reach = x.shape[a] - ((w.shape[i] - 1) * dilation[i] + 1)
            start[a] = tap[i] * dilation[i]
            stop[a] = start[a] + reach + 1
            step[a] = conv.strides[i]
        weights = w[tap][:, 0].astype(jnp.float32)
        weights = lax.expand_dims(weights, [a for a in range(x.ndim) if a != image[1]])
        product = lax.slice(x, start, stop, step) * weights
        total = product if total is None else total + product
    assert total is not None
    return jnp.transpose(total, [image[conv.numbers.out_spec.index(a)] for a in range(x.ndim)])


def padding(conv: Conv, x: Array, w: Array) -> tuple[list[tuple[int, int, int]], Conv]:
    """For each axis of the image what `lax.pad` takes, and the convolution without padding."""
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


def pad(x: Array, config: Sequence[tuple[int, int, int]]) -> Array:
    """`lax.pad` with zeros."""
    return lax.pad(x, jnp.zeros((), x.dtype), config)
