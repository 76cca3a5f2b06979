"""Lloyd's iteration in one dimension: the codebook with the least squared error."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxquant.numerics.cluster import inertia, ordered, settled
from jaxquant.numerics.starts import begin


@functools.partial(jax.jit, static_argnums=(1, 2))
def lloyd(x: Array, levels: int, iterations: int = 300) -> Array:
    """`levels` centroids, ascending, that minimise `sum_i min_k (x_i - c_k)^2` locally.

    Each iteration assigns values to the nearest centroid and moves centroids to the mean of their
    members; an empty centroid splits the cluster with the largest error. Values are sorted once, so
    that members are a run between two midpoints, found by binary search, and their sum is the
    difference of two prefix sums.
    It starts twice and keeps the better result: from `linspace(min, max)`, as in Deep Compression,
    and from quantiles of the density to the power of 1/3, the optimum for many levels.

    Args:
      x: finite values of any shape, at least one.
      levels: number of centroids.
      iterations: maximum number of iterations; it stops earlier when no centroid moves.

    Returns:
      float32 `[levels]`.

    Sources: Lloyd, "Least squares quantization in PCM" (1982); Panter and Dite, "Quantization
    distortion in pulse-count modulation with nonuniform spacing of levels" (1951).

    >>> lloyd(jnp.array([0.0, 1.0, 10.0, 11.0]), 2).tolist()
    [0.5, 10.5]
    """
    x = x.astype(jnp.float32).ravel()
    shift = jnp.mean(x)
    points = ordered(x - shift)  # small prefix sums lose fewer digits
    starts = jnp.stack([begin(name, points, levels) for name in ("linear", "density")])
    ends = jax.vmap(lambda start: settled(points, start, iterations)[0])(starts)
    return ends[jnp.argmin(jax.vmap(lambda end: inertia(points, end))(ends))] + shift
