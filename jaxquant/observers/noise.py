"""The expected quantization noise of a range, from a histogram.

The density is uniform within each bin, has a point mass at zero for the zeros, and ends at the
observed minimum and maximum. For this density the noise of any set of levels is an exact integral:
over the cell of a level it is a difference of moments, the sums of `1`, `x` and `x^2` over all
values up to `t`. Computed on the host in float64 (counts are exact up to `2^53`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxquant.numerics import Format, decode
from jaxquant.observers.base import Range, range_to_scale
from jaxquant.qtensor import QSpec

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Bars:
    """One histogram on the host.

    Attributes:
      counts: `[bins]`, ascending.
      zeros: number of zeros.
      width: width of a bin.
      low, high: minimum and maximum of the values and 0.
    """

    counts: Floats
    zeros: float
    width: float
    low: float
    high: float

    @property
    def total(self) -> float:
        """The number of values."""
        return float(self.counts.sum()) + self.zeros

    @functools.cached_property
    def edges(self) -> Floats:
        """`[bins + 1]`: the edges of the bins, clipped to `[low, high]`."""
        half = self.counts.size // 2
        return np.clip(np.arange(-half, half + 1) * self.width, self.low, self.high)

    @functools.cached_property
    def moments(self) -> Floats:
        """`[3, bins + 1]`: sums of `1`, `x`, `x^2` over nonzero values up to each edge."""
        a, b = self.edges[:-1], self.edges[1:]
        parts = np.stack([np.ones_like(a), (a + b) / 2, (a * a + a * b + b * b) / 3])
        return np.concatenate([np.zeros((3, 1)), np.cumsum(parts * self.counts, axis=1)], axis=1)

    @property
    def signal(self) -> float:
        """The sum of `x^2`."""
        return float(self.moments[2, -1])

    def up_to(self, t: Floats) -> Floats:
        """`[3, ...]`: the moments of the nonzero values up to `t`."""
        bins = self.counts.size
        # clipped before the cast: a level may be of any size
        k = np.clip(np.floor(t / self.width) + bins // 2, 0, bins - 1).astype(np.int64)
        a, b = self.edges[k], self.edges[k + 1]
        end = np.clip(t, a, b)
        wide = b > a
        part = np.where(wide, (end - a) / np.where(wide, b - a, 1), t >= a) * self.counts[k]
        return self.moments[:, k] + np.stack(
            [part, part * (a + end) / 2, part * (a * a + a * end + end * end) / 3]
        )


def bars(state: Mapping[str, Any], index: tuple[int, ...] = ()) -> Bars:
    """The histogram of one channel, from a state of `histogram` or a subclass.

    >>> from jaxquant.observers import histogram
    >>> state = histogram().update(histogram().init(jnp.ones(1)), jnp.array([0.0, 1.5]))
    >>> found = bars(state)
    >>> found.total, found.zeros, found.high
    (2.0, 1.0, 1.5)
    """
    words = [np.asarray(state[name])[index].astype(np.float64) for name in ("counts", "carry")]
    counts = words[0] + words[1] * 2.0**32
    exponent = int(np.asarray(state["exponent"])[index])
    width = 2.0 ** (exponent + 1) / (counts.size - 1)
    low, high = (float(np.asarray(state[name])[index]) for name in ("min", "max"))
    return Bars(counts[:-1], float(counts[-1]), width, low, high)


def noise(seen: Bars, low: Floats, high: Floats, spec: QSpec) -> Floats:
    """The expected sum of squared errors for each of several ranges.

    `sum_j integral over cell j of (x - r_j)^2`, where the cells of the levels `r_j` meet halfway
    and the outermost are unbounded. Within the range, integers of more than 8 bits are assumed to
    have an error of `S^2 / 12` per value, floating-point formats of more than 8 bits none.

    Args:
      seen: the histogram.
      low: `[ranges]`.
      high: `[ranges]`.
      spec: format and range rule.

    Returns:
      float64 `[ranges]`.
    """
    scale, zero = scales(low, high, spec)
    values = _levels(spec.format)
    if values is None:
        return _fine_noise(seen, scale, zero, spec.format)
    levels = scale[:, None] * (values - zero[:, None])
    levels = np.where(scale[:, None] < 0, levels[:, ::-1], levels)
    cuts = seen.up_to((levels[:, :-1] + levels[:, 1:]) / 2)
    below = np.zeros((3, len(scale), 1))
    above = np.broadcast_to(seen.moments[:, -1, None, None], below.shape)
    m0, m1, m2 = np.diff(np.concatenate([below, cuts, above], axis=-1), axis=-1)
    error = np.sum(m2 - 2 * levels * m1 + levels * levels * m0, axis=-1)
    at_zero = np.min(levels * levels, axis=-1) * seen.zeros
    # differences of sums may fall below zero by rounding
    return np.maximum(error, 0) + at_zero


def scales(low: Floats, high: Floats, spec: QSpec) -> tuple[Floats, Floats]:
    """Scales and zero points of several ranges, float64 `[ranges]`."""
    ranges = Range(jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32))
    scale, zero = range_to_scale(ranges, spec)
    wide = np.asarray(scale, np.float64)
    return wide, np.zeros_like(wide) if zero is None else np.asarray(zero, np.float64)


def clip_points(scale: Floats, zero: Floats, fmt: Format) -> tuple[Floats, Floats]:
    """The values beyond which codes clip: for integers half a step outside the extreme codes."""
    half = 0.5 if fmt.is_integer else 0.0
    one, other = scale * (fmt.min - half - zero), scale * (fmt.max + half - zero)
    return np.minimum(one, other), np.maximum(one, other)


def _fine_noise(seen: Bars, scale: Floats, zero: Floats, fmt: Format) -> Floats:
    low, high = clip_points(scale, zero, fmt)
    under, over = seen.up_to(low), seen.moments[:, -1, None] - seen.up_to(high)
    clipped = sum(
        m[2] - 2 * end * m[1] + end * end * m[0] for m, end in ((under, low), (over, high))
    )
    inside = seen.moments[0, -1] - under[0] - over[0]
    rounding = scale * scale / 12 * inside if fmt.is_integer else 0.0
    return np.maximum(clipped, 0) + rounding


@functools.lru_cache(maxsize=64)
def _levels(fmt: Format) -> Floats | None:
    """All finite values of a format of at most 8 bits, ascending."""
    if fmt.is_integer:
        return np.arange(fmt.qmin, fmt.qmax + 1, dtype=np.float64) if fmt.bits <= 8 else None
    if fmt.codebook is not None:
        return np.array(fmt.codebook, np.float64)
    if fmt.bits > 8:
        return None
    codes = np.arange(2**fmt.bits, dtype=np.uint8).view(jnp.dtype(fmt.storage))
    values = np.asarray(decode(codes, fmt), np.float64)
    return np.unique(values[np.isfinite(values)])
