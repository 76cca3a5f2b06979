"""Grids: the scales and zero points of a range, or of the part of it that costs least."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from jaxquant.encoders.columns import Grid, rounded
from jaxquant.qtensor import QSpec, largest_magnitude, scales_of_range, scales_over


def grid_over(x: Array, inner: tuple[int, ...], spec: QSpec) -> Grid:
    """Scales and zero points of the range of `x` over the axes `inner` (kept), as float32.

    >>> grid_over(jnp.array([[3.0, -7.5]]), (1,), QSpec("int4"))[0].tolist()
    [[1.0]]
    """
    return _at(*_ends(x, inner), jnp.float32(1.0), spec)


def searched(
    x: Array,
    inner: tuple[int, ...],
    spec: QSpec,
    cost: Callable[[Array], Array],
    steps: int,
    least: float,
) -> tuple[Grid, Array]:
    """The grid of the range shrunk by the factor `p` that costs least.

    `p = argmin_p cost(x - Q_p(x))` over `steps` values from 1 down, `p_i = 1 - i (1 - least) /
    steps`; the larger of two that cost the same. A grid belongs to all values that share it, so
    each takes its own `p`.

    Args:
      x: float32, of any shape.
      inner: the axes over which a grid is shared.
      spec: format and range rule; its granularity and global scale are not looked at.
      cost: from the error of `x`, to what it costs for each grid: `x`'s shape, 1 along `inner`.
      steps: how many factors are tried, 1 among them.
      least: below the smallest of them.

    Returns:
      The grid and `p`, of `x`'s shape, 1 along `inner`.
    """
    ends = _ends(x, inner)

    def attempt(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        least_cost, chosen = best
        p = 1.0 - i.astype(jnp.float32) * ((1.0 - least) / steps)
        found = cost(x - rounded(x, _at(*ends, p, spec), spec.format))
        better = found < least_cost
        return jnp.where(better, found, least_cost), jnp.where(better, p, chosen)

    start = jnp.full_like(ends[2], jnp.inf), jnp.ones_like(ends[2])
    _, chosen = lax.fori_loop(0, steps, attempt, start)
    return _at(*ends, chosen, spec), chosen


def total_scale(x: Array, spec: QSpec) -> Array | None:
    """The global scale `[]` that `quantize` gives an array; `None` where the spec has none."""
    return scales_over(x, tuple(range(x.ndim)), spec)[2]


def _ends(x: Array, inner: tuple[int, ...]) -> tuple[Array, Array, Array]:
    low = jnp.min(x, axis=inner, keepdims=True, initial=0.0)
    high = jnp.max(x, axis=inner, keepdims=True, initial=0.0)
    return low, high, largest_magnitude(x, inner)


def _at(low: Array, high: Array, amax: Array, p: Array, spec: QSpec) -> Grid:
    scale, zero, _ = scales_of_range(low * p, high * p, amax * p, spec)
    # as in scales_over: what is not finite must not come out as if it were
    scale = jnp.where(jnp.isfinite(amax), scale.astype(jnp.float32), jnp.nan)
    return scale, zero
