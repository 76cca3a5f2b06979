"""Grids: scales and zero points of a range, or of a range shrunk for the least cost."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from jaxquant.encoders.columns import Grid, rounded
from jaxquant.qtensor import QSpec, largest_magnitude, scales_of_range, scales_over


def grid_over(x: Array, inner: tuple[int, ...], spec: QSpec) -> Grid:
    """Float32 scales and zero points of the range of `x` over the axes `inner`, kept with size 1.

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
    """The grid of the range shrunk by the factor `p` with the least cost.

    `p = argmin_p cost(x - Q_p(x))` over `steps` values from 1 down, `p_i = 1 - i (1 - least) /
    steps`; the larger `p` wins a tie. Each grid has its own `p`.

    Args:
      x: float32, of any shape.
      inner: the axes that share a grid.
      spec: format and range rule; its granularity and global scale are ignored.
      cost: from the error of `x` to the cost of each grid: the shape of `x`, 1 along `inner`.
      steps: number of candidate factors, 1 included.
      least: exclusive lower bound of the factors.

    Returns:
      The grid and `p`, in the shape of the cost.
    """
    ends = _ends(x, inner)

    def attempt(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        least_cost, chosen = best
        p = 1.0 - i.astype(jnp.float32) * ((1.0 - least) / steps)
        costs = cost(x - rounded(x, _at(*ends, p, spec), spec.format))
        better = costs < least_cost
        return jnp.where(better, costs, least_cost), jnp.where(better, p, chosen)

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
    # as in scales_over: non-finite values must not give a finite scale
    scale = jnp.where(jnp.isfinite(amax), scale.astype(jnp.float32), jnp.nan)
    return scale, zero
