"""A weight as the matrix `[K, N]` of its contraction."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax import Array

from jaxquant.qtensor import PerBlock, PerChannel, PerGroup, PerTensor, QSpec


def to_matrix(w: Array, axes: tuple[int, ...], batched: tuple[int, ...] = ()) -> Array:
    """`[*core] -> [*batched, K, N]`: contracted axes flattened in order, all others ascending.

    Args:
      w: one core array, without batch axes.
      axes: the contracted axes; `K` is the product of their sizes, the first axis slowest.
      batched: the axes kept in front, in this order.

    Raises:
      ValueError: an axis out of range, or named twice.

    >>> to_matrix(jnp.zeros((4, 2, 3, 5)), (1, 2), (0,)).shape
    (4, 6, 5)
    """
    order = _order(w.ndim, axes, batched)
    sizes = [w.shape[a] for a in order]
    lead, mid = len(batched), len(batched) + len(axes)
    return jnp.transpose(w, order).reshape(
        *sizes[:lead], math.prod(sizes[lead:mid]), math.prod(sizes[mid:])
    )


def from_matrix(
    m: Array, shape: tuple[int, ...], axes: tuple[int, ...], batched: tuple[int, ...] = ()
) -> Array:
    """Inverse of `to_matrix`: `[*batched, K, N] -> [*shape]`.

    >>> m = to_matrix(jnp.arange(24.0).reshape(2, 3, 4), (2, 0))
    >>> from_matrix(m, (2, 3, 4), (2, 0))[0, 1].tolist()
    [4.0, 5.0, 6.0, 7.0]
    """
    order = _order(len(shape), axes, batched)
    back = [order.index(a) for a in range(len(shape))]
    return jnp.transpose(m.reshape(*(shape[a] for a in order)), back)


def _order(ndim: int, axes: tuple[int, ...], batched: tuple[int, ...]) -> list[int]:
    for a in (*axes, *batched):
        if not -ndim <= a < ndim:
            raise ValueError(f"matrix view: axis {a} of an array of rank {ndim}")
    named = [a % ndim for a in (*batched, *axes)]
    if len(set(named)) != len(named):
        raise ValueError(f"matrix view: an axis is named twice in {axes} and {batched}")
    return [*named, *(a for a in range(ndim) if a not in named)]


def matrix_spec(spec: QSpec) -> QSpec:
    """The spec of the matrix view: groups run along `K`, channels are columns `N` or runs of them.

    Args:
      spec: axes named: groups over the contracted axes, channels over the other axes.

    Raises:
      ValueError: `PerBlock`: flattened axes have no tiles.

    >>> matrix_spec(QSpec("int4", PerGroup(64, axis=(-3, -2)))).granularity
    PerGroup(size=64, axis=(0,))
    """
    gran = spec.granularity
    if isinstance(gran, PerBlock):
        raise ValueError(
            f"matrix view: expected PerTensor, PerChannel or PerGroup, got {gran!r}, whose tiles "
            "a matrix of flattened axes does not keep"
        )
    if isinstance(gran, PerGroup):
        view: PerGroup | PerChannel | PerTensor = PerGroup(gran.size, (0,))
    elif isinstance(gran, PerChannel) and gran.axes != ():
        view = PerChannel((1,), gran.size)
    else:
        view = PerTensor()
    return dataclasses.replace(spec, granularity=view)
