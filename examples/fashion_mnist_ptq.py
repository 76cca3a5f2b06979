"""A residual CNN trained on Fashion-MNIST, its BatchNorms folded, quantized and compared.

    pip install -e ".[examples]"
    apt-get install dataset-fashion-mnist        # Debian, Ubuntu; see below without root
    python examples/fashion_mnist_ptq.py         # trains for some minutes, the first time only
    python examples/fashion_mnist_ptq.py --quick # few steps on few images

Without root, `apt-get download dataset-fashion-mnist`, `dpkg -x` the file into a folder `fashion`,
and give `--data fashion/usr/share/datasets/fashion-mnist`. The model (`fashion_mnist_model.py`) is
plain Flax and is not edited. Where the images are not installed, the quick run takes scikit-learn's
handwritten digits instead and says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import _data
import fashion_mnist_model
import flax.linen as nn
import jax
import numpy as np
from fashion_mnist_data import Images, digits, fashion_mnist
from fashion_mnist_measure import BATCH, Row, Variant, as_dict, predictions, table
from fashion_mnist_model import ResNet, train
from flax.traverse_util import flatten_dict, unflatten_dict
from minilm_measure import progress, terminal, tree_bytes, versions
from rich.console import Console
from rich.progress import Progress

import jaxquant as jq
from jaxquant.demo import interleaved_medians

CALIBRATION = 512  # training images that activations' ranges are estimated from

OBSERVERS: dict[str, jq.observers.Observer] = {
    "absmax": jq.observers.absmax(),
    "minmax": jq.observers.minmax(),
    "moving average": jq.observers.moving_average(),
    "percentile 99.99": jq.observers.percentile(99.99),
    "mse": jq.observers.mse(),
    "entropy": jq.observers.entropy(),
}
QUICK_OBSERVERS = ("minmax", "mse")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the trained weights depend on."""

    widths: tuple[int, ...]
    steps: int
    batch: int
    rate: float
    images: int
    seed: int = 0


FULL = Settings(widths=(32, 64, 128), steps=700, batch=256, rate=4e-3, images=60000)
QUICK = Settings(widths=(8, 16), steps=60, batch=128, rate=1e-2, images=4096)
QUICK_TEST = 512


def trained(
    model: nn.Module, settings: Settings, images: Images, bars: Progress, cached: bool
) -> tuple[Any, float]:
    """The model's variables and the seconds that training took, 0 if they were in the cache."""
    path = _cache_path(settings, images)
    if cached and path.is_file():
        with np.load(path) as file:
            return unflatten_dict(dict(file), sep="/"), 0.0
    task = bars.add_task("training", total=settings.steps)
    start = time.perf_counter()
    variables = train(
        model,
        images.train_x,
        images.train_y,
        steps=settings.steps,
        batch=settings.batch,
        rate=settings.rate,
        seed=settings.seed,
        step_done=lambda loss: bars.update(
            task, advance=1, description=f"training: loss {loss:.3f}"
        ),
    )
    variables = jax.tree.map(np.asarray, variables)
    seconds = time.perf_counter() - start
    if cached:
        file = io.BytesIO()
        np.savez(file, **flatten_dict(variables, sep="/"))
        _data._write_atomically(path, file.getvalue())
    return variables, seconds


def _cache_path(settings: Settings, images: Images) -> pathlib.Path:
    """A file of its own for each of settings, images and text of the model's code."""
    code = pathlib.Path(fashion_mnist_model.__file__).read_text(encoding="utf-8")
    said = json.dumps([dataclasses.asdict(settings), images.name, code])
    key = hashlib.sha256(said.encode()).hexdigest()[:16]
    return _data.cache_dir() / "fashion-mnist" / f"resnet-{key}.npz"


def variants(
    model: nn.Module,
    variables: Any,
    folded: Any,
    calibration: np.ndarray,
    observers: list[str],
    reports: dict[str, jq.report.Report],
) -> Iterator[Variant]:
    """Each row of the table, float first, quantized when it is asked for.

    `calibration` are training images `[n, 28, 28, 1]`; reports of `ptq` go into `reports`.
    """
    float_fn, fn = jax.jit(model.apply), jax.jit(jq.quantized(model.apply))
    yield Variant("float32", "float / float", float_fn, variables, tree_bytes(variables))
    yield Variant("BatchNorm folded", "float / float", float_fn, folded, tree_bytes(folded))
    batches = [calibration[i : i + BATCH] for i in range(0, len(calibration), BATCH)]

    def row(name: str, how: str, recipe: jq.Recipe, calibrate: bool = True) -> Variant:
        given = {"batches": batches} if calibrate else {}
        qvariables, report = jq.ptq(model.apply, folded, recipe, batches[0], **given)
        reports[name] = report
        return Variant(name, how, fn, qvariables, report.bytes_after)

    yield row("dynamic", "int8 / int8", jq.w8a8(), calibrate=False)
    for name in observers:
        recipe = jq.w8a8_static(OBSERVERS[name])
        yield row(f"static, {name}", "int8 / int8", recipe)
    for requantize in ("float32", "fixed_point"):
        recipe = jq.w8a8_integer(OBSERVERS["mse"], requantize=requantize)
        yield row(f"integer-only, {requantize}", "int8 / int8", recipe)


def measure(found: Iterator[Variant], images: Images, bars: Progress, rounds: int) -> list[Row]:
    """A row for each variant, the first one float; with `rounds=0` nothing is timed."""
    rows: list[Row] = []
    models = {}
    said: np.ndarray | None = None
    for variant in found:
        task = bars.add_task(variant.name, total=-(-len(images.test_x) // BATCH))
        classes = predictions(variant, images.test_x, lambda task=task: bars.advance(task))
        said = classes if said is None else said
        right, same = (classes == images.test_y).mean(), (classes == said).mean()
        rows.append(Row(variant.name, variant.how, float(right), float(same), variant.bytes))
        models[variant.name] = (variant.fn, jax.device_put(variant.variables))
    if rounds:
        task = bars.add_task("timing", total=rounds)
        x = np.resize(images.test_x, (BATCH, *images.test_x.shape[1:]))
        seconds = interleaved_medians(
            models, jax.device_put(x), rounds, lambda done: bars.update(task, completed=done)
        )
        for row in rows:
            row.seconds = seconds[row.name]
    return rows


def load(folder: pathlib.Path | None, quick: bool, console: Console) -> Images:
    """Fashion-MNIST; in a quick run, a part of it, or digits where it is not installed.

    Raises:
      FileNotFoundError: the images are missing, and digits will not do.
      ValueError: the files do not hold what they should.
    """
    try:
        images = fashion_mnist(folder)
    except FileNotFoundError:
        if folder is not None or not quick:
            raise
        console.print(
            "[bold yellow]Fashion-MNIST is not installed: these figures are of scikit-learn's "
            "handwritten digits, not of Fashion-MNIST.[/bold yellow]"
        )
        images = digits()
    return images.first(QUICK.images, QUICK_TEST) if quick else images


def main(argv: list[str] | None = None) -> int:
    """Train or load, fold, quantize, measure; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, metavar="DIR", help="folder of the images")
    parser.add_argument("--quick", action="store_true", help="few steps, few images, no cache")
    parser.add_argument("--steps", type=int, help=f"training steps (default {FULL.steps})")
    parser.add_argument("--rounds", type=int, help="timings of each (default 15; 0: none)")
    parser.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write the figures here")
    options = parser.parse_args(argv)
    settings = QUICK if options.quick else FULL
    if options.steps is not None:
        settings = dataclasses.replace(settings, steps=options.steps)
    rounds = options.rounds if options.rounds is not None else 3 if options.quick else 15
    if settings.steps < 1 or rounds < 0:
        parser.error("expected at least one step and no negative number of rounds")

    console = terminal()
    try:
        images = load(options.data, options.quick, console)
    except (FileNotFoundError, ValueError) as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        return 1
    model = ResNet(settings.widths)
    with progress(console) as bars:
        variables, seconds = trained(model, settings, images, bars, cached=not options.quick)
        folded, info = jq.fold_batchnorm(model.apply, variables, images.test_x[:1])
        calibration = images.train_x[:CALIBRATION]
        observers = list(QUICK_OBSERVERS if options.quick else OBSERVERS)
        reports: dict[str, jq.report.Report] = {}
        found = variants(model, variables, folded, calibration, observers, reports)
        rows = measure(found, images, bars, rounds)

    count = sum(record.folded for record in info)
    took = f"trained for {settings.steps} steps in {seconds:.0f} s" if seconds else "from the cache"
    console.print(f"{took}; {count} of {len(info)} BatchNorms folded", highlight=False)
    title = f"A residual CNN on {len(images.test_x):,} test images of {images.name}"
    caption = f"Times: batches of {BATCH}, medians of {rounds} in turns." if rounds else ""
    console.print(table(rows, title, caption))
    report = reports["integer-only, float32"]
    console.print("edges of integer-only:", highlight=False)
    for edge in report.edges:
        console.print(f"  {edge}", highlight=False, soft_wrap=True)
    console.print(str(report.activations), highlight=False, soft_wrap=True)
    used = versions("jaxquant", "jax", "jaxlib", "flax")
    console.print(", ".join(f"{k} {v}" for k, v in used.items()), style="dim", highlight=False)
    if options.json:
        text = {
            "versions": used,
            "images": images.name,
            "settings": dataclasses.asdict(settings),
            "training_seconds": seconds,
            "folded": [dataclasses.asdict(record) for record in info],
            "rows": [as_dict(row, rows[0]) for row in rows],
        }
        options.json.write_text(json.dumps(text, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
