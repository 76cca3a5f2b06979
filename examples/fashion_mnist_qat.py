"""A CNN trained on Fashion-MNIST with quantization, beside quantizing it after training.

    pip install -e ".[examples]"
    apt-get install dataset-fashion-mnist        # Debian, Ubuntu; see below without root
    python examples/fashion_mnist_qat.py         # some minutes, training from scratch included
    python examples/fashion_mnist_qat.py --quick # few steps on few images

Without root, `apt-get download dataset-fashion-mnist`, `dpkg -x` the file into a folder `fashion`,
and give `--data fashion/usr/share/datasets/fashion-mnist`. The model (`fashion_mnist_cnn.py`) is
plain Flax and is not edited. Each quantized row is measured as it is served: with codes of so many
bits, contractions on integers. Where the images are not installed, the quick run takes
scikit-learn's handwritten digits instead and says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from fashion_mnist_cnn import CNN
from fashion_mnist_data import Images
from fashion_mnist_measure import BATCH, Variant, predictions
from fashion_mnist_ptq import load
from fashion_mnist_qat_measure import Row, draw, expectations, table
from fashion_mnist_training import Settings, fit
from minilm_measure import progress, terminal, tree_bytes, versions
from qat_training import NonFiniteLoss, save_state
from rich.console import Console
from rich.progress import Progress

import jaxquant as jq

FULL = Settings(steps=2400, rate=5e-3, tuning_steps=500, tuning_rate=1.5e-3)
QUICK = Settings(steps=60, rate=1e-2, tuning_steps=8, tuning_rate=2e-3)
WIDTHS, QUICK_WIDTHS = (32, 64, 64, 128), (8, 8, 8, 16)
BITS, QUICK_BITS = (8, 4, 3, 2), (2,)
CODEBOOKS, QUICK_CODEBOOKS = (4, 2), (2,)
CALIBRATION = 512  # training images that ranges of activations start from
ENDS = ("conv0/kernel", "head/kernel")  # first and last layer


def recipe_of(method: str, bits: int) -> jq.Recipe:
    """Weights per channel and activations per tensor in so many bits, the ends in 8.

    Activations are never negative here, pixels and results of ReLU, so their codes are unsigned.

    Args:
      method: `"PTQ"`: ranges of activations by least squared error; `"STE"`: followed by a moving
        average; `"LSQ"`: steps of weights and activations are learned.
      bits: of inner layers' weights and activations.
    """
    how: dict[str, Any] = {
        "PTQ": {"observer": jq.observers.mse()},
        "STE": {"observer": jq.observers.moving_average()},
        "LSQ": {"weight_estimator": jq.ste.lsq(), "activation_estimator": jq.ste.lsq()},
    }[method]

    def rule(pattern: str, bits: int) -> jq.Rule:
        activations = jq.QSpec(f"uint{bits}", jq.PerTensor())
        return jq.Rule(pattern, weights=jq.QSpec(f"int{bits}"), activations=activations, **how)

    return jq.Recipe([*(rule(end, 8) for end in ENDS), rule("**", bits)], f"{method} {bits}")


def codebook_recipe(bits: int) -> jq.Recipe:
    """Weights from a codebook of `2^bits` float values for each layer, trained as k-means finds it.

    Han et al., "Deep Compression" (2016), section 3.
    """
    values = np.linspace(-1, 1, 2**bits)
    spec = jq.QSpec(jq.numerics.codebook_format(values, name=f"kmeans{bits}"), jq.PerTensor())
    rule = jq.Rule("**", weights=spec, weight_estimator=jq.ste.kmeans())
    return jq.Recipe([rule], f"k-means {bits}")


class Comparison:
    """Rows and curves, as variant after variant is made.

    Attributes:
      rows: by name and formats, float first.
      curves: losses in training, likewise.
    """

    def __init__(
        self, model: nn.Module, images: Images, settings: Settings, bars: Progress
    ) -> None:
        self.model, self.images, self.settings, self.bars = model, images, settings, bars
        self.rows: dict[tuple[str, str], Row] = {}
        self.curves: dict[tuple[str, str], list[float]] = {}
        self.calibration = images.train_x[:CALIBRATION]
        self.float_fn = jax.jit(model.apply)
        self.fn = jax.jit(jq.quantized(model.apply))

    def fit_float(self, name: str, start: Any = None) -> Any:
        """Trains and measures the float model; from `start`, for as long as others are tuned."""
        steps, schedule = self.settings.tuning_steps, self.settings.tuning()
        if start is None:
            steps, schedule = self.settings.steps, self.settings.from_scratch()
            x = self.images.train_x[:1]
            start = self.model.init(jax.random.key(self.settings.seed), x)
        began = time.perf_counter()
        variables, losses = self._fit(name, self.model, start, steps, schedule)
        seconds = time.perf_counter() - began
        self._add(name, "float / float", self.float_fn, variables, seconds, losses)
        return variables

    def ptq(self, how: str, recipe: jq.Recipe, variables: Any) -> None:
        """Quantizes after training, and measures."""
        x = self.calibration
        batches = [x[i : i + BATCH] for i in range(0, len(x), BATCH)]
        qvariables, _ = jq.ptq(self.model.apply, variables, recipe, batches[0], batches=batches)
        self._add("PTQ", how, self.fn, qvariables)

    def qat(self, name: str, how: str, recipe: jq.Recipe, variables: Any) -> None:
        """Trains with quantization, converts to what is served, and measures that."""
        began = time.perf_counter()
        fmodel = jq.linen.fake_quantized(self.model, recipe)
        start = fmodel.with_state(variables, self.calibration)
        steps, schedule = self.settings.tuning_steps, self.settings.tuning()
        trained, losses = self._fit(f"{name}, {how}", fmodel, start, steps, schedule)
        seconds = time.perf_counter() - began
        qvariables = jq.linen.convert(fmodel, trained, self.calibration)
        self._add(name, how, self.fn, qvariables, seconds, losses)

    def codebook(self, how: str, recipe: jq.Recipe, variables: Any) -> None:
        """Clusters weights and serves them so, then trains the centroids."""
        fmodel = jq.linen.fake_quantized(self.model, recipe)
        start = fmodel.with_state(variables, self.calibration)
        self._add("k-means", how, self.fn, jq.linen.convert(fmodel, start, self.calibration))
        self.qat("k-means, trained", how, recipe, variables)

    def _fit(
        self, name: str, model: Any, variables: Any, steps: int, schedule: optax.Schedule
    ) -> tuple[Any, list[float]]:
        task = self.bars.add_task(name, total=steps)

        def done(loss: float) -> None:
            self.bars.update(task, advance=1, description=f"{name}: {loss:.3f}")

        return fit(name, model, variables, self.images, self.settings, steps, schedule, done)

    def _add(
        self,
        name: str,
        how: str,
        fn: Callable[..., jax.Array],
        variables: Any,
        seconds: float = 0.0,
        losses: list[float] | None = None,
    ) -> None:
        stored = tree_bytes(variables)
        found = predictions(Variant(name, how, fn, variables, stored), self.images.test_x)
        accuracy = float((found == self.images.test_y).mean())
        self.rows[name, how] = Row(name, how, accuracy, stored, seconds)
        if losses is not None:
            self.curves[name, how] = losses


def compare(comparison: Comparison, bits: tuple[int, ...], codebooks: tuple[int, ...]) -> None:
    """Every row: float, each number of bits by each method, and codebooks."""
    variables = comparison.fit_float("float32")
    comparison.fit_float("float32, trained on", variables)
    for b in bits:
        how = f"int{b} / uint{b}"
        comparison.ptq(how, recipe_of("PTQ", b), variables)
        for method in ("STE", "LSQ"):
            comparison.qat(f"QAT, {method}", how, recipe_of(method, b), variables)
    for b in codebooks:
        comparison.codebook(f"{2**b} values / float", codebook_recipe(b), variables)


def run(
    options: argparse.Namespace, settings: Settings, images: Images, console: Console
) -> Comparison:
    """Everything that is trained, with progress bars; a picture of the losses in the end."""
    model = CNN(QUICK_WIDTHS if options.quick else WIDTHS)
    with progress(console) as bars:
        comparison = Comparison(model, images, settings, bars)
        compare(
            comparison,
            QUICK_BITS if options.quick else BITS,
            QUICK_CODEBOOKS if options.quick else CODEBOOKS,
        )
    width = max(1, settings.tuning_steps // 12)
    title = f"A small CNN on {images.name}: losses in training, means over {width} steps"
    draw(options.png, comparison.curves, title, width)
    return comparison


def main(argv: list[str] | None = None) -> int:
    """Train in float, then with quantization; print the table, draw the losses."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, metavar="DIR", help="folder of the images")
    parser.add_argument("--quick", action="store_true", help="few steps, few images")
    parser.add_argument("--steps", type=int, help=f"in float (default {FULL.steps})")
    parser.add_argument(
        "--tuning-steps", type=int, help=f"of each variant (default {FULL.tuning_steps})"
    )
    parser.add_argument(
        "--png",
        type=pathlib.Path,
        metavar="PATH",
        default=pathlib.Path("fashion_mnist_qat.png"),
        help="where the losses are drawn (default %(default)s)",
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write the figures here")
    options = parser.parse_args(argv)
    settings = QUICK if options.quick else FULL
    given = {"steps": options.steps, "tuning_steps": options.tuning_steps}
    settings = dataclasses.replace(settings, **{k: v for k, v in given.items() if v is not None})
    if settings.steps < 4 or settings.tuning_steps < 4:
        parser.error("expected at least four steps")  # of which one warms up

    console = terminal()
    try:
        images = load(options.data, options.quick, console)
    except (FileNotFoundError, ValueError) as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        return 1
    began = time.perf_counter()
    try:
        comparison = run(options, settings, images, console)
    except NonFiniteLoss as error:
        path = options.png.with_suffix(".last-good.npz")
        save_state(path, error.state)
        console.print(f"[red]{error}; the last good state is in {path}[/red]", highlight=False)
        return 1
    seconds = time.perf_counter() - began

    rows = comparison.rows
    console.print(table(rows, f"A CNN on {len(images.test_x):,} test images of {images.name}"))
    said = expectations(rows)
    if not options.quick:
        for line, met in said.items():
            mark = "[green]yes[/green]" if met else "[red]no[/red]"
            console.print(f"{mark}  {line}", highlight=False)
    console.print(f"losses are drawn in {options.png}; {seconds:.0f} s in all", highlight=False)
    used = versions("jaxquant", "jax", "jaxlib", "flax", "optax")
    console.print(", ".join(f"{k} {v}" for k, v in used.items()), style="dim", highlight=False)
    if options.json:
        first = next(iter(rows.values()))
        text = {
            "versions": used,
            "images": images.name,
            "settings": dataclasses.asdict(settings),
            "seconds": seconds,
            "expected": None if options.quick else said,
            "rows": [
                {**dataclasses.asdict(row), "points_to_float": row.points(first)}
                for row in rows.values()
            ],
        }
        options.json.write_text(json.dumps(text, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
