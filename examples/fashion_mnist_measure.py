"""How right, how small and how fast a classifier is: predictions, rows, and their table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from rich import box
from rich.table import Table

BATCH = 256  # images a batch, in accuracy as in time, so that each function compiles once


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to store and run the model.

    Attributes:
      name: of its row.
      how: formats of weights and activations.
      fn: jitted, called with `variables` and images.
      variables: float or quantized.
      bytes: of all variables as stored.
    """

    name: str
    how: str
    fn: Callable[..., jax.Array]
    variables: Any
    bytes: int


@dataclasses.dataclass
class Row:
    """What was measured of a variant; `seconds` are of one batch.

    Attributes:
      name: the variant's.
      how: the variant's.
      accuracy: share of the test images that are classified correctly.
      agreement: share that are classified as the float model does.
      bytes: of all variables as stored.
      seconds: median time of one batch, if timed.
    """

    name: str
    how: str
    accuracy: float
    agreement: float
    bytes: int
    seconds: float | None = None

    def points(self, of: Row) -> float:
        """Accuracy above (or below) another row's, in hundredths."""
        return 100 * (self.accuracy - of.accuracy)


def predictions(
    variant: Variant, images: np.ndarray, step: Callable[[], Any] = lambda: None
) -> np.ndarray:
    """The class with the largest logit for each image, `[n]`; `step` is called after each batch."""
    found = []
    for start in range(0, len(images), BATCH):
        x = images[start : start + BATCH]
        # the last batch is filled up, so that it has the shape that is compiled already
        full = np.concatenate([x, np.zeros((BATCH - len(x), *x.shape[1:]), x.dtype)])
        found.append(np.asarray(variant.fn(variant.variables, full)).argmax(-1)[: len(x)])
        step()
    return np.concatenate(found)


def table(rows: Sequence[Row], title: str, caption: str) -> Table:
    """The rows as a table of at most 100 columns; the first row is float."""
    first = rows[0]
    found = Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_style="bold",
        caption_style="dim",
        padding=(0, 1, 0, 0),
    )
    found.add_column("model", style="bold", no_wrap=True)
    found.add_column("weights /\nactivations", style="dim", no_wrap=True)
    figures = "test\naccuracy|points\nto float|same as\nfloat|stored\nkB|ms a\nbatch|time of\nfloat"
    for header in figures.split("|"):
        found.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        timed = row.seconds is not None and first.seconds is not None
        found.add_row(
            row.name,
            row.how,
            f"{100 * row.accuracy:.2f} %",
            "" if row is first else _coloured(row.points(first)),
            f"{100 * row.agreement:.2f} %",
            f"{row.bytes / 1e3:.0f}",
            f"{1e3 * row.seconds:.1f}" if timed else "",
            f"{row.seconds / first.seconds:.2f}" if timed else "",
        )
    return found


def _coloured(points: float) -> str:
    """A difference of accuracies, by whether it is within the 0.3 points one hopes for."""
    colour = "green" if points >= -0.3 else "yellow" if points >= -1 else "red"
    return f"[{colour}]{points:+.2f}[/{colour}]"


def as_dict(row: Row, of: Row) -> dict[str, Any]:
    """A row as plain JSON values, its differences and ratios against the float row."""
    return {
        **dataclasses.asdict(row),
        "points_to_float": row.points(of),
        "bytes_of_float": row.bytes / of.bytes,
        "time_of_float": row.seconds / of.seconds if row.seconds and of.seconds else None,
    }
