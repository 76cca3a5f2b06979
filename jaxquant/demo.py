"""The demo: trains a small CNN on handwritten digits and runs it under every preset.

Needs the `demo` extra. `run` measures and returns plain data; `main` shows it in a terminal.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

# Flax depends on rich, so of the demo's extra packages only scikit-learn can be missing here.
from rich import box, progress
from rich.console import Console
from rich.table import Table

import jaxquant
from jaxquant.interpret import quantized
from jaxquant.ptq import ptq
from jaxquant.qtensor import QSpec
from jaxquant.recipe import Recipe, mxfp4, nf4, w4a8, w4a16, w8a8, w8a8_fp8, w8a16

# Name: what it stores and computes with, and the recipe.
PRESETS: Mapping[str, tuple[str, Callable[[], Recipe | QSpec]]] = {
    "w8a8": ("int8 / int8", w8a8),
    "w8a16": ("int8 / float", w8a16),
    "w4a16": ("int4 g128 / float", w4a16),
    "w4a8": ("int4 g128 / int8", w4a8),
    "nf4": ("nf4 g64 / float", nf4),
    "w8a8_fp8": ("float8 / float8", w8a8_fp8),
    "mxfp4": ("mxfp4 / float", mxfp4),
}

Watch = Callable[[str, int, int], Any]  # told of work done: stage, steps done, steps in all
Model = tuple[Callable[..., jax.Array], Any]  # a jitted function and its variables

_TRAIN, _TEST = 1200, 597  # of 1797 digits
_BATCH = 100


class MissingExtra(ImportError):
    """A package of the demo extra is missing; the message says how to install it."""


class CNN(nn.Module):
    """Two convolutions and two dense layers, an ordinary Flax model."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Images [batch, 8, 8, 1] to logits [batch, 10]."""
        x = nn.relu(nn.Conv(32, (3, 3))(images))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(64, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


class Digits(NamedTuple):
    """Images [n, 8, 8, 1] with values from 0 to 1, their labels [n], and the split."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of the model under one preset, or in float.

    Attributes:
      name: the preset.
      how: formats of weights and activations.
      accuracy: fraction of the test set that is classified correctly.
      agreement: fraction of the test set that is classified as the float model does.
      bytes: size of all parameters as stored, scales included.
      weights: how many numbers the float model holds.
      seconds: median time of one pass over the test set in one batch.
    """

    name: str
    how: str
    accuracy: float
    agreement: float
    bytes: int
    weights: int
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales included, for each number in the float model."""
        return 8 * self.bytes / self.weights


def run(
    presets: Iterable[str] = tuple(PRESETS),
    *,
    epochs: int = 20,
    rounds: int = 31,
    watch: Watch = lambda stage, done, total: None,
) -> list[Row]:
    """Trains the CNN, quantizes it by each preset, and measures; the first row is float.

    Args:
      presets: names among `PRESETS`.
      epochs: passes over the training set.
      rounds: how often each model is timed.
      watch: called as `watch(stage, done, total)` as work proceeds.

    Raises:
      ValueError: a preset is unknown.
      MissingExtra: scikit-learn is not installed.
    """
    names = check_presets(presets)
    digits = load_digits()
    model = CNN()
    variables = train(model, digits, epochs, lambda done: watch("training", done, epochs))
    x = jnp.asarray(digits.test_x)

    count = sum(leaf.size for leaf in jax.tree.leaves(variables))
    stored = {"float32": sum(leaf.nbytes for leaf in jax.tree.leaves(variables))}
    models: dict[str, Model] = {"float32": (jax.jit(model.apply), variables)}
    classes = {"float32": np.asarray(models["float32"][0](variables, x).argmax(-1))}
    for done, name in enumerate(names):
        watch(f"quantizing: {name}", done, len(names))
        qvariables, report = ptq(model.apply, variables, PRESETS[name][1](), x)
        models[name] = (jax.jit(quantized(model.apply)), qvariables)
        stored[name] = report.bytes_after
        classes[name] = np.asarray(models[name][0](qvariables, x).argmax(-1))
    watch("quantizing", len(names), len(names))
    seconds = interleaved_medians(models, x, rounds, lambda done: watch("timing", done, rounds))
    return [
        Row(
            name=name,
            how=PRESETS[name][0] if name in PRESETS else "float / float",
            accuracy=float(np.mean(found == digits.test_y)),
            agreement=float(np.mean(found == classes["float32"])),
            bytes=stored[name],
            weights=count,
            seconds=seconds[name],
        )
        for name, found in classes.items()
    ]


def check_presets(names: Iterable[str]) -> list[str]:
    """The names, each once; `ValueError` with the known ones where one is not a preset."""
    found = list(dict.fromkeys(names))
    unknown = [name for name in found if name not in PRESETS]
    if unknown or not found:
        got = ", ".join(map(repr, unknown)) or "none"
        raise ValueError(f"expected presets among {', '.join(PRESETS)}; got {got}")
    return found


def load_digits() -> Digits:
    """Scikit-learn's 1797 handwritten digits of 8 x 8 pixels, always split in the same way."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingExtra('scikit-learn is missing: pip install "jaxquant[demo]"') from error
    x, y = datasets.load_digits(return_X_y=True)
    # The file is ordered by writer: without shuffling, the test set would hold new hands only.
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order].reshape(-1, 8, 8, 1) / 16).astype(np.float32), y[order]
    return Digits(x[:_TRAIN], y[:_TRAIN], x[_TRAIN:], y[_TRAIN:])


def train(model: nn.Module, digits: Digits, epochs: int, step_done: Callable[[int], Any]) -> Any:
    """The model's variables after training with Adam; `step_done` is told of each epoch."""
    steps = len(digits.train_x) // _BATCH
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, max(1, epochs * steps)))
    variables = model.init(jax.random.key(0), digits.train_x[:1])
    state = optimizer.init(variables)

    @jax.jit
    def step(variables: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        def loss(variables: Any) -> jax.Array:
            logits = model.apply(variables, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = optimizer.update(jax.grad(loss)(variables), state)
        return optax.apply_updates(variables, updates), state

    rng = np.random.default_rng(1)
    for epoch in range(epochs):
        for batch in np.split(rng.permutation(len(digits.train_x))[: steps * _BATCH], steps):
            variables, state = step(variables, state, digits.train_x[batch], digits.train_y[batch])
        step_done(epoch + 1)
    return variables


def interleaved_medians(
    models: Mapping[str, Model], x: jax.Array, rounds: int, round_done: Callable[[int], Any]
) -> dict[str, float]:
    """Median seconds of each model on `x`.

    Every round times each model once, so that a machine that slows down for a while slows all of
    them: only then do the ratios mean something.
    """
    taken: dict[str, list[float]] = {name: [] for name in models}
    for done in range(rounds):
        for name, (fn, variables) in models.items():
            start = time.perf_counter()
            jax.block_until_ready(fn(variables, x))
            taken[name].append(time.perf_counter() - start)
        round_done(done + 1)
    return {name: statistics.median(times) for name, times in taken.items()}


def main(presets: Iterable[str] = tuple(PRESETS), *, quick: bool = False) -> list[Row]:
    """Runs the demo with progress bars and prints its table; returns the rows."""
    names = check_presets(presets)
    console = Console()
    if not console.is_terminal:
        console = Console(width=80)  # a pipe has no width of its own
    columns = (
        progress.BarColumn(None),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
    )
    bars = progress.Progress("{task.description:<20}", *columns, console=console, transient=True)
    tasks: dict[str, Any] = {}

    def watch(stage: str, done: int, total: int) -> None:
        name = stage.split(":")[0]
        if name not in tasks:
            tasks[name] = bars.add_task(stage, total=total)
        bars.update(tasks[name], description=stage, completed=done)

    start = time.perf_counter()
    with bars:
        rows = run(names, epochs=6 if quick else 20, rounds=3 if quick else 31, watch=watch)
    taken = time.perf_counter() - start
    console.print(table(rows))
    console.print(f"{versions()}, {taken:.0f} s in all", style="dim", highlight=False)
    console.print(HINT, highlight=False)
    return rows


HINT = """
The same for a function of your own, whatever it is written with:
  [bold]qparams, report = jaxquant.ptq(fn, params, jaxquant.w8a8(), *args)[/bold]
  [bold]y = jax.jit(jaxquant.quantized(fn))(qparams, *args)[/bold]
Read next: README.md, then examples/minilm.py for a pretrained sentence encoder."""


def table(rows: Sequence[Row]) -> Table:
    """The rows as a rich table for 80 columns; the first row is float."""
    first = rows[0]
    found = Table(
        title=f"A CNN of {first.weights:,} weights, tested on {_TEST} handwritten digits",
        caption="time: of the test set as one batch, jitted, medians of interleaved runs",
        box=box.SIMPLE_HEAD,
        title_style="bold",
        caption_style="dim",
        padding=(0, 1, 0, 0),
    )
    found.add_column("preset", style="bold", no_wrap=True)
    found.add_column("weights /\nactivations", style="dim", no_wrap=True)
    figures = "test\naccuracy|same as\nfloat|stored\nkB|of\nfloat|bits a\nweight|time /\nfloat"
    for header in figures.split("|"):
        found.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        lost, ratio = 100 * (first.accuracy - row.accuracy), row.seconds / first.seconds
        colour = "green" if lost <= 0.5 else "yellow" if lost <= 2 else "red"
        found.add_row(
            row.name,
            row.how,
            f"[{colour}]{100 * row.accuracy:.1f} %",
            f"{100 * row.agreement:.1f} %",
            f"{row.bytes / 1e3:.1f}",
            f"{row.bytes / first.bytes:.3f}",
            f"{row.bits_per_weight:.2f}",
            f"[green]{ratio:.2f}" if ratio < 0.95 else f"{ratio:.2f}",
            end_section=row is first,
        )
    return found


def versions() -> str:
    """Versions and the device, for the lines under the table."""
    names = ("jax", "flax", "scikit-learn")
    found = [f"jaxquant {jaxquant.__version__}", *(f"{n} {metadata.version(n)}" for n in names)]
    device = jax.devices()[0]
    cores = f" with {os.cpu_count()} cores" if device.platform == "cpu" else ""
    machine = f"{platform.system()} {platform.machine()}, {device.device_kind}{cores}"
    return f"{', '.join(found)}, Python {platform.python_version()}\non {machine}"
