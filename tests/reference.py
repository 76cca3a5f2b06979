"""Quantization written a second time, in NumPy and value by value, to hold the library to.

Nothing here is shared with the library: which values share a scale is worked out from index
arithmetic, representable values come from `ml_dtypes` or are listed.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from jaxquant import PerBlock, PerChannel, PerGroup, PerTensor

# Dettmers et al., "QLoRA" (2023), appendix E
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def grid(name: str) -> np.ndarray:
    """All finite values of a format of at most 8 bits, ascending, float64."""
    if name == "nf4":
        return np.array(NF4, np.float32).astype(np.float64)
    if "int" in name:
        bits = int(name.split("int")[1])
        low, high = (
            (0, 2**bits - 1) if name[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        )
        return np.arange(low, high + 1, dtype=np.float64)
    dtype = np.dtype(getattr(ml_dtypes, name))
    bits = 4 if "float4" in name else 6 if "float6" in name else 8
    values = np.arange(2**bits, dtype=np.uint8).view(dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values)])


def sharing(shape: tuple[int, ...], granularity) -> np.ndarray:
    """For every value, a number that it has in common with those it shares a scale with."""
    if math.prod(shape) == 0:
        return np.zeros(shape, np.int64)
    index = np.indices(shape)
    ndim = len(shape)

    def number(parts: list[np.ndarray]) -> np.ndarray:
        out = np.zeros(shape, np.int64)
        for part in parts:
            out = out * (int(part.max()) + 1) + part
        return out

    if isinstance(granularity, PerTensor):
        return number([])
    if isinstance(granularity, PerChannel):
        axes = granularity.axes
        axes = (axes,) if isinstance(axes, int) else axes
        return number([index[a % ndim] for a in axes])
    if isinstance(granularity, PerGroup):
        axes = granularity.axis
        axes = [a % ndim for a in ((axes,) if isinstance(axes, int) else axes)]
        flat = np.zeros(shape, np.int64)
        for a in axes:
            flat = flat * shape[a] + index[a]
        others = [index[a] for a in range(ndim) if a not in axes]
        return number([*others, flat // granularity.size])
    assert isinstance(granularity, PerBlock)
    rows, cols = (a % ndim for a in granularity.axes or (-2, -1))
    tiles = [index[rows] // granularity.rows, index[cols] // granularity.cols]
    return number([index[a] for a in range(ndim) if a not in (rows, cols)] + tiles)


def scales(w: np.ndarray, spec) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of every value, float64, before the scale is cast to its dtype."""
    w = w.astype(np.float64)
    values = grid(spec.format.name)
    shared = sharing(w.shape, spec.granularity)
    scale, zero = np.ones(w.shape), np.zeros(w.shape)
    for group in np.unique(shared):
        here = shared == group
        low, high = min(w[here].min(), 0.0), max(w[here].max(), 0.0)
        amax = max(high, -low)
        if not spec.symmetric:
            s = (high - low) / (values[-1] - values[0])
            zero[here] = np.clip(values[0] - np.round(low / s), values[0], values[-1]) if s else 0
        elif not spec.format.is_integer:
            s = amax / np.abs(values).max()
        elif spec.range == "signed":
            s = (high if high > -low else low) / values[0]
        else:
            s = amax / (values[-1] + (0.5 if spec.range == "half" else 0.0))
        scale[here] = s or 1.0
    return scale, zero


def nearest(v: np.ndarray, name: str) -> np.ndarray:
    """Distance from `v` to the nearest value of a format, in units of the scale."""
    return np.abs(v[..., None] - grid(name)).min(axis=-1)


def half_step(v: np.ndarray, name: str) -> np.ndarray:
    """Half the distance between the two values of a format that enclose `v`.

    Beyond the ends it is that of the outermost pair.
    """
    values = grid(name)
    upper = np.clip(np.searchsorted(values, v), 1, len(values) - 1)
    return (values[upper] - values[upper - 1]) / 2
