"""Second moments of the inputs: their axes, their checks and the errors they weight."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax import Array, lax

from jaxquant.encoders.checks import check_finite, checked_weight
from jaxquant.observers import InputStats
from jaxquant.qtensor import PerGroup, QSpec


@dataclasses.dataclass(frozen=True)
class Moments:
    """The axes of a weight that the moments belong to; all negative, see `InputStats`."""

    axes: tuple[int, ...]
    batched: tuple[int, ...]


def grouped_axes(spec: QSpec, ndim: int) -> tuple[int, ...] | None:
    """The axes (negative) that groups run over; `None` without groups.

    >>> grouped_axes(QSpec("int4", PerGroup(32, axis=0)), 2)
    (-2,)
    """
    gran = spec.granularity
    if not isinstance(gran, PerGroup) or gran.axis is None:
        return None
    axes = (gran.axis,) if isinstance(gran.axis, int) else gran.axis
    return tuple(a % ndim - ndim for a in axes)


def aligned(
    moments: Moments, grouped: tuple[int, ...] | None, hessian: Array, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], Array]:
    """The contracted axes in the order of the groups' axes, and `H` in that order.

    Args:
      moments: the axes of the statistics.
      grouped: the axes of the groups (negative); `None`, or axes other than the contracted ones,
        change nothing.
      hessian: `[*batched, K, K]`.
      shape: of the core array.
    """
    axes = moments.axes
    if grouped is None or grouped == axes or sorted(grouped) != sorted(axes):
        return axes, hessian
    lead, count = hessian.ndim - 2, len(axes)
    sizes = [shape[a] for a in axes]
    order = [axes.index(a) for a in grouped]
    rows, columns = ([lead + start + i for i in order] for start in (0, count))
    split = hessian.reshape(*hessian.shape[:lead], *sizes, *sizes)
    return grouped, jnp.transpose(split, [*range(lead), *rows, *columns]).reshape(hessian.shape)


def energy(hessian: Array, d: Array) -> Array:
    """`tr(D^T H D)`, summed over matrices: the output error that a weight error `D` causes.

    >>> energy(jnp.diag(jnp.array([1.0, 4.0])), jnp.ones((2, 3))).tolist()
    15.0
    """
    return jnp.sum(d * jnp.matmul(hessian, d, precision=lax.Precision.HIGHEST))


def counting(diagonal: Array) -> Array:
    """`H_kk` `[..., K]` with zeros replaced by the mean of the others, or by 1 if all are 0.

    >>> counting(jnp.array([1.0, 0.0, 3.0])).tolist()
    [1.0, 2.0, 3.0]
    """
    live = diagonal > 0
    count = jnp.maximum(jnp.sum(live, axis=-1, keepdims=True), 1)
    mean = jnp.sum(jnp.where(live, diagonal, 0.0), axis=-1, keepdims=True) / count
    return jnp.where(live, diagonal, jnp.where(mean > 0, mean, 1.0))


def check_moments(
    name: str,
    w: Array,
    spec: QSpec,
    storage_last_axes: tuple[int, ...],
    batch_axes: int,
    stats: InputStats | None,
) -> InputStats:
    """The statistics, checked against the weight; axes made negative.

    Raises:
      ValueError: missing statistics, or ones of another type or shape; arrays that are not finite
        (unchecked under a trace).
    """
    if stats is None:
        raise ValueError(
            f"{name}: needs statistics of the weight's inputs: expected "
            "stats=input_stats(...) of the observer inputs(), got None"
        )
    if not isinstance(stats, InputStats):
        raise ValueError(f"{name}: stats: expected InputStats, got {type(stats).__name__}")
    if stats.hessian is None:
        raise ValueError(
            f"{name}: stats: expected second moments, got InputStats without: gather them with "
            "inputs(), not inputs(hessian=False)"
        )
    w = checked_weight(name, w, spec, storage_last_axes, batch_axes)
    core = w.shape[batch_axes:]
    rank = len(core)
    for a in (*stats.axes, *stats.batched):
        if not -rank <= a < rank:
            raise ValueError(f"{name}: stats: axis {a} of an array of shape {list(core)}")
    axes, batched = (tuple(a % rank - rank for a in some) for some in (stats.axes, stats.batched))
    if not axes or len({*axes, *batched}) != len(axes) + len(batched):
        raise ValueError(
            f"{name}: stats: expected contracted and batched axes that differ, got {stats.axes} "
            f"and {stats.batched}"
        )
    k = math.prod(core[a] for a in axes)
    expected = (*w.shape[:batch_axes], *(core[a] for a in batched), k, k)
    if stats.hessian.shape != expected:
        raise ValueError(
            f"{name}: stats: expected second moments {list(expected)} for a weight "
            f"{list(w.shape)}, got {list(stats.hessian.shape)}"
        )
    check_finite(name, "second moments", stats.hessian)
    return dataclasses.replace(stats, axes=axes, batched=batched)
