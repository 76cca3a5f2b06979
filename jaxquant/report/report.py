"""Report on every parameter, as a printed table and a dict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from jaxquant.report.activations import ActivationReport
from jaxquant.report.events import Edge, Event
from jaxquant.report.text import shown, table

_LISTED = 3  # maximum number of keys on one line


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """How one leaf was quantized, or why not.

    Attributes:
      path: key path.
      shape: shape of the array, which does not change.
      dtype: name of its dtype before.
      action: in words: `int8 per channel, activations int8`, or `kept: <reason>`.
      quantized: whether this call made it a `QTensor`.
      bytes_before: bytes of the array before.
      bytes_after: bytes stored now, scales included.
      sqnr_db: signal to quantization noise ratio; `inf` where exact, `None` where not measured.
      sites: keys of the contractions and lookups that use it.
      notes: other remarks, such as a tie to another leaf.
      shared: whether another path already counts its bytes.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    action: str
    quantized: bool
    bytes_before: int
    bytes_after: int
    sqnr_db: float | None = None
    sites: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    shared: bool = False

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per value, scales included; 0 for an empty array."""
        size = math.prod(self.shape)
        return 8.0 * self.bytes_after / size if size else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-serialisable values.

        JSON has no infinity: where the result is exact, `sqnr_db` is `None` and `exact` is true.
        """
        fields = dataclasses.asdict(self)
        exact = self.sqnr_db is not None and math.isinf(self.sqnr_db) and self.sqnr_db > 0
        finite = self.sqnr_db is not None and math.isfinite(self.sqnr_db)
        return fields | {
            "shape": list(self.shape),
            "sites": list(self.sites),
            "notes": list(self.notes),
            "sqnr_db": self.sqnr_db if finite else None,
            "exact": exact,
            "bits_per_weight": self.bits_per_weight,
        }


@dataclasses.dataclass(frozen=True)
class Report:
    """How every leaf of a params tree was quantized; `print` shows it as a table.

    Attributes:
      leaves: one entry per leaf, in the tree's order.
      recipe: name of the recipe.
      events: costly actions of the interpreter, see `Event`.
      notes: remarks on the report as a whole.
      attention: contractions without a parameter, as of attention scores: key of the site, and the
        name of the format that both operands are quantized to, `None` where they stay float.
      edges: where results of integer contractions go, for recipes that set `requantize`.
      activations: how static activations were calibrated; `None` where there are none.

    >>> leaf = LeafReport("w", (4, 8), "float32", "int8 per channel", True, 128, 64, 45.0)
    >>> Report((leaf,)).ratio
    0.5
    """

    leaves: tuple[LeafReport, ...]
    recipe: str = ""
    events: tuple[Event, ...] = ()
    notes: tuple[str, ...] = ()
    attention: tuple[tuple[str, str | None], ...] = ()
    edges: tuple[Edge, ...] = ()
    activations: ActivationReport | None = None

    @property
    def quantized(self) -> int:
        """Number of quantized leaves."""
        return sum(leaf.quantized for leaf in self.leaves)

    @property
    def bytes_before(self) -> int:
        """Bytes of all leaves before; tied leaves count once."""
        return sum(leaf.bytes_before for leaf in self.leaves if not leaf.shared)

    @property
    def bytes_after(self) -> int:
        """Bytes of all leaves now, scales included; tied leaves count once."""
        return sum(leaf.bytes_after for leaf in self.leaves if not leaf.shared)

    @property
    def ratio(self) -> float:
        """Bytes now over bytes before; 1 for an empty tree."""
        return self.bytes_after / self.bytes_before if self.bytes_before else 1.0

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per value, over all leaves."""
        size = sum(math.prod(leaf.shape) for leaf in self.leaves if not leaf.shared)
        return 8.0 * self.bytes_after / size if size else 0.0

    def __getitem__(self, path: str) -> LeafReport:
        """The entry of one path; `KeyError` if there is none."""
        for leaf in self.leaves:
            if leaf.path == path:
                return leaf
        raise KeyError(path)

    def with_events(self, events: Iterable[Event]) -> Report:
        """This report with more events, without duplicates."""
        merged = dict.fromkeys((*self.events, *events))
        return dataclasses.replace(self, events=tuple(merged))

    def with_leaf_notes(self, notes: Mapping[str, Iterable[str]]) -> Report:
        """This report with more notes on leaves, by path."""
        leaves = (
            dataclasses.replace(row, notes=(*row.notes, *notes.get(row.path, ())))
            for row in self.leaves
        )
        return dataclasses.replace(self, leaves=tuple(leaves))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-serialisable values."""
        return {
            "recipe": self.recipe,
            "quantized": self.quantized,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "ratio": self.ratio,
            "bits_per_weight": self.bits_per_weight,
            "leaves": [leaf.to_dict() for leaf in self.leaves],
            "attention": [{"site": key, "format": name} for key, name in self.attention],
            "edges": [dataclasses.asdict(edge) for edge in self.edges],
            "activations": None if self.activations is None else self.activations.to_dict(),
            "events": [dataclasses.asdict(event) for event in self.events],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        head = ("path", "array", "action", "before", "after", "bits", "SQNR dB")
        rows = [_row(leaf) for leaf in self.leaves]
        total = (
            "total",
            f"{len(self.leaves)} leaves",
            f"{self.quantized} quantized" + (f" by {self.recipe}" if self.recipe else ""),
            _bytes(self.bytes_before),
            _bytes(self.bytes_after),
            f"{self.bits_per_weight:.2f}",
            f"x {self.ratio:.3f}",
        )
        lines = table(head, rows, 3, total)
        lines += _attention(self.attention)
        lines += _edges(self.edges)
        lines += [f"{shown(leaf.path)}: {n}" for leaf in self.leaves for n in leaf.notes]
        lines += list(self.notes)
        lines += [str(event) for event in self.events]
        if self.activations is not None:
            lines += ["", str(self.activations)]
        return "\n".join(lines)


def _row(leaf: LeafReport) -> tuple[str, ...]:
    sqnr = "-" if leaf.quantized else ""
    if leaf.sqnr_db is not None and not math.isnan(leaf.sqnr_db):
        sqnr = "exact" if leaf.sqnr_db == math.inf else f"{leaf.sqnr_db:.1f}"
    return (
        shown(leaf.path),
        f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]",
        leaf.action,
        _bytes(leaf.bytes_before),
        "(tied)" if leaf.shared else _bytes(leaf.bytes_after),
        f"{leaf.bits_per_weight:.2f}",
        sqnr,
    )


def _bytes(count: int) -> str:
    """A number of bytes in decimal units.

    >>> _bytes(512), _bytes(90_900_000)
    ('512 B', '90.9 MB')
    """
    value, unit = float(count), "B"
    for bigger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, bigger
    return f"{count} B" if unit == "B" else f"{value:.{1 if value < 99.95 else 0}f} {unit}"


def _attention(attention: Iterable[tuple[str, str | None]]) -> list[str]:
    """At most one line: for each format the number of contractions and the first keys.

    >>> _attention([("a", "int8"), ("a#1", "int8"), ("b", None)])
    ['attention: 2 contractions int8 (a, a#1); 1 left float (b)']
    """
    keys: dict[str | None, list[str]] = {}
    for key, name in attention:
        keys.setdefault(name, []).append(shown(key))
    parts: list[str] = []
    for name in sorted(keys, key=lambda name: name is None):  # float comes last
        sites = keys[name]
        more = ", ..." if len(sites) > _LISTED else ""
        words = "left float" if name is None else name
        if not parts:
            words = f"contraction{'s' if len(sites) > 1 else ''} {words}"
        parts.append(f"{len(sites)} {words} ({', '.join(sites[:_LISTED])}{more})")
    return ["attention: " + "; ".join(parts)] if parts else []


def _edges(edges: Iterable[Edge]) -> list[str]:
    """One line with the number of integer edges, then one for each float edge."""
    integers = [e for e in edges if e.integer]
    floats = [e for e in edges if not e.integer]
    if not integers and not floats:
        return []
    total = len(integers) + len(floats)
    return [f"edges: {len(integers)} of {total} int8" + (", the others:" if floats else "")] + [
        f"  {edge}" for edge in floats
    ]
