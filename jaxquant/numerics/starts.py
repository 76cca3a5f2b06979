"""Initial centroids of one-dimensional k-means, by name."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.numerics.cluster import Points

STARTS = ("linear", "quantile", "density", "kmeans++")
_SPACINGS = 4096  # number of intervals between quantiles that density is measured in


def begin(name: str, points: Points, levels: int, key: Array | None = None) -> Array:
    """`levels` ascending initial centroids.

    `"linear"`: `linspace(min, max)`, as in Deep Compression. `"quantile"`: the middles of equal
    shares of the weight. `"density"`: the middles of equal shares of `density^(1/3)`, the optimum
    for many levels. `"kmeans++"`: points drawn with a probability proportional to their squared
    distance from earlier draws; needs a `key`.

    Raises:
      ValueError: another name, or `"kmeans++"` without a key.

    Sources: Han et al., "Deep Compression" (2016); Panter and Dite, "Quantization distortion in
    pulse-count modulation with nonuniform spacing of levels" (1951); Arthur and Vassilvitskii,
    "k-means++: the advantages of careful seeding" (2007).
    """
    if name == "linear":
        return jnp.linspace(points.ends[0], points.ends[1], levels)
    if name == "quantile":
        return _quantiles(points, (jnp.arange(levels) + 0.5) / levels)
    if name == "density":
        return _density(points, levels)
    if name != "kmeans++":
        raise ValueError(f"k-means: start: expected one of {STARTS}, got {name!r}")
    if key is None:
        raise ValueError("k-means++ draws random numbers: pass key=jax.random.key(0)")
    return _drawn(points, levels, key)


def _quantiles(points: Points, shares: Array) -> Array:
    """Weighted quantiles of the points at `shares`."""
    mass = shares * points.weight[-1]
    at = jnp.searchsorted(points.weight[1:], mass.astype(jnp.float32))
    return points.place[jnp.minimum(at, points.place.shape[0] - 1)]


def _density(points: Points, levels: int) -> Array:
    """Between quantiles `d` apart, density is `1 / d`, and `density^(1/3)` has mass `d^(2/3)`."""
    count = min(points.place.shape[0], _SPACINGS + 1)
    quantiles = _quantiles(points, jnp.linspace(0.0, 1.0, count)).at[0].set(points.ends[0])
    quantiles = quantiles.at[-1].set(points.ends[1])
    distance = jnp.diff(quantiles, prepend=quantiles[:1])
    mass = jnp.cumsum(jnp.cbrt(distance * distance))
    wanted = (jnp.arange(levels, dtype=jnp.float32) + 0.5) / levels * mass[-1]
    return jnp.interp(wanted, mass, quantiles)


def _drawn(points: Points, levels: int, key: Array) -> Array:
    weight = jnp.maximum(jnp.diff(points.weight), 0.0)
    draws = jax.random.uniform(key, (levels,))

    def step(i: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        chosen, distance = state
        mass = jnp.cumsum(weight * distance)
        at = jnp.searchsorted(mass, draws[i] * mass[-1], side="right")
        new = points.place[jnp.minimum(at, mass.shape[0] - 1)]
        away = (points.place - new) ** 2
        return chosen.at[i].set(new), jnp.where(i == 0, away, jnp.minimum(distance, away))

    first = (jnp.zeros(levels, jnp.float32), jnp.ones_like(weight))
    return jnp.sort(lax.fori_loop(0, levels, step, first)[0])
