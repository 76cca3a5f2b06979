"""Time of one batch of calibration by every observer, relative to the float forward pass.

    python benchmarks/capture.py            the table of docs/results.md
    python benchmarks/capture.py --quick    a small one, to see that it runs

The step is the one that `jaxquant.capture` compiles for each batch, with its one transfer of flags
to the host. Rounds take turns in one process; each figure is a median of ratios. What follows the
last contraction is not computed, so that a ratio may be below 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from _interleaved import print_table, ratios

from jaxquant import observers
from jaxquant.capture import batch_step

OBSERVERS = {
    "absmax": observers.absmax(),
    "minmax": observers.minmax(),
    "moving average": observers.moving_average(),
    "absmax per channel": observers.absmax(axis=-1),
    "percentile": observers.percentile(),
    "mse": observers.mse(),
    "entropy": observers.entropy(),
    "profile": observers.profile(),
}


class MLP(nn.Module):
    """Four dense layers."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(4):
            x = nn.relu(nn.Dense(self.width)(x))
        return x


class Block(nn.Module):
    """A transformer block."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(8)(h, h)
        h = nn.LayerNorm()(x)
        return x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(h)))


class CNN(nn.Module):
    """Four convolutions, the third with stride 2."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for factor, stride in ((1, 1), (1, 1), (2, 2), (2, 1)):
            x = nn.relu(nn.Conv(factor * self.width, (3, 3), strides=stride)(x))
        return nn.Dense(10)(x.mean((1, 2)))


def measured(model: nn.Module, x: jax.Array, rounds: int) -> tuple[dict[str, float], float]:
    """Time of a batch by each observer relative to float, and float's milliseconds."""
    variables = jax.jit(model.init)(jax.random.key(0), x)
    plain = jax.jit(model.apply)
    calls: dict[str, Callable[[], Any]] = {"float": lambda: plain(variables, x).block_until_ready()}
    for name, observer in OBSERVERS.items():
        calls[name] = batch_step(model.apply, variables, (x,), observer)
    return ratios(calls, rounds)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    cases: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "MLP 512 x 4, 512 rows": (MLP(512), (512, 512)),
        "transformer block 256, 8 x 64 tokens": (Block(256), (8, 64, 256)),
        "CNN 32 to 64 channels, 16 x 28 x 28": (CNN(32), (16, 28, 28, 16)),
        "CNN 64 to 128 channels, 16 x 28 x 28": (CNN(64), (16, 28, 28, 64)),
    }
    if options.quick:
        cases = {"MLP 64 x 4, 64 rows": (MLP(64), (64, 64))}
    rounds = 3 if options.quick else options.rounds
    data = np.random.default_rng(0)
    print_table(
        OBSERVERS,
        (
            (name, measured(model, jnp.asarray(data.standard_normal(shape), jnp.float32), rounds))
            for name, (model, shape) in cases.items()
        ),
    )


if __name__ == "__main__":
    main()
