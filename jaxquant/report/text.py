"""Text formatting of reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], words: int, total: Sequence[str] = ()
) -> list[str]:
    r"""Lines of a table: the first `words` columns left-aligned, the others right-aligned.

    >>> print("\n".join(table(["site", "dB"], [["a/b", "41.0"]], 1)))
    site    dB
    ----------
    a/b   41.0
    """
    everything = [head, *rows] + ([total] if total else [])
    widths = [max(len(row[i]) for row in everything) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [
            c.ljust(w) if i < words else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    lines = [line(row) for row in (head, *rows)]
    rule = "-" * max(map(len, lines))
    return [lines[0], rule, *lines[1:]] + ([rule, line(total)] if total else [])


def shown(path: str) -> str:
    """A key path as printed; the path of a tree that is a single array is empty.

    >>> shown("a/b"), shown("")
    ('a/b', '(root)')
    """
    return path or "(root)"


class Called:
    """A dataclass printed as its constructor call: function name and non-default arguments.

    >>> @dataclasses.dataclass(frozen=True, repr=False)
    ... class Rounding(Called):
    ...     name = "rounding"
    ...     stochastic: bool = False
    >>> Rounding(), Rounding(True)
    (rounding(), rounding(stochastic=True))
    """

    name: ClassVar[str] = ""

    def __repr__(self) -> str:
        instance: Any = self
        fields = [f for f in dataclasses.fields(instance) if getattr(self, f.name) != f.default]
        return f"{self.name}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in fields)})"


class Found(NamedTuple):
    """A number reported for a leaf, or its range over layers.

    >>> print(Found("awq", "ratio", 0.25, 0.5))
    awq: ratio 0.25 to 0.5
    """

    what: str
    name: str
    low: float
    high: float

    def __str__(self) -> str:
        more = f" to {self.high:.3g}" if self.high > self.low else ""
        return f"{self.what}: {self.name} {self.low:.3g}{more}"
