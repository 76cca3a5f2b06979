"""One-dimensional clustering: sorted or binned values as prefix sums, and Lloyd's iteration."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxquant.numerics.rounding import count_below

_ONE = 0x3F800000  # the bits of 1.0
_MOST_STEPS = 300


class Points(NamedTuple):
    """Values or bins of values in ascending order, as prefix sums.

    Attributes:
      place: `[m]`, the mean of each point's values, ascending.
      weight: `[m + 1]`, sums of the weights of the first 0 to m points.
      total: `[m + 1]`, sums of weighted values.
      square: `[m + 1]`, sums of weighted squares.
      grid: `(unit, bins per octave)` of `binned`; `None` where each point is a single value.
      ends: the smallest and the largest value, `[2]`.
    """

    place: Array
    weight: Array
    total: Array
    square: Array
    grid: tuple[Array, Array] | None
    ends: Array


def ordered(x: Array, weights: Array | None = None) -> Points:
    """Points of the sorted values `[n]`, one for each value; ties are not merged."""
    if weights is None:
        x = jnp.sort(x)
        w = jnp.ones_like(x)
    else:
        x, w = lax.sort((x, weights), num_keys=1)
    return _summed(x, w, w * x, w * x * x, None, x[jnp.array([0, -1])])


def binned(x: Array, bins: int, weights: Array | None = None) -> Points:
    """Points of the values `[n]` in a histogram of `bins` bins.

    Bins are uniform in `log2(1 + |x| / u)`, with `u = mean(|x|^(1/2))^2`: narrow near zero and
    proportional to `|x|` far out, so that an outlier costs no resolution. A histogram takes a
    nanosecond per value on a CPU; sorting takes 200 to 400.
    """
    size = jnp.abs(x)
    mean = jnp.square(jnp.mean(jnp.sqrt(size)))
    # a power of two, so that bins do not depend on the summation order of the mean
    unit = jnp.where(mean > 0, jnp.exp2(jnp.round(jnp.log2(jnp.where(mean > 0, mean, 1.0)))), 1.0)
    top = _octaves(jnp.max(size) / unit)
    grid = (unit, (bins / 2 - 1) / jnp.where(top > 0, top, 1.0))
    at = jnp.clip(_position(x, grid) + bins // 2, 0, bins - 1).astype(jnp.int32)
    zero = jnp.zeros(bins, jnp.float32)
    if weights is None:
        weight, total = zero.at[at].add(1.0), zero.at[at].add(x)
    else:
        weight, total = zero.at[at].add(weights), zero.at[at].add(weights * x)
    mean = jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), -jnp.inf)
    place = lax.cummax(mean)
    ends = jnp.stack([jnp.min(x), jnp.max(x)])
    place = jnp.maximum(place, ends[0])  # empty bins before the first value
    return _summed(place, weight, total, weight * place * place, grid, ends)


def coarser(points: Points, count: int) -> Points:
    """Merges neighbouring points, so that at most `count` are left.

    Each takes up to `2 / count` of the weight and `2 / count` of the points, so that neither many
    close values nor a few distant ones are merged into one.
    """
    m = points.place.shape[0]
    if m <= count:
        return points
    share = points.weight[1:] / jnp.where(points.weight[-1] > 0, points.weight[-1], 1.0)
    both = 0.5 * share + jnp.asarray(0.5 * np.arange(1, m + 1) / m, jnp.float32)
    inner = jnp.searchsorted(both, jnp.asarray(np.arange(1, count) / count, jnp.float32))
    ends = jnp.zeros(1, inner.dtype), jnp.full(1, m, inner.dtype)
    at = jnp.concatenate([ends[0], inner, ends[1]])
    weight, total, square = (a[at] for a in (points.weight, points.total, points.square))
    mass = jnp.diff(weight)
    mean = jnp.diff(total) / jnp.where(mass > 0, mass, 1.0)
    last = points.place[jnp.maximum(at[1:] - 1, 0)]
    place = jnp.where(mass > 0, jnp.minimum(mean, last), last)
    return Points(lax.cummax(place), weight, total, square, None, points.ends)


def _summed(
    place: Array,
    weight: Array,
    total: Array,
    square: Array,
    grid: tuple[Array, Array] | None,
    ends: Array,
) -> Points:
    zero = jnp.zeros(1, jnp.float32)

    def summed(a: Array) -> Array:
        return jnp.concatenate([zero, jnp.cumsum(a)])

    return Points(place, summed(weight), summed(total), summed(square), grid, ends)


def _octaves(u: Array) -> Array:
    """`log2(1 + u)`, linear between powers of two: the bits of a float read as an integer."""
    bits = lax.bitcast_convert_type(1.0 + u, jnp.int32) - _ONE
    return bits.astype(jnp.float32) * 2.0**-23


def _position(x: Array, grid: tuple[Array, Array]) -> Array:
    unit, scale = grid
    octaves = _octaves(jnp.abs(x) / unit)
    return jnp.round(jnp.where(x < 0, -octaves, octaves) * scale)


def members(points: Points, centroids: Array) -> tuple[Array, Array]:
    """Index of the first point of each centroid, and of the last plus one, `[levels]` each."""
    bounds = 0.5 * centroids[:-1] + 0.5 * centroids[1:]
    count = points.place.shape[0]
    if points.grid is None:
        # ties go to the lower centroid, as codes do
        inner = jnp.searchsorted(points.place, bounds, side="right").astype(jnp.int32)
    else:
        at = _position(bounds, points.grid) + count // 2
        inner = jnp.clip(at, 0, count - 1).astype(jnp.int32)
        inner = inner + (points.place[inner] <= bounds)
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), inner])
    return first, jnp.concatenate([inner, jnp.full(1, count, jnp.int32)])


def moments(points: Points, centroids: Array) -> tuple[Array, Array, Array]:
    """Weight, sum and sum of squares of the members of each centroid, `[levels]` each."""
    first, last = members(points, centroids)
    weight, total, square = (
        a[last] - a[first] for a in (points.weight, points.total, points.square)
    )
    some = (last > first) & (weight > 0)
    return jnp.where(some, weight, 0.0), jnp.where(some, total, 0.0), jnp.where(some, square, 0.0)


def settled(points: Points, centroids: Array) -> tuple[Array, Array]:
    """Lloyd's iteration until no centroid moves: centroids `[levels]`, and the number of steps.

    Each step moves centroids to the mean of their members, the points between two midpoints, whose
    sum is the difference of two prefix sums. An empty centroid moves to one standard deviation
    above the mean of the cluster with the largest error.

    Source: Lloyd, "Least squares quantization in PCM" (1982).
    """
    low, high = points.ends

    def step_once(centroids: Array) -> Array:
        weight, total, square = moments(points, centroids)
        some = jnp.where(weight > 0, weight, 1.0)
        mean = jnp.clip(total / some, low, high)
        error = jnp.maximum(square - mean * total, 0.0)
        empty = weight <= 0
        # the k-th empty centroid moves to the cluster with the k-th largest error
        worst = jnp.argsort(-jnp.where(empty, -1.0, error))
        other = jnp.clip(mean + jnp.sqrt(error / some), low, high)
        rank = jnp.cumsum(empty) - 1
        return jnp.sort(jnp.where(empty, other[worst[jnp.maximum(rank, 0)]], mean))

    def body(state: Any) -> Any:
        step, centroids, _ = state
        new = step_once(centroids)
        return step + 1, new, jnp.any(new != centroids)

    start = (jnp.int32(0), centroids, jnp.bool_(True))
    steps, centroids, _ = lax.while_loop(lambda s: (s[0] < _MOST_STEPS) & s[2], body, start)
    return centroids, steps


def nearest(x: Array, centroids: Array) -> Array:
    """The index of the nearest of ascending centroids `[levels]`, ties to the lower: uint8.

    Equal to `to_codebook` for finite values.
    """
    bounds = 0.5 * centroids[:-1] + 0.5 * centroids[1:]
    return count_below(bounds, x, or_equal=False).astype(jnp.uint8)


def sums(index: Array, values: Array, levels: int) -> Array:
    """The sum of `values` over the members of each index, float32 `[levels]`.

    A scatter: on a CPU a million values take 1 ms, masked sums for 16 levels 20 ms.
    """
    return jnp.zeros(levels, jnp.float32).at[index.ravel()].add(values.astype(jnp.float32).ravel())


def refined(x: Array, centroids: Array, weights: Array | None = None) -> Array:
    """One more Lloyd step on the values instead of bins, as centroid plus mean residual.

    Residuals are small, so that the mean is exact where all members are equal.
    """
    levels = centroids.shape[0]
    index = nearest(x, centroids)
    rest = x - centroids[index]
    w = jnp.ones_like(x) if weights is None else weights
    weight, total = sums(index, w, levels), sums(index, w * rest, levels)
    mean = centroids + jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)
    return jnp.sort(mean)
