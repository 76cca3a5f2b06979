"""Moves per-channel factors of an activation into leaves; the function is unchanged."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxquant.observers.inputs import InputStats
from jaxquant.qtensor import QTensor, is_qtensor


@dataclasses.dataclass(frozen=True, eq=False)
class Absorber:
    """A leaf that absorbs per-channel factors: it becomes `leaf * c[index] ** power`.

    Attributes:
      path: its key path.
      shape: its shape.
      index: for each element of the leaf, the number of its factor in `[*layers, channels]`; -1
        for none. Axes along which it is constant have size 1.
      power: -1 to divide, 1 to multiply.
      kind: `norm` if it multiplies a value, `bias` if it is added, `linear` for a kernel.
      offset: the leaf plus this is scaled, as in a norm that multiplies by `1 + scale`.
    """

    path: str
    shape: tuple[int, ...]
    index: np.ndarray
    power: int
    kind: str
    offset: float = 0.0

    @property
    def axes(self) -> tuple[int, ...]:
        """The leaf's axes that layers and channels run along."""
        return tuple(a for a, n in enumerate(self.index.shape) if n > 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Absorbed:
    """How per-channel factors of one activation move into leaves.

    Attributes:
      layers: sizes of the leading axes of the factors: the loops that scan the weights.
      channels: the number of channels: batch axes and contracted axes of the weights' first
        contraction, flattened in this order; input features of a convolution.
      weights: the leaves that the activation is contracted with; they are multiplied.
      producers: the leaves that absorb the division.
      tied: for each channel the first one that must have the same factor, where one value feeds
        several channels (grouped heads); `None` if all factors are independent.
    """

    layers: tuple[int, ...]
    channels: int
    weights: tuple[Absorber, ...]
    producers: tuple[Absorber, ...]
    tied: np.ndarray | None = None

    @property
    def kind(self) -> str:
        """`linear` if a kernel absorbs the factors, else `norm`, else `bias`."""
        kinds = {p.kind for p in self.producers}
        return next((kind for kind in ("linear", "norm") if kind in kinds), "bias")

    def tie(self, c: Array) -> Array:
        """The factors `[*layers, channels]`, tied ones replaced by their geometric mean."""
        if self.tied is None:
            return c
        return jnp.exp(self._tied_mean(jnp.log(c)))

    def tie_stats(self, stats: InputStats) -> InputStats:
        """Statistics in which tied channels share their mean and largest magnitudes.

        `awq` needs them to measure tied factors; apply `tie` to its factors as well.
        """
        if self.tied is None:
            return stats
        most = jnp.zeros_like(stats.absmax).at[..., self.tied].max(stats.absmax)
        return dataclasses.replace(
            stats, absmean=self._tied_mean(stats.absmean), absmax=most[..., self.tied]
        )

    def _tied_mean(self, a: Array) -> Array:
        """The mean of `[*layers, channels]` over tied channels."""
        assert self.tied is not None
        count = np.maximum(np.bincount(self.tied, minlength=self.channels), 1)
        sums = jnp.zeros_like(a).at[..., self.tied].add(a)
        means = sums / count.astype(np.float32).reshape((1,) * (a.ndim - 1) + (-1,))
        return means[..., self.tied]


def scaled_leaf(leaf: Any, absorber: Absorber, c: Array) -> Any:
    """`leaf * c[index] ** power`, as the absorber describes.

    A float leaf is computed in float32. In a `QTensor` only the scales change, which is exact but
    for their rounding to their dtype; each channel must have a separate scale.

    Args:
      leaf: float array or `QTensor` of the absorber's shape.
      absorber: which elements of the leaf have which factors.
      c: positive factors `[*layers, channels]`.

    Raises:
      ValueError: channels of a `QTensor` share scales, or it cannot be scaled for another reason;
        the leaf has a different shape.

    >>> absorber = Absorber("w", (2, 2), np.array([[0, 1]]), -1, "linear")
    >>> scaled_leaf(jnp.ones((2, 2)), absorber, jnp.array([1.0, 2.0])).tolist()
    [[1.0, 0.5], [1.0, 0.5]]
    """
    if tuple(leaf.shape) != absorber.shape:
        raise ValueError(
            f"{absorber.path}: expected shape {list(absorber.shape)}, got {list(leaf.shape)}"
        )
    by = _factors(absorber.index, c, absorber.power)
    if is_qtensor(leaf):
        return _scaled_codes(leaf, by, absorber)
    return _scaled(jnp.asarray(leaf), by, absorber.offset)


@functools.partial(jax.jit, static_argnums=2)
def _factors(index: Array, c: Array, power: int) -> Array:
    """The factor of each channel, 1 where the index is negative, or its inverse."""
    flat = c.astype(jnp.float32).reshape(-1)
    by = jnp.where(index < 0, 1.0, flat[jnp.maximum(index, 0)])
    return by if power > 0 else 1.0 / by


@functools.partial(jax.jit, static_argnums=2)
def _scaled(w: Array, by: Array, offset: float) -> Array:
    """`(w + offset) c - offset`."""
    wide = w.astype(jnp.promote_types(jnp.float32, w.dtype))
    return ((wide + offset) * jnp.broadcast_to(by, w.shape) - offset).astype(w.dtype)


def _scaled_codes(q: QTensor, by: Array, absorber: Absorber) -> QTensor:
    lead, rank = len(q.batch), len(q.core)
    reason = ""
    if absorber.offset:
        reason = "a constant is added to it"
    elif q.calibration is not None and (q.calibration.output or q.calibration.folded):
        reason = "its results are requantized to integers"
    for merged, block in zip(q.axes, q.blocks, strict=True):
        if block > 1 and any(by.shape[lead + rank + a] > 1 for a in merged):
            reason = "several of its channels share a scale"
    if jnp.finfo(q.spec.scale_dtype).bits < 16:
        reason = "its scales are too coarse"
    if reason:
        raise ValueError(f"{absorber.path} is quantized and cannot absorb factors: {reason}")
    # in the layout of the scales: storage axes in order, of size 1 where they share a scale
    order = [a for merged in q.axes for a in merged]
    by = jnp.broadcast_to(by, (*q.batch, *by.shape[lead:]))
    by = by.transpose([*range(lead), *(lead + rank + a for a in order)])
    sizes: list[int] = []
    for merged in q.axes:
        here = by.shape[lead + len(sizes) : lead + len(sizes) + len(merged)]
        sizes += [q.core[a] if max(here, default=1) > 1 else 1 for a in merged]
    by = jnp.broadcast_to(by, (*q.batch, *sizes))
    groups, at = [], 0
    for merged in q.axes:
        groups.append(math.prod(sizes[at : at + len(merged)]))
        at += len(merged)
    by = by.reshape(*q.batch, *groups)
    scale = (q.scale.astype(jnp.float32) * by).astype(q.scale.dtype)
    return dataclasses.replace(q, scale=scale)


def absorb(leaves: Mapping[str, Any], absorbed: Absorbed, c: Array) -> dict[str, Any]:
    """The new leaves: weights multiplied by `c`, producers of their input divided by it.

    Args:
      leaves: all leaves that `absorbed` names, by key path.
      absorbed: see `absorbers`.
      c: positive factors `[*layers, channels]`; tied channels take their mean.

    Raises:
      ValueError: `c` has a different shape, or see `scaled_leaf`.
    """
    shape = (*absorbed.layers, absorbed.channels)
    if tuple(c.shape) != shape:
        raise ValueError(f"factors: expected shape {list(shape)}, got {list(c.shape)}")
    c = absorbed.tie(c)
    named = (*absorbed.weights, *absorbed.producers)
    return {leaf.path: scaled_leaf(leaves[leaf.path], leaf, c) for leaf in named}
