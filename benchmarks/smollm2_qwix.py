"""Qwix on the model, windows and measure of `examples/smollm2.py`, to stand beside its table.

    pip install -e ".[examples]" qwix==0.1.8
    python benchmarks/smollm2_qwix.py [--windows 64] [--json figures.json]

Qwix quantizes the layers, which stand in a loop (it takes no scanned ones); embedding and head stay
float, since Qwix refuses the tied array.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time

# The model, the texts and the measure are the example's, not copies of them.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "examples"))

import _data
import jax
import jax.numpy as jnp
import qwix
import smollm2_text
import smollm2_weights
from minilm_measure import terminal, versions
from rich import box
from rich.table import Table
from smollm2_measure import BATCH, losses, perplexity

SCHEMES: dict[str, dict[str, object]] = {
    "W8A8 dynamic": {"weight_qtype": "int8", "act_qtype": "int8"},
    "W4 channel": {"weight_qtype": "int4"},
    "W4 g64": {"weight_qtype": "int4", "tile_size": 64},
    "NF4 g64": {"weight_qtype": "nf4", "tile_size": 64},
}


def main(argv: list[str] | None = None) -> int:
    """Measure every scheme, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--windows", type=int, default=64, help="of each text")
    parser.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write the figures here")
    options = parser.parse_args(argv)
    console = terminal()

    file = smollm2_weights.read(_data.smollm2_file())
    model, variables = smollm2_weights.load(file)
    texts = smollm2_text.texts(smollm2_weights.tokenizer(file.metadata), options.windows, 1)
    tokens = jnp.zeros((BATCH, smollm2_text.LENGTH), jnp.int32)
    found: dict[str, dict[str, float]] = {}
    with console.status("float32") as status:
        loss = losses(model.apply)
        found["float32"] = {
            name: perplexity(loss, variables, windows) for name, windows in texts.measured.items()
        }
        for scheme, settings in SCHEMES.items():
            status.update(scheme)
            start = time.perf_counter()
            rule = qwix.QuantizationRule(module_path="block_.*", **settings)
            qmodel = qwix.quantize_model(model, qwix.PtqProvider([rule]))
            abstract = jax.eval_shape(qmodel.init, jax.random.key(0), tokens)
            qparams = qwix.quantize_params(variables["params"], abstract["params"])
            loss = losses(qmodel.apply)
            found[scheme] = {
                name: perplexity(loss, {"params": qparams}, windows)
                for name, windows in texts.measured.items()
            }
            console.print(f"{scheme}: {time.perf_counter() - start:.0f} s", style="dim")

    table = Table(
        title=f"Qwix: SmolLM2-135M-Instruct, {options.windows} windows of {smollm2_text.LENGTH}",
        caption="Perplexity; layers in a loop, embedding and head float.",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("scheme")
    for text in found["float32"]:
        table.add_column(text, justify="right")
        table.add_column("ratio", justify="right")
    for scheme, values in found.items():
        cells = [f(v, found["float32"][t]) for t, v in values.items() for f in (_value, _ratio)]
        table.add_row(scheme, *cells)
    console.print(table)
    used = versions("qwix", "jax", "jaxlib", "flax")
    console.print(", ".join(f"{k} {v}" for k, v in used.items()), style="dim", highlight=False)
    if options.json:
        figures = {"versions": used, "windows": options.windows, "perplexity": found}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def _value(value: float, _: float) -> str:
    return f"{value:.2f}"


def _ratio(value: float, to: float) -> str:
    return f"{value / to:.3f}"


if __name__ == "__main__":
    sys.exit(main())
