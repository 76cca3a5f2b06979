"""Post-training quantization in a few lines each: a plain function, Flax Linen, Flax NNX.

python examples/quickstart.py
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import jaxquant as jq
import jaxquant.nnx

X = jax.random.normal(jax.random.key(0), (32, 256))


class Linen(nn.Module):
    """An MLP."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Vectors [batch, 256] to [batch, 64]."""
        return nn.Dense(64)(nn.relu(nn.Dense(512)(x)))


class NNX(nnx.Module):
    """The same MLP."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(256, 512, rngs=rngs)
        self.down = nnx.Linear(512, 64, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Vectors [batch, 256] to [batch, 64]."""
        return self.down(nnx.relu(self.up(x)))


def error(found: jax.Array, expected: jax.Array) -> float:
    """Size of the difference relative to the size of what was expected."""
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def plain() -> tuple[float, jq.report.Report]:
    """A plain function, weights and activations in int8."""

    def fn(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return nn.relu(x @ params["up"]) @ params["down"]

    up, down = jax.random.split(jax.random.key(1))
    params = {"up": jax.random.normal(up, (256, 512)), "down": jax.random.normal(down, (512, 64))}
    qparams, report = jq.ptq(fn, params, jq.w8a8(), X)
    return error(jax.jit(jq.quantized(fn))(qparams, X), fn(params, X)), report


def linen() -> tuple[float, jq.report.Report]:
    """A Linen model, weights in int4: its function is `apply`, its params are the variables."""
    model = Linen()
    variables = model.init(jax.random.key(1), X)
    qvariables, report = jq.ptq(model.apply, variables, jq.w4a16(group=64), X)
    y = jax.jit(jq.quantized(model.apply))(qvariables, X)
    return error(y, model.apply(variables, X)), report


def nnx_model() -> tuple[float, jq.report.Report]:
    """An NNX model, `down` in int8 and the rest in nf4; the model itself is not touched."""
    model = NNX(nnx.Rngs(1))
    recipe = jq.Recipe(jq.nf4()).prepend(jq.Rule("down/*", weights=jq.int8()))
    qmodel, report = jaxquant.nnx.ptq(model, recipe, X)
    return error(nnx.jit(qmodel)(X), model(X)), report


def main() -> dict[str, tuple[float, jq.report.Report]]:
    """Runs all three and prints their reports."""
    found = {"plain": plain(), "linen": linen(), "nnx": nnx_model()}
    for name, (relative, report) in found.items():
        print(f"== {name}: relative error {relative:.4f}\n{report}\n")
    return found


if __name__ == "__main__":
    main()
