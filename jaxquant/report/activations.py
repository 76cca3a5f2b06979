"""Report on calibrated ranges: one row for each activation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from jaxquant.report.text import shown, table


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """How one activation of one site is quantized.

    Attributes:
      site: key of the site, with the layer in brackets for a site in a `scan` over layers.
      operand: `"lhs"` or `"rhs"`.
      how: format, observer.
      low: lower end of the calibrated range.
      high: upper end.
      clipped: fraction of sample values outside the range; `None` if unknown.
      sqnr_db: signal to quantization noise ratio on the samples; `inf` where exact, `None` if
        unknown.
      suggestion: a better choice: `"asymmetric"`, `"per channel"`, an observer; or empty.
      gain_db: its gain in SQNR, in dB.
    """

    site: str
    operand: str
    how: str
    low: float
    high: float
    clipped: float | None = None
    sqnr_db: float | None = None
    suggestion: str = ""
    gain_db: float = 0.0


@dataclasses.dataclass(frozen=True)
class ActivationReport:
    """How calibrated activations are quantized; `print` shows it as a table.

    It iterates over its entries, and `report["w"]` is the first entry of a site.

    Attributes:
      sites: one entry for each activation.
      notes: remarks on the report as a whole.

    >>> row = SiteReport("w", "lhs", "int8 absmax", -1.0, 2.0, 0.0, 40.0, "asymmetric", 3.2)
    >>> print(ActivationReport((row,)))
    site  operand  how          suggestion             range  clipped %  SQNR dB
    ----------------------------------------------------------------------------
    w     lhs      int8 absmax  asymmetric: +3.2 dB  -1 .. 2      0.000     40.0
    """

    sites: tuple[SiteReport, ...]
    notes: tuple[str, ...] = ()

    def __getitem__(self, site: str) -> SiteReport:
        """The first entry of one site; `KeyError` if there is none."""
        for row in self.sites:
            if row.site == site:
                return row
        raise KeyError(site)

    def __contains__(self, site: object) -> bool:
        """Whether there is an entry for a site key, or this entry itself."""
        return any(row.site == site or row == site for row in self.sites)

    def __iter__(self) -> Iterator[SiteReport]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-serialisable values; a non-finite `sqnr_db` becomes `None`."""
        rows = [dataclasses.asdict(row) for row in self.sites]
        for row in rows:
            if row["sqnr_db"] is not None and not math.isfinite(row["sqnr_db"]):
                row["sqnr_db"] = None
        return {"sites": rows, "notes": list(self.notes)}

    def __str__(self) -> str:
        head = ("site", "operand", "how", "suggestion", "range", "clipped %", "SQNR dB")
        return "\n".join([*table(head, [_row(r) for r in self.sites], 4), *self.notes])


def _row(row: SiteReport) -> tuple[str, ...]:
    better = f"{row.suggestion}: +{row.gain_db:.1f} dB" if row.suggestion else ""
    clipped = "-" if row.clipped is None else f"{100 * row.clipped:.3f}"
    sqnr = "-"
    if row.sqnr_db is not None and not math.isnan(row.sqnr_db):
        sqnr = "exact" if row.sqnr_db == math.inf else f"{row.sqnr_db:.1f}"
    span = f"{row.low:.4g} .. {row.high:.4g}"
    return (shown(row.site), row.operand, row.how, better, span, clipped, sqnr)
