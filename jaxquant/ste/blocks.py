"""Conversion between a trained array and the blocks of its `QTensor`, which share a step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxquant.qtensor import (
    QSpec,
    QTensor,
    blocked,
    from_storage,
    spread,
    storage_layout,
    to_storage,
    unblocked,
)


def to_blocks(q: QTensor, w: Array) -> Array:
    """`[*batch, *core] -> [*batch, g0, b0, g1, b1, ...]` in `q`'s storage order, zero-padded."""
    lay = functools.partial(to_storage, q)
    for _ in q.batch:
        lay = jax.vmap(lay)
    return blocked(q, lay(w))


def laid_out(q: QTensor, a: Array) -> Array:
    """`[*batch, *groups] -> [*batch, *core]`: repeats each block's value over its elements."""
    sizes = (n for pair in zip(q.groups, q.blocks, strict=True) for n in pair)
    each = jnp.broadcast_to(spread(q, a), (*q.batch, *sizes))
    return from_storage(q, unblocked(q, each))


def over_blocks(q: QTensor, x: Array) -> Array:
    """`[*batch, g0, b0, g1, b1, ...] -> [*batch, *groups]`: the sum over each block."""
    lead = x.ndim - 2 * len(q.axes)
    return jnp.sum(x, axis=tuple(range(lead + 1, x.ndim, 2)))


def members(q: QTensor) -> np.ndarray:
    """Number of values in each block, without padding: float32 `[*groups]`."""
    counts = np.ones((), np.float32)
    for size, block, groups in zip(q.storage, q.blocks, q.groups, strict=True):
        each = np.minimum(block, size - block * np.arange(groups)).astype(np.float32)
        counts = counts[..., None] * each
    return counts


def filled(q: QTensor) -> np.ndarray:
    """Mask of values that are not padding: 0 or 1, float32 `[g0, b0, g1, b1, ...]`."""
    shape: list[int] = []
    inside = np.ones((), bool)
    for size, block, groups in zip(q.storage, q.blocks, q.groups, strict=True):
        shape += [groups, block]
        inside = inside[..., None] & (np.arange(groups * block) < size)
    return inside.reshape(shape).astype(np.float32)


def for_each(
    function: Callable[..., dict[str, Array]],
    w: Array,
    spec: QSpec,
    storage_last_axes: tuple[int, ...],
    batch_axes: int,
) -> dict[str, Array]:
    """`function(q, blocks)` mapped over the batch axes; the leaves of `q` are `None`."""
    core = w.shape[batch_axes:]
    rows = w.reshape(math.prod(w.shape[:batch_axes]), *core)
    q = storage_layout(core, spec, storage_last_axes, w.dtype.name)

    def one(row: Array) -> dict[str, Array]:
        return function(q, blocked(q, to_storage(q, row.astype(jnp.float32))))

    results = jax.vmap(one)(rows)
    return {n: a.reshape(*w.shape[:batch_axes], *a.shape[1:]) for n, a in results.items()}


def mean_over_blocks(q: QTensor, x: Array) -> Array:
    """Mean over each block, without padding, where `x` must be 0."""
    return over_blocks(q, x) / jnp.asarray(np.maximum(members(q), 1.0))
