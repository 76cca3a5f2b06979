"""The order and the blocks in which GPTQ rounds the columns of a layer."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxquant.encoders.columns import Plan

Order = Literal["static", "dynamic"] | None

# Bounds for the rows of the innermost block; the number with the least padding is taken. A row
# costs one product with the earlier rows of its block, a block one product with earlier blocks.
_ROWS = (16, 32)


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Columns `K` placed in blocks, groups padded to whole blocks.

    Attributes:
      place: int32 `[padded]`, the column at each position; `K` for padding.
      plan: the blocks.
      groups: number of groups without padding; 0 if grids are fixed in advance.
      group: padded size of a group.
    """

    place: np.ndarray
    plan: Plan
    groups: int
    group: int


def layout(k: int, group: int | None, block: int) -> Layout:
    """Blocks for `k` columns; `group` of them share a grid that is chosen when they begin.

    >>> layout(10, 4, 128).plan, layout(10, 4, 128).place[-4:].tolist()
    (Plan(levels=(12, 4), group=1), [8, 9, 10, 10])
    """
    k = max(k, 1)
    if group is None:
        count = math.ceil(k / block)
        size, rows = _padded(math.ceil(k / count))
        place = np.arange(count * size)
        return Layout(_capped(place, k), Plan(_distinct(size, rows)), 0, size)
    group = min(group, k)
    groups = math.ceil(k / group)
    if group > block:
        parts = math.ceil(group / block)
        size, rows = _padded(math.ceil(group / parts))
        padded, stored = parts * size, groups
        plan = Plan(_distinct(padded, size, rows), 0)
    else:
        padded, rows = _padded(group)
        together = max(1, block // padded)
        count = math.ceil(groups / together)
        together = math.ceil(groups / count)
        stored = count * together
        levels = _distinct(together * padded, padded, rows)
        plan = Plan(levels, 0 if together == 1 else 1)
    column = np.arange(stored)[:, None] * group + np.arange(padded)[None, :]
    column = np.where(np.arange(padded)[None, :] < group, column, k)
    return Layout(_capped(column.reshape(-1), k), plan, groups, padded)


def ordered(lay: Layout, diagonal: Array, order: Order) -> tuple[Array, Array | None]:
    """The column and the group at each position, important ones first.

    `"static"`: columns by descending `H_kk`, for grids that are fixed in advance. `"dynamic"`:
    whole groups by descending sum of `H_kk`, and columns within their group.

    Args:
      lay: the blocks.
      diagonal: `H_kk` `[K]`.
      order: see above; `None` keeps the original order.

    Returns:
      Columns `[padded]`, `K` for padding; groups `[stored]`, `None` if grids are fixed in advance.
    """
    place = jnp.asarray(lay.place, jnp.int32)
    if order is None:
        stored = len(lay.place) // lay.group
        return place, jnp.arange(stored) if lay.groups else None
    if not lay.groups:
        wanted = jnp.argsort(-diagonal, stable=True).astype(jnp.int32)
        wanted = jnp.append(wanted, jnp.int32(diagonal.shape[0]))
        return wanted[place], None
    size = jnp.take(diagonal, place, mode="fill", fill_value=-1.0).reshape(-1, lay.group)
    column_order = jnp.argsort(-size, axis=1, stable=True)
    real = jnp.any(size >= 0, axis=1)
    weight = jnp.where(real, jnp.sum(jnp.maximum(size, 0.0), axis=1), -1.0)
    group_order = jnp.argsort(-weight, stable=True)
    place = jnp.take_along_axis(place.reshape(-1, lay.group), column_order, axis=1)
    return place[group_order].reshape(-1), group_order


def _capped(place: np.ndarray, k: int) -> np.ndarray:
    return np.minimum(place, k).astype(np.int32)


def _padded(n: int) -> tuple[int, int]:
    """`n`, padded to whole innermost blocks, and the rows of such a block."""
    if n <= _ROWS[1]:
        return n, n
    rows = min(range(_ROWS[1], _ROWS[0] - 1, -1), key=lambda r: math.ceil(n / r) * r)
    return math.ceil(n / rows) * rows, rows


def _distinct(*sizes: int) -> tuple[int, ...]:
    """Sizes of nested blocks without duplicates."""
    return tuple(dict.fromkeys(sizes))
