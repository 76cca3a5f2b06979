"""Demands: the per-channel factors asked of a value, and which of them are tied."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxquant.rewrites.graph import Node

# One way to meet a demand: number of an operand -> the demand on it.
Option = dict[int, "Demand"]

UNASKED = -1


class Refused(Exception):
    """A demand that cannot be met; its text says why."""


@dataclasses.dataclass(eq=False)
class Demand:
    """The per-channel factors asked of a value.

    Attributes:
      index: for each element of the value, the number of its factor; -1 for none. Axes along which
        it is constant have size 1.
      power: -1 to divide, 1 to multiply.
      loops: id and length of the loops whose scanned arrays the demand has passed to, outermost
        first; the index then counts in `[*loops, channels]`.
      kind: how the value is used: `norm` multiplies, `bias` is added, `linear` is contracted.
      offset: the value plus this is to be divided.
    """

    index: np.ndarray
    power: int
    loops: tuple[tuple[int, int], ...] = ()
    kind: str = "linear"
    offset: float = 0.0

    def moved(self, index: np.ndarray, kind: str = "") -> Demand:
        """The same demand on a value with its elements elsewhere."""
        return dataclasses.replace(self, index=lean(index), kind=kind or self.kind)


class Ties:
    """The channels that must have equal factors: classes named by their first member."""

    def __init__(self, classes: np.ndarray) -> None:
        self.classes = classes

    def copy(self) -> Ties:
        """A copy to which ties can be added."""
        return Ties(self.classes.copy())

    def same(self, a: np.ndarray, b: np.ndarray, demand: Demand) -> bool:
        """Whether two indices ask for equal factors."""
        if demand.loops:
            return bool(np.all(a == b))
        return bool(np.all(self._named(a) == self._named(b)))

    def _named(self, index: np.ndarray) -> np.ndarray:
        return np.where(index < 0, index, self.classes[np.maximum(index, 0)])

    def across(self, demand: Demand, axis: int) -> np.ndarray:
        """The index with one axis cut to size 1: factors along it are tied."""
        index = demand.index
        first = index.take([0], axis)
        if index.shape[axis] == 1 or self.same(index, first, demand):
            return first
        if demand.loops or (index < 0).any():
            raise Refused("its channels differ where the value before it has only one")
        pairs = np.stack([np.broadcast_to(first, index.shape).ravel(), index.ravel()], 1)
        for a, b in np.unique(self.classes[pairs], axis=0):
            low, high = sorted((self.classes[a], self.classes[b]))
            self.classes[self.classes == high] = low
        if len(self.classes) > 1 and not self.classes.any():
            raise Refused("all of its channels come from one value")
        return first


def lean(index: np.ndarray) -> np.ndarray:
    """The index, cut to size 1 along axes on which it is constant."""
    for axis in range(index.ndim):
        if index.shape[axis] > 1:
            first = index.take([0], axis)
            if (index == first).all():
                index = first
    return index


Rule = Callable[[Node, Demand, Ties], list[Option]]


def is_zero(node: Node) -> bool:
    """Whether a value is a constant 0."""
    while node.op in ("broadcast_in_dim", "convert_element_type", "reshape"):
        node = node.parents[0]
    return node.op == "const" and node.detail == 0.0
