"""Time of single contractions by every preset, relative to float, in one process.

    python benchmarks/contractions.py            the tables of docs/architecture.md
    python benchmarks/contractions.py --quick    a small one, to see that it runs

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
from _interleaved import print_table, ratios
from jax import lax

import jaxquant as jq

PRESETS = {
    "w8a8": jq.w8a8(),
    "w8a16": jq.w8a16(),
    "w4a8": jq.w4a8(),
    "w4a16": jq.w4a16(),
    "nf4": jq.nf4(),
    "fp8": jq.fp8(),
    "mxfp4": jq.mxfp4(),
}
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


def measured(
    fn: Callable[..., Any], w: jax.Array, x: jax.Array, rounds: int
) -> tuple[dict[str, float], float]:
    """Time of each preset relative to float, and float's milliseconds."""
    plain = jax.jit(fn)
    calls: dict[str, Callable[[], Any]] = {"float": lambda: plain({"w": w}, x).block_until_ready()}
    for name, recipe in PRESETS.items():
        qparams, _ = jq.ptq(fn, {"w": w}, recipe, x)
        served = jax.jit(jq.quantized(fn))
        calls[name] = lambda served=served, q=qparams: served(q, x).block_until_ready()
    return ratios(calls, rounds)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    cases: list[tuple[str, Callable[..., Any], tuple[int, ...], tuple[int, ...]]] = []
    size, rows = (256, (1, 8)) if options.quick else (2048, (1, 2, 16, 64, 256, 1024))
    for n in rows:
        cases.append((f"dense {size} x {size}, {n} rows", dense, (size, size), (n, size)))
    images = [(8, 14, 256, 256, 3), (8, 28, 64, 64, 3), (8, 28, 128, 128, 1), (8, 28, 1, 128, 3)]
    for b, h, i, o, k in images[1:2] if options.quick else images:
        channels = o if i == 1 else i
        name = f"conv {k} x {k}, {b} x {h} x {h} x {channels} to {o}"
        cases.append(
            (name + (", depthwise" if i == 1 else ""), conv, (k, k, i, o), (b, h, h, channels))
        )
    rounds = 3 if options.quick else options.rounds

    def weight(shape: tuple[int, ...]) -> jax.Array:
        return normal(0, shape) / np.sqrt(np.prod(shape[:-1]))

    print_table(
        PRESETS,
        (
            (name, measured(fn, weight(w_shape), normal(1, x_shape), rounds))
            for name, fn, w_shape, x_shape in cases
        ),
    )


if __name__ == "__main__":
    main()
