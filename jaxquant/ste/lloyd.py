"""Lloyd's iteration in one dimension: the values that an array is best rounded to."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_SPACINGS = 4096  # between how many quantiles density is measured


@functools.partial(jax.jit, static_argnums=(1, 2))
def lloyd(x: Array, levels: int, iterations: int = 300) -> Array:
    """`levels` centroids, ascending, that minimise `sum_i min_k (x_i - c_k)^2` locally.

    Each iteration assigns values to the nearest centroid and moves centroids to the mean of what
    they were assigned; one without members splits those of the largest error. Sorted once, members
    are a run of values between two midpoints, found by binary search, and their sum is the
    difference of two prefix sums.
    It begins twice and keeps the better end: from `linspace(min, max)`, as Deep Compression does,
    and from the quantiles of the density to the power of 1/3, where many levels have their optimum.

    Args:
      x: finite values of any shape, at least one.
      levels: how many centroids.
      iterations: at most so many; it stops when no centroid moves.

    Returns:
      float32 `[levels]`.

    Sources: Lloyd, "Least squares quantization in PCM" (1982); Panter and Dite, "Quantization
    distortion in pulse-count modulation with nonuniform spacing of levels" (1951).

    >>> lloyd(jnp.array([0.0, 1.0, 10.0, 11.0]), 2).tolist()
    [0.5, 10.5]
    """
    x = jnp.sort(x.astype(jnp.float32).ravel())
    shift = jnp.mean(x)
    x = x - shift  # short prefix sums lose fewer digits
    zero = jnp.zeros(1, jnp.float32)
    sums, squares = (jnp.concatenate([zero, jnp.cumsum(a)]) for a in (x, x * x))

    def members(centroids: Array) -> tuple[Array, Array]:
        """Index of the first member of each centroid, and of the last plus one."""
        bounds = 0.5 * centroids[:-1] + 0.5 * centroids[1:]
        # ties go to the lower centroid, as codes do
        inner = jnp.searchsorted(x, bounds, side="right")
        first = jnp.concatenate([jnp.zeros(1, inner.dtype), inner])
        return first, jnp.concatenate([inner, jnp.full(1, x.size, inner.dtype)])

    def moments(centroids: Array) -> tuple[Array, Array, Array]:
        """Count, sum and sum of squares of the members of each centroid."""
        first, last = members(centroids)
        return (
            (last - first).astype(jnp.float32),
            sums[last] - sums[first],
            (squares[last] - squares[first]),
        )

    def moved(centroids: Array) -> Array:
        count, total, square = moments(centroids)
        mean = total / jnp.maximum(count, 1.0)
        error = jnp.maximum(square - mean * total, 0.0)
        # the k-th that is empty goes to a deviation above the mean of the k-th worst
        worst = jnp.argsort(-error)
        other = mean + jnp.sqrt(error / jnp.maximum(count, 1.0))
        rank = jnp.cumsum(count == 0) - 1
        return jnp.sort(jnp.where(count > 0, mean, other[worst[jnp.maximum(rank, 0)]]))

    def error(centroids: Array) -> Array:
        count, total, square = moments(centroids)
        return jnp.sum(square - 2.0 * centroids * total + count * centroids**2)

    def body(state: Any) -> Any:
        step, centroids, _ = state
        new = moved(centroids)
        return step + 1, new, jnp.any(new != centroids)

    def settled(centroids: Array) -> Array:
        start = (0, centroids, jnp.bool_(True))
        return lax.while_loop(lambda s: (s[0] < iterations) & s[2], body, start)[1]

    starts = jnp.stack([jnp.linspace(x[0], x[-1], levels), _spread(x, levels)])
    ends = jax.vmap(settled)(starts)
    return ends[jnp.argmin(jax.vmap(error)(ends))] + shift


def _spread(x: Array, levels: int) -> Array:
    """The middles of `levels` equal shares of `density^(1/3)`, of sorted values.

    Between neighbouring quantiles, a distance `d` apart, density is `1 / d` and the share
    `d^(2/3)`, up to a factor.
    """
    at = np.linspace(0, x.size - 1, min(x.size, _SPACINGS + 1)).round().astype(np.int32)
    quantiles = x[at]
    distance = jnp.diff(quantiles, prepend=quantiles[:1])
    mass = jnp.cumsum(jnp.cbrt(distance * distance))
    wanted = (jnp.arange(levels, dtype=jnp.float32) + 0.5) / levels * mass[-1]
    return jnp.interp(wanted, mass, quantiles)
