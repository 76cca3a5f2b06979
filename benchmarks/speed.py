"""Time of contractions by kind of weights, relative to float: the rows of `jaxquant/ops/speed.py`.

    python benchmarks/speed.py            prints rows to put there, of the JAX it runs with
    python benchmarks/speed.py --quick    a few small ones, to see that it runs

Each figure is the median over rounds of time over float's time; the rounds take turns, so that what
else the machine does falls on all alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _interleaved import ratios
from jax import lax

import jaxquant as jq
from jaxquant.ops import speed

NUMBERS = ("NHWC", "HWIO", "NHWC")


def dense(params: Any, x: jax.Array) -> jax.Array:
    """A dense layer."""
    return x @ params["w"]


def conv(params: Any, x: jax.Array) -> jax.Array:
    """A convolution with SAME padding, depthwise where the kernel has one input channel."""
    groups = x.shape[-1] // params["w"].shape[2]
    return lax.conv_general_dilated(
        x, params["w"], (1, 1), "SAME", dimension_numbers=NUMBERS, feature_group_count=groups
    )


def normal(seed: int, shape: Sequence[int]) -> jax.Array:
    """Reproducible normal data."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def rule(weights: jq.QSpec, activations: jq.QSpec | None = None, **fields: Any) -> jq.Recipe:
    """A recipe of one rule for every parameter."""
    return jq.Recipe([jq.Rule("**", weights=weights, activations=activations, **fields)])


KINDS = [
    jq.w8a8(),
    jq.w8a16(),
    jq.llm_int8(),
    jq.w4a8(),
    jq.w4a16(),
    rule(jq.int4(group=32), jq.int8()),
    rule(jq.int4(group=32)),
    rule(jq.int4(), jq.int8()),
    rule(jq.int4()),
    jq.w8a8_fp8(),
    rule(jq.QSpec("float8_e4m3fn")),
    jq.Recipe(jq.mxfp4()),
    jq.Recipe(jq.nf4()),
    rule(jq.palette(4), encoder=jq.kmeans()),
]


def shapes(op: str, column: int, quick: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the weight and the input that a figure is measured with."""
    if op == "dense":
        size = 256 if quick else speed.SIZE
        return (size, size), (column, size)
    if op == "depthwise":
        return (3, 3, 1, 128), (8, 28, 28, 128)
    window, inputs, outputs, image = {
        27: (3, 3, 32, 56),
        128: (1, 128, 128, 28),
        576: (3, 64, 64, 28),
        2304: (3, 256, 256, 14),
    }[column]
    return (window, window, inputs, outputs), (8, image, image, inputs)


def measured(op: str, column: int, quick: bool, rounds: int) -> tuple[list[float], float]:
    """Time of each kind relative to float, and float's nanoseconds for one product."""
    w_shape, x_shape = shapes(op, column, quick)
    fn: Callable[..., Any] = dense if op == "dense" else conv
    w = normal(0, w_shape) / np.sqrt(np.prod(w_shape[:-1]))
    x = normal(1, x_shape)
    plain = jax.jit(fn)
    calls: dict[str, Callable[[], Any]] = {"float": lambda: plain({"w": w}, x).block_until_ready()}
    for n, recipe in enumerate(KINDS[:2] if quick else KINDS):
        qparams, _ = jq.ptq(fn, {"w": w}, recipe, x)
        served = jax.jit(jq.quantized(fn))
        calls[str(n)] = lambda served=served, q=qparams: served(q, x).block_until_ready()
    found, unit = ratios(calls, rounds)
    rows = jnp.size(plain({"w": w}, x)) // w_shape[-1]
    return list(found.values()), unit * 1e6 / (rows * w.size)


def main() -> None:
    """Prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    rounds = 2 if options.quick else options.rounds
    lines = [_head(recipe) for recipe in KINDS]
    for op, columns in speed.COLUMNS.items():
        columns = columns[:1] if options.quick else columns
        found, costs = zip(
            *(measured(op, column, options.quick, rounds) for column in columns), strict=True
        )
        print(f"{op}, float's ns for a product: {' '.join(f'{c:.3f}' for c in costs)}", flush=True)
        for n, figures in enumerate(zip(*found, strict=True)):
            lines[n] += " | " + " ".join(f"{figure:5.2f}" for figure in figures)
    print("\n".join(line for line in lines if "|" in line))


def _head(recipe: jq.Recipe) -> str:
    first = recipe.rules[0]
    kind = speed.kind_of(first.weights, first.activations, first.outliers)
    group = "-" if kind.group is None else str(kind.group)
    return f"{kind.family:8} {kind.bits} {group:>3} {kind.activations:8}"


if __name__ == "__main__":
    main()
