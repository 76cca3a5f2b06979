"""Optimal one-dimensional clustering by dynamic programming."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from jaxquant.numerics.cluster import Points, coarser, settled

_COARSE_BINS = (256, 1024)  # fewest and most for an optimum to begin at, of 16 for each level


def optimal(points: Points, levels: int) -> Array:
    """The centroids of the partition of `m` points into `levels` runs with the least inertia.

    `D_k(i) = min_{j <= i} D_{k-1}(j) + C(j, i)`, `C(j, i)` the inertia of points `j` to `i - 1`
    about their mean, `D_0(i) = C(0, i)`. The best `j` never falls as `i` grows, so the minima of
    two known rows bound the search for the rows between them: each round halves the distance of
    known rows and evaluates at most `2 m` pairs. `O(levels m log m)` time, `O(levels m)` memory.

    Args:
      points: `m` points.
      levels: number of runs.

    Returns:
      float32 `[levels]`, ascending. With fewer points than levels some are equal.

    Sources: Wang and Song, "Ckmeans.1d.dp: optimal k-means clustering in one dimension by dynamic
    programming" (2011); Gronlund et al., "Fast exact k-means, k-medians and Bregman divergence
    clustering in 1D" (2017), arXiv 1701.07204.

    >>> import jax.numpy as jnp
    >>> from jaxquant.numerics.cluster import ordered
    >>> optimal(ordered(jnp.array([0.0, 1.0, 10.0, 11.0, 30.0])), 3).tolist()
    [0.5, 10.5, 30.0]
    """
    count = points.place.shape[0]
    weight = jnp.diff(points.weight)
    mass, low, high = _two_sums(weight, points.place)

    def cost(j: Array, i: Array) -> Array:
        """`C(j, i)`, `j <= i`."""
        w = mass[i] - mass[j]
        first = points.place[jnp.minimum(j, count - 1)]
        some = jnp.where(w > 0, w, 1.0)
        # relative to the first point: squares of a narrow run far from 0 would cancel
        total = (high[0][i] - high[0][j]) + (low[0][i] - low[0][j]) - first * w
        square = (high[1][i] - high[1][j]) + (low[1][i] - low[1][j])
        square = square - first * (2.0 * total + first * w)
        return jnp.where(w > 0, jnp.maximum(square - total * total / some, 0.0), 0.0)

    everything = jnp.arange(count + 1)
    least = cost(jnp.zeros_like(everything), everything)

    def deeper(least: Array, _: None) -> tuple[Array, Array]:
        return _row_minima(least, cost, count)

    _, best = lax.scan(deeper, least, None, length=levels - 1)

    def back(end: Array, best: Array) -> tuple[Array, Array]:
        return best[end], end

    first, ends = lax.scan(back, jnp.int32(count), best, reverse=True)
    ends = jnp.concatenate([first[None], ends])  # [levels], ascending
    starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    w = mass[ends] - mass[starts]
    total = (high[0][ends] - high[0][starts]) + (low[0][ends] - low[0][starts])
    nearby = points.place[jnp.clip(starts, 0, count - 1)]
    return jnp.sort(jnp.where(w > 0, total / jnp.where(w > 0, w, 1.0), nearby))


def clustered_points(points: Points, levels: int) -> tuple[Array, Array]:
    """Centroids `[levels]` by Lloyd's iteration from the optimum for coarser points; its steps."""
    fewest, most = _COARSE_BINS
    start = optimal(coarser(points, min(most, max(fewest, 16 * levels))), levels)
    return settled(points, start)


def _row_minima(
    least: Array, cost: Callable[[Array, Array], Array], count: int
) -> tuple[Array, Array]:
    """`min_{j <= i} least[j] + cost(j, i)` for every `i` of `0 .. count`, and its `j`."""
    rows = count + 1
    rounds = max(count, 1).bit_length()
    span = 1 << rounds
    flat = 2 * rows + span // 2
    row = jnp.arange(rows, dtype=jnp.int32)

    def halve(r: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        values, best = state
        step = jnp.int32(span) >> r  # next: rows at odd multiples of half a step
        half = step >> 1
        current = (row % jnp.maximum(step, 1)) == half
        below, above = row - half, row + half
        low = jnp.where(below >= 0, best[jnp.maximum(below, 0)], 0)
        high = jnp.where(above <= count, best[jnp.minimum(above, count)], row)
        high = jnp.minimum(high, row)
        length = jnp.where(current, jnp.maximum(high - low, 0) + 1, 0)
        offset = jnp.cumsum(length)
        at = jnp.arange(flat, dtype=jnp.int32)
        # the row of each pair: the number of rows that end at or before it
        ends = jnp.zeros(flat + 1, jnp.int32).at[jnp.minimum(offset, flat)].add(1)
        owner = jnp.minimum(jnp.cumsum(ends[:flat]), rows - 1)
        j = low[owner] + at - (offset[owner] - length[owner])
        inside = at < offset[-1]
        j = jnp.where(inside, jnp.minimum(j, row[owner]), 0)
        costs = jnp.where(inside, least[j] + cost(j, row[owner]), jnp.inf)
        lowest = jnp.full(rows, jnp.inf).at[owner].min(costs)
        where = jnp.where(costs == lowest[owner], j, count)
        place = jnp.full(rows, count, jnp.int32).at[owner].min(where)
        return jnp.where(current, lowest, values), jnp.where(current, place, best)

    start = (least, jnp.zeros(rows, jnp.int32))  # row 0 has no points: j = 0
    return lax.fori_loop(0, rounds, halve, start)


def _two_sums(
    weight: Array, place: Array
) -> tuple[Array, tuple[Array, Array], tuple[Array, Array]]:
    """Prefix sums of weights, and of first and second moments as two floats, low and high.

    One float would lose the second moment of a narrow run far from 0 in that of all others.
    """

    def add(a: tuple[Array, ...], b: tuple[Array, Array]) -> tuple[Array, Array]:
        total = a[0] + b[0]
        part = total - a[0]
        lost = (a[0] - (total - part)) + (b[0] - part)
        return total, a[1] + b[1] + lost

    def product(a: Array, b: Array) -> tuple[Array, Array]:
        """`a b` as two floats, from halves of 12 bits."""
        split = jnp.float32(4097.0)
        a_high, b_high = split * a - (split * a - a), split * b - (split * b - b)
        a_low, b_low = a - a_high, b - b_high
        high = a * b
        low = ((a_high * b_high - high) + a_high * b_low + a_low * b_high) + a_low * b_low
        return high, low

    first = product(weight, place)
    again = product(first[0], place)
    second = (again[0], again[1] + first[1] * place)

    place_in_line = jnp.arange(place.shape[0])

    def summed(pair: tuple[Array, Array]) -> tuple[Array, Array]:
        def doubled(r: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
            """Sums over `2^(r + 1)` points from sums over `2^r`."""
            before = place_in_line - (jnp.int32(1) << r)
            other = (jnp.where(before >= 0, a[jnp.maximum(before, 0)], 0.0) for a in pair)
            return add((*other,), pair)

        rounds = max(place.shape[0] - 1, 0).bit_length()
        high, low = lax.fori_loop(0, rounds, doubled, pair)
        zero = jnp.zeros(1, jnp.float32)
        return jnp.concatenate([zero, high]), jnp.concatenate([zero, low])

    one, two = summed(first), summed(second)
    mass = jnp.concatenate([jnp.zeros(1, jnp.float32), jnp.cumsum(weight)])
    return mass, (one[1], two[1]), (one[0], two[0])
