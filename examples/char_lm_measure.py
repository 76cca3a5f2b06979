"""Rows, table and picture of the character model: how well each way of training ends."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
from qat_training import draw_losses, panels, smoothed
from rich import box
from rich.table import Table


@dataclasses.dataclass
class Row:
    """What was measured of one way to train.

    Attributes:
      name: of the variant.
      how: weights and activations in the forward pass, gradients' contractions, optimizer's state.
      loss: mean cross entropy of the validation text.
      seconds: that training took, compilation included.
      optimizer_bytes: of the optimizer's state.
    """

    name: str
    how: str
    loss: float
    seconds: float
    optimizer_bytes: int

    def above(self, of: Row) -> float:
        """How much greater the loss is than another row's, in hundredths of that."""
        return 100 * (self.loss / of.loss - 1)


@dataclasses.dataclass
class Served:
    """The W4A8 model after conversion.

    Attributes:
      trained_loss: validation loss as in training, weights float and rounded on the way.
      served_loss: the same of the converted model.
      bytes: of its weights as stored.
      float_bytes: of the float model's.
      text: what it writes.
    """

    trained_loss: float
    served_loss: float
    bytes: int
    float_bytes: int
    text: str


def expectations(rows: list[Row], served: Served) -> dict[str, bool]:
    """What is expected of the full run, and whether it came out so."""
    first, *others = rows
    said = {
        f"{row.name}: loss within 1 % of float: {row.above(first):+.2f} %": row.above(first) <= 1
        for row in others
        if row.name != "W4A8 QAT"
    }
    a, b = served.served_loss, served.trained_loss
    # equal where XLA adds the groups of 32 in one order; it may choose another in another program
    told = "equal" if a == b else f"{abs(a / b - 1):.0e} apart"
    line = f"W4A8 converted has the loss it was trained to: {a:.6f} and {b:.6f}, {told}"
    said[line] = abs(a - b) <= 1e-5 * b
    return said


def table(rows: list[Row], title: str, caption: str) -> Table:
    """The rows as a table of at most 100 columns; the first one is float."""
    found = Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_style="bold",
        caption_style="dim",
        padding=(0, 1, 0, 0),
    )
    found.add_column("training", style="bold", no_wrap=True)
    found.add_column("forward / backward /\noptimizer's state", style="dim", no_wrap=True)
    headers = "validation\nloss|to\nfloat|bits per\ncharacter|optimizer\nkB|training\ns"
    for header in headers.split("|"):
        found.add_column(header, justify="right", no_wrap=True)
    first = rows[0]
    for row in rows:
        above = row.above(first)
        colour = "green" if above <= 1 else "yellow" if above <= 5 else "red"
        found.add_row(
            row.name,
            row.how,
            f"{row.loss:.4f}",
            "" if row is first else f"[{colour}]{above:+.2f} %[/{colour}]",
            f"{row.loss / np.log(2):.3f}",
            f"{row.optimizer_bytes / 1e3:.0f}",
            f"{row.seconds:.0f}",
        )
    return found


def draw(path: pathlib.Path, curves: dict[str, list[float]], title: str, width: int) -> None:
    """The losses in training as a picture, and how far each is from float's at the same step."""
    figure, (left, right) = panels(2, 2, title)
    draw_losses(left, curves, "loss", width, "training loss (nats per character)")
    reference = np.asarray(curves["float32"])
    for i, (name, losses) in enumerate(curves.items()):
        steps, mean = smoothed(losses, width)
        ratio = 100 * (mean / smoothed(list(reference), width)[1] - 1)
        right.plot(steps, ratio, label=name, linewidth=1.6, color=f"C{i}")
    right.set(title="loss against float's", xlabel="step", ylabel="above float32 (%)")
    right.grid(alpha=0.3)
    figure.savefig(path)
