"""A demand on a value: that a factor for each channel be in it; and which factors are tied."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxquant.rewrites.graph import Node

# One way to meet a demand: what to ask of which operands.
Option = dict[int, "Demand"]

UNASKED = -1


class Refused(Exception):
    """A demand that cannot be met; its text says why."""


@dataclasses.dataclass(eq=False)
class Demand:
    """What is asked of a value.

    Attributes:
      index: for each place of the value, which factor; -1 where nothing is asked. Axes along which
        it is constant have size 1.
      power: -1 to divide, 1 to multiply.
      loops: identity and length of the loops whose steps were taken back, outermost first; the
        index then counts in `[*loops, channels]`.
      kind: what the value does: `norm` multiplies, `bias` is added, `linear` is contracted.
      offset: the value plus this is what is to be divided.
    """

    index: np.ndarray
    power: int
    loops: tuple[tuple[int, int], ...] = ()
    kind: str = "linear"
    offset: float = 0.0

    def moved(self, index: np.ndarray, kind: str = "") -> Demand:
        """The same of a value that has its places elsewhere."""
        return dataclasses.replace(self, index=lean(index), kind=kind or self.kind)


class Ties:
    """Which channels must have the same factor: classes named by their first member."""

    def __init__(self, classes: np.ndarray) -> None:
        self.classes = classes

    def copy(self) -> Ties:
        """Ties to be added to apart from these."""
        return Ties(self.classes.copy())

    def same(self, a: np.ndarray, b: np.ndarray, demand: Demand) -> bool:
        """Whether two indices ask the same."""
        if demand.loops:
            return bool(np.all(a == b))
        return bool(np.all(self._named(a) == self._named(b)))

    def _named(self, index: np.ndarray) -> np.ndarray:
        return np.where(index < 0, index, self.classes[np.maximum(index, 0)])

    def across(self, demand: Demand, axis: int) -> np.ndarray:
        """The index with one axis gone to size 1: factors along it must be the same."""
        index = demand.index
        first = index.take([0], axis)
        if index.shape[axis] == 1 or self.same(index, first, demand):
            return first
        if demand.loops or (index < 0).any():
            raise Refused("its channels differ where what comes before has only one value")
        pairs = np.stack([np.broadcast_to(first, index.shape).ravel(), index.ravel()], 1)
        for a, b in np.unique(self.classes[pairs], axis=0):
            low, high = sorted((self.classes[a], self.classes[b]))
            self.classes[self.classes == high] = low
        if len(self.classes) > 1 and not self.classes.any():
            raise Refused("what comes before has one value for all of its channels")
        return first


def lean(index: np.ndarray) -> np.ndarray:
    """The index with axes along which it is constant cut to size 1."""
    for axis in range(index.ndim):
        if index.shape[axis] > 1:
            first = index.take([0], axis)
            if (index == first).all():
                index = first
    return index


Rule = Callable[[Node, Demand, Ties], list[Option]]


def is_zero(node: Node) -> bool:
    """Whether a value is 0 everywhere, by constants alone."""
    while node.op in ("broadcast_in_dim", "convert_element_type", "reshape"):
        node = node.parents[0]
    return node.op == "const" and node.detail == 0.0
