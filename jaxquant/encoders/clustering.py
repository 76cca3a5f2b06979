"""k-means over the rows of an array, compiled in parts."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxquant.encoders.checks import check_finite
from jaxquant.encoders.optimal import optimal
from jaxquant.numerics.cluster import (
    Points,
    binned,
    coarser,
    inertia,
    nearest,
    ordered,
    refined,
    settled,
)
from jaxquant.numerics.starts import STARTS, begin

_STARTS = ("coarse", *STARTS)
_SORTED = 8192  # at most this many values are sorted; larger arrays are binned
_BINS = 1 << 16
_OPTIMAL_BINS = 8192  # for the optimum of arrays with more values
_COARSE_BINS = (256, 1024)  # bounds for the bins of the "coarse" start, 16 per level
_LEAST = 2.0**-120  # smaller magnitudes are not scaled up: some processors flush subnormals
_AT_ONCE = 1 << 22  # values or bins of the rows in one batch


@dataclasses.dataclass(frozen=True)
class Clustering:
    """Options of k-means; see `kmeans`.

    Attributes:
      start: names of the starts; the best of several results is kept.
      iterations: maximum number of steps from each start.
      exact: start at the optimum of dynamic programming instead.
    """

    start: tuple[str, ...] = ("coarse",)
    iterations: int = 300
    exact: bool = False

    @classmethod
    def of(cls, start: str | tuple[str, ...], iterations: int, exact: bool) -> Clustering:
        """Checked options; raises `ValueError` for an unknown start or iterations below 1."""
        names = (start,) if isinstance(start, str) else tuple(start)
        if not names or any(name not in _STARTS for name in names):
            raise ValueError(f"kmeans: start: expected one or several of {_STARTS}, got {start!r}")
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f"kmeans: iterations: expected a positive integer, got {iterations!r}")
        return cls(names, iterations, bool(exact))

    def check_key(self, key: Array | None) -> None:
        """Raises `ValueError` if a key is missing."""
        if "kmeans++" in self.start and not self.exact and key is None:
            raise ValueError(
                "kmeans(start='kmeans++') draws random numbers: pass key=jax.random.key(0)"
            )


def kmeans_codebook(
    x: Array,
    levels: int,
    *,
    weights: Array | None = None,
    start: str | tuple[str, ...] = "coarse",
    iterations: int = 300,
    exact: bool = False,
    key: Array | None = None,
) -> Array:
    """The codebook of `levels` values with the least squared error for an array; see `kmeans`.

    Args:
      x: finite values of any shape, at least `levels`.
      levels: 1 to 256.
      weights: non-negative weights of the squared errors, in a shape that broadcasts to that of
        `x`; `None`: all 1.
      start: names of the starts.
      iterations: maximum number of steps.
      exact: start at the optimum.
      key: PRNG key, for `"kmeans++"`.

    Returns:
      float32 `[levels]`, ascending.

    Raises:
      ValueError: fewer values than levels, non-finite values, or arguments `kmeans` refuses.

    >>> kmeans_codebook(jnp.array([0.0, 1.0, 2.0]), 1, weights=jnp.array([1.0, 0.0, 0.0])).tolist()
    [0.0]
    """
    how = Clustering.of(start, iterations, exact)
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
    how.check_key(key)
    if weights is not None:
        weights = spread_weights(jnp.asarray(weights), x.shape).reshape(1, -1)
    keys = None if key is None else key[None]
    return clustered(x.reshape(1, -1), weights, keys, how, levels)[0][0]


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
    x: Array, weights: Array | None, keys: Array | None, how: Clustering, levels: int
) -> tuple[Array, Array, Array]:
    """k-means of each row.

    Args:
      x: `[rows, n]`, finite.
      weights: `[rows, n]`, non-negative; a row of zeros is taken as ones.
      keys: one for each row, for `"kmeans++"`.
      how: options.
      levels: codebook size.

    Returns:
      Codebooks float32 `[rows, levels]`, ascending; codes uint8 `[rows, n]`; steps int32 `[rows]`.
    """
    if x.shape[0] > 1:
        return _mapped(x, weights, keys, how, levels)
    # compiled in parts: arrays of many sizes share the one that takes long to compile
    row = jax.tree.map(lambda a: a[0], (x, weights, keys))
    points, unit, shift, top = _prepared(*row[:2])
    centroids, steps = _settled(points, row[2], how, levels)
    codebook, codes = _assigned(*row[:2], centroids, unit, shift, top)
    return codebook[None], codes[None], steps[None]


@functools.partial(jax.jit, static_argnums=(3, 4))
def _mapped(
    x: Array, weights: Array | None, keys: Array | None, how: Clustering, levels: int
) -> tuple[Array, Array, Array]:
    def one(row: tuple[Array, Array | None, Array | None]) -> tuple[Array, Array, Array]:
        x, weights, key = row
        points, unit, shift, top = _prepared(x, weights)
        centroids, steps = _settled(points, key, how, levels)
        return *_assigned(x, weights, centroids, unit, shift, top), steps

    rows, size = x.shape
    together = max(1, min(rows, _AT_ONCE // max(_bins(size), size, 1)))
    if size >= _BINS:
        together = 1  # one row fills the processor
    return lax.map(one, (x, weights, keys), batch_size=None if together == 1 else together)


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


@functools.partial(jax.jit, static_argnums=(2, 3))
def _settled(
    points: Points, key: Array | None, how: Clustering, levels: int
) -> tuple[Array, Array]:
    if how.exact:
        fine = points if points.grid is None else coarser(points, _OPTIMAL_BINS)
        return settled(points, optimal(fine, levels), how.iterations)
    fewest, most = _COARSE_BINS
    bins = min(most, max(fewest, 16 * levels))
    starts = [
        optimal(coarser(points, bins), levels)
        if name == "coarse"
        else begin(name, points, levels, key)
        for name in how.start
    ]
    if len(starts) == 1:
        return settled(points, starts[0], how.iterations)
    ends, steps = jax.vmap(lambda start: settled(points, start, how.iterations))(jnp.stack(starts))
    best = jnp.argmin(jax.vmap(lambda end: inertia(points, end))(ends))
    return ends[best], steps[best]


@jax.jit
def _assigned(
    x: Array, weights: Array | None, centroids: Array, unit: Array, shift: Array, top: Array
) -> tuple[Array, Array]:
    """Codebook and codes, after two more steps over the values themselves."""
    y, h = x.astype(jnp.float32) / unit, _scaled(weights, top)
    centroids = lax.fori_loop(0, 2, lambda _, c: refined(y, c, h), centroids + shift)
    return centroids * unit, nearest(y, centroids)
