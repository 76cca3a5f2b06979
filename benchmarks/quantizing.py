"""Time and memory of quantization itself, and of tracing, relative to copies and to float.

    python benchmarks/quantizing.py            1 GB of float32 weights
    python benchmarks/quantizing.py --models   and MiniLM and SmolLM2 from the examples, traced
    python benchmarks/quantizing.py --quick    a few MB, to see that it runs

Calls are made in turns in one process; peaks of memory are those of a process each.
"""

from __future__ import annotations

import argparse
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from _interleaved import print_table, ratios

import jaxquant as jq

SPECS = {
    "int8 per channel": jq.QSpec("int8"),
    "int4, groups of 128": jq.QSpec("int4", jq.PerGroup(128)),
    "nf4, groups of 64": jq.QSpec("nf4", jq.PerGroup(64)),
}
MODES = ("kept", "donated")


def weights(megabytes: int, size: int) -> dict[str, jax.Array]:
    """Square kernels `[size, size]` that take so many MB together."""
    count = max(1, megabytes * 2**20 // (4 * size * size))
    keys = jax.random.split(jax.random.key(0), count)
    draw = jax.jit(lambda key: jax.random.normal(key, (size, size)))
    return {f"layer_{n:03}": draw(key) for n, key in enumerate(keys)}


def known(params: dict[str, jax.Array], spec: jq.QSpec) -> tuple[jq.Recipe, Any]:
    """A recipe, and the sites of kernels contracted over their first axis."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    x = jax.ShapeDtypeStruct((1, next(iter(params.values())).shape[0]), jnp.float32)
    sites = jq.trace(lambda p, x: [x @ w for w in p.values()], shapes, x)
    return jq.Recipe([jq.Rule("**", weights=spec)]), sites


def times(megabytes: int, size: int, rounds: int) -> tuple[dict[str, float], float]:
    """`quantize_params` by every spec, and copies by NumPy, relative to a jitted copy."""
    params = weights(megabytes, size)
    copy = jax.jit(lambda p: jax.tree.map(jnp.copy, p))
    arrays = [np.asarray(x) for x in params.values()]

    def quantize(spec: jq.QSpec) -> Callable[[], Any]:
        recipe, sites = known(params, spec)
        return lambda: jax.block_until_ready(jq.quantize_params(params, recipe, sites=sites)[0])

    calls = {"float": lambda: jax.block_until_ready(copy(params))}
    calls["NumPy's copy"] = lambda: [x.copy() for x in arrays]
    return ratios(calls | {name: quantize(spec) for name, spec in SPECS.items()}, rounds)


def peak(megabytes: int, size: int, name: str, mode: str) -> None:
    """Prints how far quantizing raises the peak of this process, over the bytes of the weights."""
    warm, params = weights(1, size), weights(megabytes, size)
    recipe, sites = known(warm, SPECS[name])
    jq.quantize_params(warm, recipe, sites=sites)  # what compiling takes is not counted
    recipe, sites = known(params, SPECS[name])
    jax.block_until_ready(params)
    nbytes = sum(x.nbytes for x in params.values())
    before = resident()
    qparams, _ = jq.quantize_params(params, recipe, sites=sites, donate=mode == "donated")
    jax.block_until_ready(qparams)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print((most - before) / nbytes, sum(q.nbytes for q in qparams.values()) / nbytes)


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def memory(megabytes: int, size: int) -> None:
    """Prints the peak beside the model, of a process each."""
    print("\n| memory beside the weights, in units of them | codes and scales | kept | donated |")
    print("|---" * 4 + "|")
    for name in SPECS:
        found = []
        for mode in MODES:
            given = [str(megabytes), str(size), name, mode]
            command = [sys.executable, __file__, "--peak", *given]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append([float(word) for word in out.split()])
        cells = " | ".join(f"{most:.2f}" for most, _ in found)
        print(f"| {name}, {size} x {size} | {found[0][1]:.2f} | {cells} |", flush=True)


class Layer(nn.Module):
    """Attention and MLP, each with a norm before and a sum after."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, time, width]` to the same."""
        y = nn.RMSNorm()(x)
        q, k, v = (nn.Dense(self.width, use_bias=False)(y)[..., None, :] for _ in range(3))
        y = nn.dot_product_attention(q, k, v)[..., 0, :]
        x = x + nn.Dense(self.width, use_bias=False)(y)
        y = nn.gelu(nn.Dense(4 * self.width, use_bias=False)(nn.RMSNorm()(x)))
        return x + nn.Dense(self.width, use_bias=False)(y)


def programs(layers: int, width: int) -> dict[str, tuple[Callable[..., Any], Any, tuple[Any, ...]]]:
    """Functions by name: `(fn, params, args)`."""
    x = jnp.ones((1, 16, width))
    layer, keys = Layer(width), jax.random.split(jax.random.key(0), layers)
    stack = jax.vmap(lambda key: layer.init(key, x))(keys)
    apart = [jax.tree.map(lambda a, n=n: a[n], stack) for n in range(layers)]
    helper = jax.jit(layer.apply)

    def loop(p: Any, x: jax.Array) -> jax.Array:
        for each in p:
            x = layer.apply(each, x)
        return x

    def shared(p: Any, x: jax.Array) -> jax.Array:
        for each in p:
            x = helper(each, x)
        return x

    def scanned(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, each: (layer.apply(each, x), None), x, p)[0]

    def mlp(p: Any, x: jax.Array) -> jax.Array:
        for w in p:
            x = nn.relu(x @ w)
        return x

    kernels = [jax.random.normal(key, (width, width)) for key in keys]
    return {
        "MLP": (mlp, kernels, (x,)),
        "transformer, layers in a loop": (loop, apart, (x,)),
        "transformer, a jitted helper": (shared, apart, (x,)),
        "transformer, scanned": (scanned, stack, (x,)),
    }


def models() -> dict[str, tuple[Callable[..., Any], Any, tuple[Any, ...]]]:
    """The examples' models, of their own sizes."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    from benchmarks.suite.models import minilm, smollm2

    found = {"MiniLM-L6": minilm(8), "SmolLM2-135M": smollm2(64, 0)}
    return {name: (p.model.apply, p.variables, p.args) for name, p in found.items()}


def traced(name: str, given: tuple[Callable[..., Any], Any, tuple[Any, ...]], rounds: int) -> None:
    """Prints time to trace, and the size of the program, relative to the float function's."""
    fn, params, args = given
    cells = []
    for recipe in (jq.w8a8(), jq.w4a16()):
        qparams, _ = jq.quantize_params(params, recipe, sites=jq.trace(fn, params, *args))

        def trace(fn: Callable[..., Any], params: Any) -> Any:
            jax.clear_caches()
            start = time.perf_counter()
            made = jax.jit(lambda p, *a: fn(p, *a)).trace(params, *args)
            return made, time.perf_counter() - start

        pairs = [(trace(fn, params), trace(jq.quantized(fn), qparams)) for _ in range(rounds)]
        slower = float(np.median([q[1] / f[1] for f, q in pairs]))
        texts = [made.lower().as_text() for made, _ in pairs[-1]]
        lines = [text.count("\n") for text in texts]
        sizes = [f"{lines[1] / lines[0]:.2f}", f"{len(texts[1]) / len(texts[0]):.2f}"]
        cells += [f"{slower:.2f}", *sizes]
        unit = float(np.median([f[1] for f, _ in pairs])) * 1e3
    print(f"| {name} | {unit:.0f} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Prints all tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small arrays, few rounds")
    parser.add_argument("--models", action="store_true", help="trace the examples' models, too")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        megabytes, size, name, mode = options.peak
        peak(int(megabytes), int(size), name, mode)
        return
    megabytes, sizes, rounds = (2, (256,), 2) if options.quick else (1024, (2048, 4096), 5)
    print("| program / float's | trace, ms |", end="")
    kinds = [f"{r}, {what}" for r in ("w8a8", "w4a16") for what in ("time", "lines", "characters")]
    print(f" {' | '.join(kinds)} |\n{'|---' * 8}|")
    small = programs(2, 32) if options.quick else programs(12, 256)
    for name, given in (small | (models() if options.models else {})).items():
        traced(name, given, rounds)
    memory(megabytes, sizes[-1])
    print("\n`float` is a jitted copy of all arrays.\n")
    rows = ((f"{megabytes} MB in {n} x {n}", times(megabytes, n, rounds)) for n in sizes)
    print_table(("NumPy's copy", *SPECS), rows)


if __name__ == "__main__":
    main()
