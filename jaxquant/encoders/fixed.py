"""Scales in storage order, and per value of the core array."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxquant.encoders.columns import Grid
from jaxquant.encoders.grids import grid_over, searched
from jaxquant.qtensor import (
    QSpec,
    QTensor,
    blocked,
    from_storage,
    read_back,
    storage_layout,
    to_storage,
    unblocked,
)


def fixed_grid(
    w: Array,
    spec: QSpec,
    storage_last_axes: tuple[int, ...],
    weights: Array | None,
    steps: int | None,
    least: float,
) -> tuple[Grid, Grid, Array | None]:
    """Grids from the range of an array, of any granularity: in storage order and per value.

    Args:
      w: float32 `[*core]`.
      spec: axes named, without a global scale.
      storage_last_axes: core axes to be stored last.
      weights: `[*core]`, weights of the squared errors; `None`: 1.
      steps: number of factors in the search for the range of least error; `None`: no search.
      least: see `searched`.

    Returns:
      Scale and zero point `[*groups]`; the same `[*core]`, with scales as read back; and for
      quantized scales the factor `[*core]` from the scales as read back to the exact ones.

    >>> from jaxquant.qtensor import PerGroup
    >>> spec = QSpec("int4", PerGroup(2, axis=0))
    >>> stored, each, _ = fixed_grid(jnp.array([[7.5], [1.0], [15.0]]), spec, (), None, None, 1.0)
    >>> stored[0].tolist(), each[0].tolist()
    ([[1.0, 2.0]], [[1.0], [1.0], [2.0]])
    """
    blank = storage_layout(w.shape, spec, storage_last_axes, "float32")
    x = blocked(blank, to_storage(blank, w))
    inner = tuple(range(1, x.ndim, 2))
    if steps is None:
        scale, zero = grid_over(x, inner, spec)
    else:
        weighting = 1.0 if weights is None else blocked(blank, to_storage(blank, weights))

        def cost(d: Array) -> Array:
            return jnp.sum(weighting * d * d, axis=inner, keepdims=True)

        (scale, zero), _ = searched(x, inner, spec, cost, steps, least)
    read, ratio = scale, None
    if spec.double:
        empty = jnp.max(jnp.abs(x), axis=inner, keepdims=True) == 0  # as in encode_given
        read = read_back(scale, empty)[1]
        ratio = _each(blank, x, scale / read)
    stored = scale.reshape(blank.groups), None if zero is None else zero.reshape(blank.groups)
    each = _each(blank, x, read), None if zero is None else _each(blank, x, zero)
    return stored, each, ratio


def stored_scales(each: Array, spec: QSpec, storage_last_axes: tuple[int, ...]) -> Array:
    """Scales `[*groups]` in storage order, from `[*core]` that is constant within each group.

    >>> from jaxquant.qtensor import PerGroup
    >>> spec = QSpec("int4", PerGroup(2, axis=0))
    >>> stored_scales(jnp.array([[1.0], [1.0], [2.0]]), spec, ()).tolist()
    [[1.0, 2.0]]
    """
    blank = storage_layout(each.shape, spec, storage_last_axes, "float32")
    x = blocked(blank, to_storage(blank, each))
    first = tuple(slice(None) if a % 2 == 0 else 0 for a in range(x.ndim))
    return x[first]


def _each(blank: QTensor, x: Array, a: Array) -> Array:
    return from_storage(blank, unblocked(blank, jnp.broadcast_to(a, x.shape)))


def scales_of_groups(
    s: Array,
    shape: tuple[int, ...],
    spec: QSpec,
    storage_last_axes: tuple[int, ...],
    axes: tuple[int, ...],
    batched: tuple[int, ...],
) -> Array:
    """Scales or zero points of the matrix view's groups, in storage order.

    Args:
      s: `[matrices, groups, N]`, one matrix per index of `batched`.
      shape: of the core array.
      spec: with groups over `axes`, in that order.
      storage_last_axes: core axes to be stored last.
      axes: contracted axes (negative).
      batched: as in `to_matrix`.

    Returns:
      `[*groups]` of the stored array: other axes in storage order, then groups.
    """
    blank = storage_layout(shape, spec, storage_last_axes, "float32")
    rank = len(shape)
    others = [a for a in range(-rank, 0) if a not in axes and a not in batched]
    have: list[int | None] = [*batched, None, *others]  # None: the groups
    count = s.shape[1]
    s = s.reshape([count if a is None else shape[a] for a in have])
    want: list[int | None] = [*(a for (a,) in blank.axes[:-1]), None]
    return jnp.transpose(s, [have.index(a) for a in want]).reshape(blank.groups)
