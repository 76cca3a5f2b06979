"""Rows, table and picture of the QAT example: how right each classifier is, and how it learned."""

from __future__ import annotations

import dataclasses
import pathlib

from qat_training import draw_losses, panels
from rich import box
from rich.table import Table

NOTE = (
    "First and last layer have 8 bits in all rows but float32 and k-means, as in the LSQ paper; "
    "BatchNorm stays float. Ranges of activations: PTQ, of least squared error; STE, a moving "
    "average of the extremes; LSQ, learned."
)


@dataclasses.dataclass
class Row:
    """What was measured of a variant.

    Attributes:
      name: how it was made.
      how: formats of weights and activations.
      accuracy: share of the test images that are classified correctly, as served.
      bytes: of all variables as stored.
      seconds: that training took, compilation included; 0 without.
    """

    name: str
    how: str
    accuracy: float
    bytes: int
    seconds: float = 0.0

    def points(self, of: Row) -> float:
        """Accuracy above (or below) another row's, in hundredths."""
        return 100 * (self.accuracy - of.accuracy)


def expectations(rows: dict[tuple[str, str], Row]) -> dict[str, bool]:
    """What is expected of the full run, and whether it came out so."""
    first = next(iter(rows.values()))
    said = {}
    if ("QAT, LSQ", "int4 / uint4") in rows:
        best = max(rows[f"QAT, {m}", "int4 / uint4"].points(first) for m in ("STE", "LSQ"))
        said[f"QAT W4A4 within 0.3 points of float: {best:+.2f}"] = best >= -0.3
    if ("QAT, LSQ", "int2 / uint2") in rows:
        lsq, ptq = (rows[name, "int2 / uint2"] for name in ("QAT, LSQ", "PTQ"))
        points, above = lsq.points(first), lsq.points(ptq)
        said[f"LSQ W2A2 within 1.5 points of float: {points:+.2f}"] = points >= -1.5
        said[f"LSQ W2A2 above PTQ W2A2 by 5 points: {above:+.2f}"] = above >= 5
    return said


def table(rows: dict[tuple[str, str], Row], title: str) -> Table:
    """The rows as a table of at most 100 columns; the first one is float."""
    first = next(iter(rows.values()))
    found = Table(
        title=title,
        caption=NOTE,
        box=box.SIMPLE_HEAD,
        title_style="bold",
        caption_style="dim",
        padding=(0, 1, 0, 0),
    )
    found.add_column("model", style="bold", no_wrap=True)
    found.add_column("weights /\nactivations", style="dim", no_wrap=True)
    for header in ("test\naccuracy", "points\nto float", "stored\nkB", "of\nfloat", "training\ns"):
        found.add_column(header, justify="right", no_wrap=True)
    for row in rows.values():
        points = row.points(first)
        colour = "green" if points >= -0.3 else "yellow" if points >= -1.5 else "red"
        found.add_row(
            row.name,
            row.how,
            f"{100 * row.accuracy:.2f} %",
            "" if row is first else f"[{colour}]{points:+.2f}[/{colour}]",
            f"{row.bytes / 1e3:.1f}",
            f"{row.bytes / first.bytes:.2f}",
            f"{row.seconds:.0f}" if row.seconds else "",
            end_section=row.how.startswith("float") and row is not first,
        )
    return found


def draw(
    path: pathlib.Path, curves: dict[tuple[str, str], list[float]], title: str, width: int
) -> None:
    """The losses in training as a picture, a panel for each number of bits."""
    groups: dict[str, dict[str, list[float]]] = {}
    for (name, how), losses in curves.items():
        if name == "float32":
            groups["float32, from scratch"] = {name: losses}
        elif how.startswith("int"):
            tuned = {"float32, trained on": curves["float32, trained on", "float / float"]}
            groups.setdefault(f"weights / activations: {how}", tuned)[name] = losses
        elif name.startswith("k-means"):
            tuned = {"float32, trained on": curves["float32, trained on", "float / float"]}
            groups.setdefault("k-means, float activations", tuned)[how] = losses
    figure, axes = panels(len(groups), 3, title)
    for panel, (name, group) in zip(axes, groups.items(), strict=True):
        draw_losses(panel, group, name, width, "training loss (cross entropy)")
    figure.savefig(path)
