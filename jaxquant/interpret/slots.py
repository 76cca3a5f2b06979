"""Per-site values that pass through control flow: statistics, static scales.

A `Slot` is the place of one value in a traced call; `SiteValues` holds the values of one
evaluation. Each rule of `control_flow` passes the values of sites inside its equation, no others:

| equation | values only read | values updated |
|---|---|---|
| `jit` | extra inputs | extra inputs and outputs |
| `scan`, slot stacked over it | scanned inputs | scanned inputs and outputs |
| `scan`, other slots | closed over | carries |
| `while` | closed over | carries |
| `cond`, remat | extra inputs | extra inputs and outputs of every branch |
| `shard_map` | extra inputs, replicated | cannot leave, see `shut` |
| condition of `while` | closed over | cannot leave, see `shut` |

So updates of a value follow the program's order of execution, and a policy only sets
`values[slot] = new`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

R = TypeVar("R")
Path = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of one value of one site.

    Attributes:
      path: the site's call path, `Interpreter.call_path` at its contraction.
      name: which of the site's values: `"lhs"` or `"rhs"` is the operand it belongs to.
      stacked: positions in `path` of the `scan`s with one value per step, outermost first. Each
        adds a leading axis; inside it, the value is one slice.
    """

    path: Path
    name: str
    stacked: tuple[int, ...] = dataclasses.field(default=(), compare=False)


@dataclasses.dataclass(frozen=True)
class Frame:
    """An entered equation whose body may run any number of times.

    Attributes:
      at: its position in the call path.
      branch: index of its jaxpr, for a `cond`.
      length: steps of a `scan`, else `None`.
      params: the parameters that a `scan` slices.
    """

    at: int
    branch: int = 0
    length: int | None = None
    params: frozenset[str] = frozenset()


class SiteValues:
    """The values of one evaluation, as seen at the current equation.

    Attributes:
      values: a value (an array or any pytree) for each slot.
      updated: whether the policy changes them; they are then outputs of control flow, too.
      frames: the frames entered, outermost first.
      shut: why values set here cannot leave the equation, or `None`.
    """

    def __init__(self, values: Mapping[Slot, Any] | None = None, *, updated: bool = False) -> None:
        self.values: dict[Slot, Any] = dict(values or {})
        self.updated = updated
        self.frames: tuple[Frame, ...] = ()
        self.shut: str | None = None

    def inside(self, path: Path) -> list[Slot]:
        """The slots within the equation at a call path, in a fixed order."""
        n = len(path)
        return [slot for slot in self.values if slot.path[:n] == path]

    def read(self, slots: Sequence[Slot]) -> list[Any]:
        """The values of slots, to pass into an equation."""
        return [self.values[slot] for slot in slots]

    def within(
        self,
        slots: Sequence[Slot],
        values: Sequence[Any],
        body: Callable[[], R],
        frame: Frame | None = None,
    ) -> tuple[R, list[Any]]:
        """Evaluates an equation's body with the values as they arrive inside.

        Returns:
          `body`'s result, and the updated values: none if they are only read.
        """
        outer, frames = self.read(slots), self.frames
        self._set(slots, values)
        if frame is not None:
            self.frames = (*frames, frame)
        try:
            out = body()
            return out, self.read(slots) if self.updated else []
        finally:
            self._set(slots, outer)
            self.frames = frames

    def leave(self, slots: Sequence[Slot], values: Sequence[Any]) -> None:
        """Sets the values that an equation has returned."""
        if self.updated:
            self._set(slots, values)

    def _set(self, slots: Sequence[Slot], values: Sequence[Any]) -> None:
        self.values.update(zip(slots, values, strict=True))

    def signature(self, path: Path) -> tuple[Any, ...]:
        """The slots inside a call; calls of a helper can share one trace if these are equal."""
        n = len(path)
        return tuple(
            (s.path[n:], s.name, tuple(at - n for at in s.stacked if at >= n))
            for s in self.inside(path)
        )

    @contextlib.contextmanager
    def shutting(self, reason: str) -> Iterator[None]:
        """A part of the program that no updated value can leave."""
        outer, self.shut = self.shut, self.shut or reason
        try:
            yield
        finally:
            self.shut = outer
