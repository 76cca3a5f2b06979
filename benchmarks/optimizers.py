"""Time of one optimizer step with 8-bit state, relative to optax's, and the memory of its state.

    python benchmarks/optimizers.py            four matrices of 2048 x 2048 and their biases
    python benchmarks/optimizers.py --quick    a small case, to see that it runs

A step is `update` and `apply_updates`, jitted; params and state are donated, gradients are
arguments. Rounds take turns in one process; each figure is a median of ratios.

What bounds it on a CPU, in ns of one core per value with JAX 0.12: Adam in float32 takes 1.1, all
bandwidth, while looking up both codes (2 x 0.25), the largest magnitudes of blocks (2 x 0.25) and
encoding (2 x 0.5) take 2.0 even from the cache; and as XLA has no kernel on CPU that goes on after
it has reduced a block, new moments pass through memory between these, which makes it 3.6.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _interleaved import print_table, ratios

from jaxquant import optim

PAIRS: dict[str, tuple[Any, Any]] = {
    "adam": (optim.adam8bit, optax.adam),
    "adamw": (optim.adamw8bit, optax.adamw),
    "lion": (optim.lion8bit, optax.lion),
    "momentum": (optim.momentum8bit, lambda rate: optax.sgd(rate, momentum=0.9)),
}


def params_of(width: int, layers: int) -> dict[str, jax.Array]:
    """Matrices and biases."""
    data = np.random.default_rng(0)
    matrices = {f"w{i}": data.standard_normal((width, width)) for i in range(layers)}
    biases = {f"b{i}": data.standard_normal(width) for i in range(layers)}
    return {k: jnp.asarray(v, jnp.float32) for k, v in (matrices | biases).items()}


def stepper(tx: Any, params: Any, gradients: Any) -> tuple[Callable[[], Any], int]:
    """A call that makes one step, and the bytes of the state."""

    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    held = [jax.tree.map(jnp.copy, params), tx.init(params)]
    size = sum(x.nbytes for x in jax.tree.leaves(held[1]))

    def call() -> None:
        held[:] = jax.block_until_ready(jitted(*held, gradients))

    return call, size


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    width, layers = (512, 2) if options.quick else (2048, 4)
    rounds = 3 if options.quick else options.rounds
    params = params_of(width, layers)
    gradients = jax.tree.map(lambda p: p[::-1], params)

    def row(name: str) -> tuple[str, tuple[dict[str, float], float]]:
        ours, theirs = (stepper(tx(1e-3), params, gradients) for tx in PAIRS[name])
        found, unit = ratios({"float": theirs[0], "8 bits": ours[0]}, rounds)
        return f"{name}, {layers} x {width} x {width}", (
            found | {"state bytes": ours[1] / theirs[1]},
            unit,
        )

    print_table(("8 bits", "state bytes"), map(row, PAIRS))


if __name__ == "__main__":
    main()
