"""A small transformer on the text of plays: in float, for int4 weights, on int8, with adam8bit.

    pip install -e ".[examples]"
    python examples/char_lm_qat.py         # fetches the plays (5 MB) once, trains for some minutes
    python examples/char_lm_qat.py --quick # few steps of a small model

Four runs with the same weights to begin with, the same text in the same order and as many steps:

- float32, by `optax.adam`;
- W4A8 QAT: weights rounded to int4 and activations to int8 in training, then converted to what is
  served, real int4 codes, which compute the same;
- int8 training: float weights, but forward and both backward contractions of each layer on int8;
- adam8bit: float32 again, the moments of Adam kept in 8 bits.

The model (`char_lm_model.py`) is plain Flax NNX and is not edited. A quick run that cannot download
the plays takes three sonnets instead and says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
import optax
from char_lm_measure import Row, Served, draw, expectations, table
from char_lm_model import CharLM, Config
from char_lm_text import Text, few_lines, in_order, shakespeare
from char_lm_training import FakeQuantTensor, Settings, fit, sample, validate
from flax import nnx
from minilm_measure import progress, terminal, tree_bytes, versions
from qat_training import NonFiniteLoss, save_state
from rich.console import Console
from rich.progress import Progress

import jaxquant as jq
from jaxquant.optim import adam8bit

FULL = Settings(steps=1000, rate=4e-3, rows=16, length=64)
QUICK = Settings(steps=20, rate=4e-3, rows=4, length=32)
QUICK_SIZES = {"width": 32, "heads": 2, "mlp": 64, "layers": 1}
GROUP = 32  # inputs that share a scale of the int4 weights
BEGIN = "ROMEO.\n"
# What is trained, and its forward pass, its backward pass, its optimizer's state.
VARIANTS = {
    "float32": "float / float / float32",
    "W4A8 QAT": "int4 x int8 / float / float32",
    "int8 training": "int8 x int8 / int8 / float32",
    "adam8bit": "float / float / 8 bits",
}


def variant(name: str, model: CharLM, settings: Settings, example: np.ndarray) -> tuple[Any, Any]:
    """The module that is trained and the optimizer that trains it."""
    schedule = settings.schedule()
    if name == "W4A8 QAT":
        # the head decides between characters by its sums alone, and stays at 8 bits
        head = jq.Rule("head/kernel", weights=jq.int8(), activations=jq.int8())
        return _fake(model, jq.w4a8(group=GROUP).prepend(head), example), optax.adam(schedule)
    if name == "int8 training":
        return _fake(model, jq.int8_training(), example), optax.adam(schedule)
    if name == "adam8bit":
        return model, adam8bit(schedule)
    return model, optax.adam(schedule)


def _fake(model: CharLM, recipe: jq.Recipe, example: np.ndarray) -> Any:
    return jq.nnx.fake_quantized(model, recipe, example)


def compare(
    config: Config, text: Text, settings: Settings, bars: Progress, written: int
) -> tuple[list[Row], dict[str, list[float]], Served]:
    """Trains and validates every variant; converts W4A8, validates it again and lets it write."""
    example = in_order(text.train, settings.rows, settings.length)[0, :, :-1]
    rows, curves, served = [], {}, None
    for name, how in VARIANTS.items():
        model = CharLM(config, rngs=nnx.Rngs(settings.seed))  # the same weights each time
        fitted, optimizer = variant(name, model, settings, example)
        task = bars.add_task(name, total=settings.steps)

        def done(loss: float, task: Any = task, name: str = name) -> None:
            bars.update(task, advance=1, description=f"{name}: loss {loss:.3f}")

        found = fit(name, fitted, optimizer, text, settings, done)
        loss = validate(found.model, text, settings)
        rows.append(Row(name, how, loss, found.seconds, found.optimizer_bytes))
        curves[name] = found.losses
        if name == "W4A8 QAT":
            served = serve(found, loss, model, text, settings, bars, written)
    assert served is not None
    return rows, curves, served


def serve(
    trained: FakeQuantTensor,
    loss: float,
    model: CharLM,
    text: Text,
    settings: Settings,
    bars: Progress,
    written: int,
) -> Served:
    """Converts a model trained with quantization to what is served, and lets it write."""
    qmodel, _ = jq.nnx.convert(trained.model)
    served_loss = validate(qmodel, text, settings)
    bars.add_task("writing", total=None)
    begin = BEGIN if set(BEGIN) <= set(text.alphabet) else "Shall I"
    key = jax.random.key(settings.seed)
    said = sample(qmodel, text, begin, written, settings.length, 0.7, key)
    return Served(
        trained_loss=loss,
        served_loss=served_loss,
        bytes=tree_bytes(nnx.state(qmodel, nnx.Param)),
        float_bytes=tree_bytes(nnx.state(model, nnx.Param)),
        text=said,
    )


def load(quick: bool, console: Console) -> Text:
    """Ten plays; in a quick run three sonnets, where those cannot be had.

    Raises:
      RuntimeError: the plays cannot be downloaded, and sonnets will not do.
    """
    try:
        return shakespeare()
    except RuntimeError:
        if not quick:
            raise
        console.print(
            "[bold yellow]The plays cannot be downloaded: these figures are of three sonnets, "
            "which are too few to learn from.[/bold yellow]"
        )
        return few_lines()


def main(argv: list[str] | None = None) -> int:
    """Train four times; print the table, what the int4 model writes, and draw the losses."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps of a small model")
    parser.add_argument("--steps", type=int, help=f"of each variant (default {FULL.steps})")
    parser.add_argument(
        "--png",
        type=pathlib.Path,
        metavar="PATH",
        default=pathlib.Path("char_lm_qat.png"),
        help="where the losses are drawn (default %(default)s)",
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write the figures here")
    options = parser.parse_args(argv)
    settings = QUICK if options.quick else FULL
    if options.steps is not None:
        settings = dataclasses.replace(settings, steps=options.steps)
    if settings.steps < 2:
        parser.error("expected at least two steps")  # of which one warms up

    console = terminal()
    try:
        text = load(options.quick, console)
    except RuntimeError as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        return 1
    if options.quick:
        text = text._replace(train=text.train[:100_000], valid=text.valid[:2000])
    sizes = QUICK_SIZES if options.quick else {}
    config = Config(len(text.alphabet), length=settings.length, **sizes)
    began = time.perf_counter()
    try:
        with progress(console) as bars:
            written = 40 if options.quick else 400
            rows, curves, served = compare(config, text, settings, bars, written)
    except NonFiniteLoss as error:
        path = options.png.with_suffix(".last-good.npz")
        save_state(path, error.state)
        console.print(f"[red]{error}; the last good state is in {path}[/red]", highlight=False)
        return 1
    seconds = time.perf_counter() - began
    width = max(1, settings.steps // 20)
    title = f"Training on {text.name}: losses, means over {width} steps"
    draw(options.png, curves, title, width)

    said = expectations(rows, served)
    title = f"A transformer of {served.float_bytes // 4:,} weights on {text.name}"
    caption = f"{settings.steps} steps of {settings.rows} rows of {settings.length} characters."
    console.print(table(rows, title, caption))
    for line, met in said.items():
        mark = "[green]yes[/green]" if met else "[red]no[/red]"
        console.print(f"{mark}  {line}", highlight=False)
    console.print(
        f"W4A8 as served: {served.bytes / 1e3:.0f} kB of {served.float_bytes / 1e3:.0f} kB; "
        "it writes:\n",
        highlight=False,
    )
    console.print(served.text, style="italic", highlight=False, markup=False)
    console.print(f"\nlosses are drawn in {options.png}; {seconds:.0f} s in all", highlight=False)
    used = versions("jaxquant", "jax", "jaxlib", "flax", "optax")
    console.print(", ".join(f"{k} {v}" for k, v in used.items()), style="dim", highlight=False)
    if options.json:
        figures = {
            "versions": used,
            "text": text.name,
            "settings": dataclasses.asdict(settings),
            "seconds": seconds,
            "expected": None if options.quick else said,
            "rows": [{**dataclasses.asdict(r), "above_float": r.above(rows[0])} for r in rows],
            "served": dataclasses.asdict(served),
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
