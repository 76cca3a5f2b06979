"""How close and how fast an encoder is: embeddings, cosines, interleaved times, and the table."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
from minilm_text import Batch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

# A jitted function and the variables it is called with.
Encoder = tuple[Callable[..., jax.Array], Any]


@dataclasses.dataclass
class Row:
    """What was measured of one way to store and run the model."""

    name: str
    how: str
    bytes: int
    weights: int
    cosines: np.ndarray | None = None
    seconds: float | None = None
    quantizing: float | None = None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales included, for each number in the float model."""
        return 8 * self.bytes / self.weights


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays in a pytree, a 4-bit one's elements counted as half a byte each."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.size * jax.dtypes.itemsize_bits(leaf.dtype) // 8 for leaf in leaves)


def tree_size(tree: Any) -> int:
    """How many numbers a pytree of arrays holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def embed(
    encoder: Encoder, batches: Sequence[Batch], step: Callable[[], Any] = lambda: None
) -> np.ndarray:
    """Embeddings [sentences, width], in the sentences' own order; `step` is called per batch."""
    fn, variables = encoder
    count = sum(len(batch.indices) for batch in batches)
    found: np.ndarray | None = None
    for batch in batches:
        y = np.asarray(fn(variables, batch.ids, batch.mask), np.float64)
        found = np.empty((count, y.shape[-1])) if found is None else found
        found[batch.indices] = y[: len(batch.indices)]
        step()
    assert found is not None, "no batches"
    return found


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of the angle between the rows of `a` and the same rows of `b`, both [n, width]."""
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def interleaved_medians(
    encoders: Mapping[str, Encoder],
    batch: Batch,
    rounds: int,
    step: Callable[[], Any] = lambda: None,
) -> dict[str, float]:
    """Median seconds of each encoder on one batch.

    Every round times each encoder once, so that a machine that slows down for a while slows all
    of them: only then do the ratios mean something.
    """
    taken: dict[str, list[float]] = {name: [] for name in encoders}
    for fn, variables in encoders.values():
        jax.block_until_ready(fn(variables, batch.ids, batch.mask))
    for _ in range(rounds):
        for name, (fn, variables) in encoders.items():
            start = time.perf_counter()
            jax.block_until_ready(fn(variables, batch.ids, batch.mask))
            taken[name].append(time.perf_counter() - start)
            step()
    return {name: statistics.median(times) for name, times in taken.items()}


def progress(console: Console) -> Progress:
    """A progress bar for each stage, gone once the work is done."""
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def terminal() -> Console:
    """The terminal; a pipe or a log, which has no width, gets the 100 columns the table needs."""
    console = Console()
    return console if console.is_terminal else Console(width=100)


def timing_note(batch: Batch, rounds: int) -> str:
    """What the times in the table are times of."""
    if not rounds:
        return "Not timed, but for encoding, compilation included."
    size, length = batch.ids.shape
    return (
        f"Times: batches of {size} sentences of {length} tokens, medians of {rounds}; "
        "of encoding, with compilation."
    )


def table(rows: Sequence[Row], title: str, caption: str) -> Table:
    """The rows as a table of at most 100 columns; the first row is float."""
    found = Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_style="bold",
        caption_style="dim",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    found.add_column("preset", style="bold", no_wrap=True)
    found.add_column("weights /\nactivations", style="dim", no_wrap=True)
    for header in ("mean\ncosine", "worst\ncosine", "stored\nMB", "of\nfloat"):
        found.add_column(header, justify="right", no_wrap=True)
    for header in ("bits a\nweight", "s to\nencode", "ms a\nbatch", "time of\nfloat"):
        found.add_column(header, justify="right", no_wrap=True)
    first = rows[0]
    for row in rows:
        found.add_row(
            row.name,
            row.how,
            "" if row.cosines is None else f"{row.cosines.mean():.4f}",
            "" if row.cosines is None else f"{row.cosines.min():.4f}",
            f"{row.bytes / 1e6:.1f}",
            f"{row.bytes / first.bytes:.3f}",
            f"{row.bits_per_weight:.2f}",
            "" if row.quantizing is None else f"{row.quantizing:.0f}",
            "" if row.seconds is None else f"{1e3 * row.seconds:.0f}",
            _ratio(row.seconds, first.seconds),
        )
    return found


def _ratio(seconds: float | None, of: float | None) -> str:
    """The ratio of two times, green where it is a gain."""
    if seconds is None or of is None:
        return ""
    ratio = seconds / of
    return f"[green]{ratio:.2f}[/green]" if ratio < 0.95 else f"{ratio:.2f}"


def as_dict(row: Row, of: Row) -> dict[str, Any]:
    """A row as plain JSON values, its ratios against the float row."""
    return {
        "name": row.name,
        "how": row.how,
        "mean_cosine": None if row.cosines is None else float(row.cosines.mean()),
        "worst_cosine": None if row.cosines is None else float(row.cosines.min()),
        "bytes": row.bytes,
        "bytes_of_float": row.bytes / of.bytes,
        "bits_per_weight": row.bits_per_weight,
        "seconds_to_quantize": row.quantizing,
        "seconds_per_batch": row.seconds,
        "time_of_float": row.seconds / of.seconds if row.seconds and of.seconds else None,
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of the packages and of Python, and the name of what it runs on."""
    found = {name: metadata.version(name) for name in packages}
    found["Python"] = platform.python_version()
    device = jax.devices()[0]
    name = _processor() if device.platform == "cpu" else device.device_kind
    found["on"] = f"{name} ({device.platform}, {os.cpu_count()} cores)"
    return found


def _processor() -> str:
    """The processor's name as Linux tells it, else Python's guess."""
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or platform.machine()
