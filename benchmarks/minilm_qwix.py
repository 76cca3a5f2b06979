"""Qwix on the model, snippets and measures of `examples/minilm.py`, to stand beside its table.

    pip install -e ".[examples]" qwix==0.1.8
    python benchmarks/minilm_qwix.py [--snippets 1000] [--json figures.json]

jaxquant itself is not used here, nor needed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

# The model, the data and the measures are the example's, not copies of them.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "examples"))

import _data
import jax
import qwix
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
from minilm_model import load
from minilm_text import BATCH, BUCKETS, make_batches

SCHEMES: dict[str, tuple[str, dict[str, object]]] = {
    "W8A8 dynamic": ("int8 / int8", {"weight_qtype": "int8", "act_qtype": "int8"}),
    "W8": ("int8 / float", {"weight_qtype": "int8"}),
    "NF4 g64": ("nf4 g64 / float", {"weight_qtype": "nf4", "tile_size": 64}),
    "W4 g64": ("int4 g64 / float", {"weight_qtype": "int4", "tile_size": 64}),
}


def main(argv: list[str] | None = None) -> int:
    """Measure every scheme, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--snippets", type=int, default=1000, help="how many snippets")
    parser.add_argument("--rounds", type=int, default=9, help="timings of each (0: none)")
    parser.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write the figures here")
    options = parser.parse_args(argv)
    console = terminal()

    files = _data.minilm_files()
    model, variables, _ = load(files)
    sentences = _data.review_snippets(options.snippets)
    batches = make_batches(files["tokenizer.json"], sentences, BUCKETS, BATCH)
    last = batches[-1]
    weights = tree_size(variables)
    rows = [Row("float32", "float / float", tree_bytes(variables), weights)]
    encoders: dict[str, Encoder] = {"float32": (jax.jit(model.apply), variables)}
    with progress(console) as bars:
        task = bars.add_task("float32", total=len(batches))
        reference = embed(encoders["float32"], batches, lambda: bars.advance(task))
        for name, (how, settings) in SCHEMES.items():
            task = bars.add_task(name, total=len(batches))
            rule = qwix.QuantizationRule(module_path=".*", **settings)
            qmodel = qwix.quantize_model(model, qwix.PtqProvider([rule]))
            abstract = jax.eval_shape(qmodel.init, jax.random.key(0), last.ids, last.mask)
            qparams = qwix.quantize_params(variables["params"], abstract["params"])
            encoders[name] = (jax.jit(qmodel.apply), {"params": qparams})
            found = embed(encoders[name], batches, lambda task=task: bars.advance(task))
            rows.append(Row(name, how, tree_bytes(qparams), weights, cosines(found, reference)))
        if options.rounds:
            task = bars.add_task("timing", total=options.rounds * len(encoders))
            step = lambda: bars.advance(task)  # noqa: E731
            seconds = interleaved_medians(encoders, last, options.rounds, step)
            for row in rows:
                row.seconds = seconds[row.name]

    title = f"Qwix: MiniLM-L6, {options.snippets:,} review snippets, against float"
    caption = timing_note(last, options.rounds)
    console.print(table(rows, title, caption))
    used = versions("qwix", "jax", "jaxlib", "flax")
    console.print(", ".join(f"{k} {v}" for k, v in used.items()), style="dim", highlight=False)
    if options.json:
        figures = {"versions": used, "rows": [as_dict(row, rows[0]) for row in rows]}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
