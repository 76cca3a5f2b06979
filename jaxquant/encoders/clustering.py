"""k-means over the rows of an array, compiled in parts."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxquant.encoders.checks import check_finite
from jaxquant.numerics.cluster import (
    Points,
    binned,
    coarser,
    nearest,
    ordered,
    refined,
    settled,
)
from jaxquant.numerics.optimal import clustered_points, optimal

_SORTED = 8192  # at most this many values are sorted; larger arrays are binned
_BINS = 1 << 16
_OPTIMAL_BINS = 8192  # for the optimum of arrays with more values
_LEAST = 2.0**-120  # smaller magnitudes are not scaled up: some processors flush subnormals
_AT_ONCE = 1 << 22  # values or bins of the rows in one batch


def kmeans_codebook(
    x: Array,
    levels: int,
    *,
    weights: Array | None = None,
    exact: bool = False,
) -> Array:
    """The codebook of `levels` values with the least squared error for an array; see `kmeans`.

    Args:
      x: finite values of any shape, at least `levels`.
      levels: 1 to 256.
      weights: non-negative weights of the squared errors, in a shape that broadcasts to that of
        `x`; `None`: all 1.
      exact: start at the optimum.

    Returns:
      float32 `[levels]`, ascending.

    Raises:
      ValueError: fewer values than levels, non-finite values, or arguments `kmeans` refuses.

    >>> kmeans_codebook(jnp.array([0.0, 1.0, 2.0]), 1, weights=jnp.array([1.0, 0.0, 0.0])).tolist()
    [0.0]
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"kmeans: expected a float array, got {x.dtype.name}{list(x.shape)}")
    check_finite("kmeans", "array", x)
    if isinstance(levels, bool) or not isinstance(levels, int) or not 1 <= levels <= 256:
        raise ValueError(f"kmeans: levels: expected 1 to 256, got {levels!r}")
    if levels > x.size:
        raise ValueError(
            f"kmeans: a codebook of {levels} values for {x.size} values of an array of shape "
            f"{list(x.shape)}"
        )
    if weights is not None:
        weights = spread_weights(jnp.asarray(weights), x.shape).reshape(1, -1)
    return clustered(x.reshape(1, -1), weights, exact, levels)[0][0]


def spread_weights(weights: Array, shape: tuple[int, ...]) -> Array:
    """Weights broadcast to the shape of their array.

    Raises:
      ValueError: weights do not broadcast, or are negative or non-finite (unchecked under a trace).
    """
    try:
        if np.broadcast_shapes(weights.shape, shape) != shape:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"kmeans: weights of shape {list(weights.shape)} for an array of shape {list(shape)}"
        ) from None
    if not isinstance(weights, jax.core.Tracer) and not bool(_countable(weights)):
        raise ValueError("kmeans: weights: expected finite values, none of them negative")
    rank = len(shape) - weights.ndim
    return jnp.broadcast_to(lax.expand_dims(weights, range(rank)), shape)


@jax.jit
def _countable(weights: Array) -> Array:
    return jnp.all(jnp.isfinite(weights) & (weights >= 0))


def clustered(
    x: Array, weights: Array | None, exact: bool, levels: int
) -> tuple[Array, Array, Array]:
    """k-means of each row.

    Args:
      x: `[rows, n]`, finite.
      weights: `[rows, n]`, non-negative; a row of zeros is taken as ones.
      exact: whether Lloyd's iteration starts at the optimum.
      levels: codebook size.

    Returns:
      Codebooks float32 `[rows, levels]`, ascending; codes uint8 `[rows, n]`; steps int32 `[rows]`.
    """
    chex.assert_rank(x, 2)
    chex.assert_equal_shape([x, *jax.tree.leaves(weights)])
    if x.shape[0] > 1:
        return _mapped(x, weights, exact, levels)
    # compiled in parts: the one that takes long is the same for arrays of many sizes
    row = jax.tree.map(lambda a: a[0], (x, weights))
    points, unit, shift, top = _prepared(*row)
    centroids, steps = _centroids(points, exact, levels)
    codebook, codes = _assigned(*row, centroids, unit, shift, top)
    return codebook[None], codes[None], steps[None]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _mapped(
    x: Array, weights: Array | None, exact: bool, levels: int
) -> tuple[Array, Array, Array]:
    def one(row: tuple[Array, Array | None]) -> tuple[Array, Array, Array]:
        x, weights = row
        points, unit, shift, top = _prepared(x, weights)
        centroids, steps = _centroids(points, exact, levels)
        return *_assigned(x, weights, centroids, unit, shift, top), steps

    rows, size = x.shape
    together = max(1, min(rows, _AT_ONCE // max(_bins(size), size, 1)))
    if size >= _BINS:
        together = 1  # each fills the processor
    return lax.map(one, (x, weights), batch_size=None if together == 1 else together)


def _bins(size: int) -> int:
    """The number of bins for `size` values."""
    return min(_BINS, 2 << max(size - 1, 1).bit_length())


@jax.jit
def _prepared(x: Array, weights: Array | None) -> tuple[Points, Array, Array, Array]:
    """The points, and the constants of their transform: `x / unit - shift`, `weights / top`."""
    x = x.astype(jnp.float32)
    # squares neither overflow nor vanish; division by a power of two is exact
    unit = jnp.exp2(jnp.floor(jnp.log2(jnp.maximum(jnp.max(jnp.abs(x)), _LEAST))))
    y = x / unit
    shift = jnp.mean(y)
    near = y - shift  # smaller prefix sums lose fewer digits
    top = jnp.float32(1.0) if weights is None else jnp.max(weights).astype(jnp.float32)
    h = _scaled(weights, top)
    points = ordered(near, h) if x.size <= _SORTED else binned(near, _bins(x.size), h)
    return points, unit, shift, top


def _scaled(weights: Array | None, top: Array) -> Array | None:
    if weights is None:
        return None
    return jnp.where(top > 0, weights.astype(jnp.float32) / jnp.where(top > 0, top, 1.0), 1.0)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _centroids(points: Points, exact: bool, levels: int) -> tuple[Array, Array]:
    if not exact:
        return clustered_points(points, levels)
    fine = points if points.grid is None else coarser(points, _OPTIMAL_BINS)
    return settled(points, optimal(fine, levels))


@jax.jit
def _assigned(
    x: Array, weights: Array | None, centroids: Array, unit: Array, shift: Array, top: Array
) -> tuple[Array, Array]:
    """Codebook and codes, after two more steps over the values themselves."""
    y, h = x.astype(jnp.float32) / unit, _scaled(weights, top)
    centroids = lax.fori_loop(0, 2, lambda _, c: refined(y, c, h), centroids + shift)
    return centroids * unit, nearest(y, centroids)
