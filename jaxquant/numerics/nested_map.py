"""The signed 8-bit map for quantized scales, encoded as bitsandbytes does."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array

_DECADES = 7
_STEPS = 65535


@functools.cache
def nested_map() -> tuple[float, ...]:
    """The 256 values, ascending: `dynamic_map(True)`, rounded as in bitsandbytes.

    Centres of `n = 2^i` equal parts of `[0.1, 1]`, times `10^(i - 6)`, every step in float32: 72 of
    the values are up to an ulp off the nearest float32.

    Source: bitsandbytes 0.50, `create_dynamic_map`.

    >>> values = nested_map()
    >>> len(values), values[0], values[127], values[255]
    (256, -0.992968738079071, 0.0, 1.0)
    """
    one, tenth, values = np.float32(1), np.float32(0.1), [0.0, 1.0]
    for i in range(_DECADES):
        n = 2**i
        step, k = np.float64((one - tenth) / np.float32(n)), np.arange(n + 1)
        # offset from the nearer end, rounded once
        ends = np.where(k < (n + 1) // 2, tenth + step * k, one - step * (n - k)).astype(np.float32)
        centre = (ends[:-1] + ends[1:]) / np.float32(2)
        part = (np.float32(10.0 ** (i - 6)) * centre).tolist()
        values += [*part, *(-v for v in part)]
    return tuple(np.sort(np.asarray(values, np.float32)).tolist())


@functools.cache
def _bounds() -> np.ndarray:
    """For each code but the first, its lowest index in 65,536 uniform steps over `[-1, 1]`."""
    table = np.asarray(nested_map(), np.float32)
    middle = np.float32(0.5) * (table[:-1] + table[1:])
    steps = (-1.0 + 2.0 * np.arange(_STEPS + 1) / _STEPS).astype(np.float32)
    return np.searchsorted(steps, middle, side="right").astype(np.int32)


def encode_nested(x: Array) -> Array:
    """Codes of float32 values in `[-1, 1]`.

    A value is rounded to the nearest of 65,536 uniform steps over `[-1, 1]`, and that to the
    nearest code, which is not always nearest to the value: bitsandbytes' CPU build looks codes up
    in a table of these steps. NaN takes code 0.

    >>> encode_nested(jnp.array([-1.0, 0.5, 1.0])).tolist()
    [0, 219, 255]
    """
    v = jnp.clip(x, -1.0, 1.0)
    index = ((v + 1.0) * (0.5 * _STEPS) + 0.5).astype(jnp.int32)
    index = jnp.where(jnp.isnan(x), 0, index)
    bounds = _bounds().reshape((1,) * index.ndim + (-1,))
    return jnp.sum(index[..., None] >= bounds, axis=-1, dtype=jnp.int32).astype(jnp.uint8)


def decode_nested(codes: Array) -> Array:
    """The values of uint8 codes, float32 of the same shape.

    >>> decode_nested(jnp.array([127, 255], jnp.uint8)).tolist()
    [0.0, 1.0]
    """
    return jnp.asarray(nested_map(), jnp.float32).at[codes].get(mode="promise_in_bounds")
