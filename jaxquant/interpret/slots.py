"""Values of a site's own that travel with it through control flow: statistics, static scales.

A `Slot` says where in a traced call such a value lives, `SiteValues` holds the values of one
evaluation. Each rule of `control_flow` passes on what lies inside its equation, and nothing else:

| equation | read | updated |
|---|---|---|
| `jit` | further inputs | and further outputs |
| `scan`, slot stacked over it | scanned inputs | and scanned outputs |
| `scan`, other slots | closed over | carries |
| `while` | closed over | carries |
| `cond`, remat | further inputs | and outputs, of every branch |
| `shard_map`, condition of `while` | further inputs, whole on every device | shut: see `shut` |

So an updated value is one chain of uses through the whole program, in order of execution, and a
policy does no more than `values[slot] = new`.
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
      name: which of its values: `"lhs"` or `"rhs"`, the operand it belongs to.
      stacked: positions in `path` of those `scan`s over which there is one value per step, on a
        leading axis each, the outermost first. Inside, a slice of it is seen.
    """

    path: Path
    name: str
    stacked: tuple[int, ...] = dataclasses.field(default=(), compare=False)


@dataclasses.dataclass(frozen=True)
class Frame:
    """One equation that was entered, and whose inside is run another number of times.

    Attributes:
      at: its position in the call path.
      branch: which of its jaxprs.
      length: steps of a `scan`, else `None`.
      params: the parameters that a `scan` takes slice by slice.
    """

    at: int
    branch: int = 0
    length: int | None = None
    params: frozenset[str] = frozenset()


class SiteValues:
    """The values of one evaluation, as seen where the interpreter is.

    Attributes:
      values: a value (an array or any pytree) for each slot.
      updated: whether the policy changes them; they then leave control flow as they entered it.
      frames: what has been entered, the outermost first.
      shut: why values that are set here cannot leave, or `None`.
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
        """Their values, to be passed into an equation."""
        return [self.values[slot] for slot in slots]

    def within(
        self,
        slots: Sequence[Slot],
        values: Sequence[Any],
        body: Callable[[], R],
        frame: Frame | None = None,
    ) -> tuple[R, list[Any]]:
        """Evaluates what is inside an equation with the values as they arrive there.

        Returns:
          `body`'s result, and the values that leave: none if they are only read.
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
        """Takes up the values that have left an equation."""
        if self.updated:
            self._set(slots, values)

    def _set(self, slots: Sequence[Slot], values: Sequence[Any]) -> None:
        self.values.update(zip(slots, values, strict=True))

    def signature(self, path: Path) -> tuple[Any, ...]:
        """What the slots inside two calls of one helper must share, so that both can be one."""
        n = len(path)
        return tuple(
            (s.path[n:], s.name, tuple(at - n for at in s.stacked if at >= n))
            for s in self.inside(path)
        )

    @contextlib.contextmanager
    def shutting(self, reason: str) -> Iterator[None]:
        """A part of the program out of which no value can be carried."""
        outer, self.shut = self.shut, self.shut or reason
        try:
            yield
        finally:
            self.shut = outer
