"""Time of a training step with quantization relative to the float step.

    python benchmarks/training.py            # the table of docs/results.md
    python benchmarks/training.py --quick    # small shapes, to see that it runs

A step is loss, gradients of all params and of what is learned, and a step of SGD, jitted with
donated params. Rounds take turns in one process; each figure is a median of ratios.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from _interleaved import print_table, ratios
from capture import Block

import jaxquant as jq

_STEP = jq.QSpec("int8", jq.PerTensor())
RECIPES: dict[str, jq.Recipe | jq.Rule] = {
    "w8a8": jq.w8a8(attention=False),
    "w8a8, attention": jq.w8a8(),
    "w4a8": jq.w4a8(),
    "static ranges": jq.w8a8_static(jq.observers.moving_average()),
    "LSQ": jq.Rule(
        "**",
        weights=jq.int8(),
        activations=_STEP,
        weight_estimator=jq.ste.lsq(),
        activation_estimator=jq.ste.lsq(),
    ),
    "int8 training": jq.int8_training(),
    "int8, but dw": jq.int8_training(jq.qtensor.Gradients(weight=None)),
}


class Dense(nn.Module):
    """Dense layers with ReLU between them."""

    width: int
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.layers):
            x = nn.relu(nn.Dense(self.width)(x))
        return x


def step_of(model: nn.Module, recipe: Any, variables: Any, x: jax.Array) -> Callable[[], Any]:
    """A call that makes one training step on params of its own; `None` trains in float."""

    def target(x: jax.Array) -> jax.Array:
        return jnp.roll(x, 1, axis=-1)

    def descend(tree: Any, grads: Any) -> Any:
        return jax.tree.map(lambda a, g: a - 1e-4 * g, tree, grads)

    if recipe is None:

        def float_step(params: Any, x: jax.Array) -> Any:
            def loss(p: Any) -> jax.Array:
                return jnp.mean((model.apply(p, x) - target(x)) ** 2)

            return descend(params, jax.grad(loss)(params))

        held = [jax.tree.map(jnp.copy, variables)]
        float_jitted = jax.jit(float_step, donate_argnums=0)

        def float_call() -> None:
            held[0] = jax.block_until_ready(float_jitted(held[0], x))

        return float_call
    fake = jq.fake_quantized(model.apply, recipe)

    def step(params: Any, state: jq.qat.QuantState, x: jax.Array) -> Any:
        def loss(trained: Any) -> Any:
            own = dataclasses.replace(state, learned=trained[1])
            y, new = fake(trained[0], x, quant_state=own)
            return jnp.mean((y - target(x)) ** 2), new

        grads, new = jax.grad(loss, has_aux=True)((params, state.learned))
        params, learned = descend((params, state.learned), grads)
        return params, dataclasses.replace(new, learned=learned)

    start = jax.tree.map(jnp.copy, variables)
    kept = [(start, jq.init_quant_state(model.apply, start, recipe, x))]
    jitted = jax.jit(step, donate_argnums=(0, 1))

    def call() -> None:
        kept[0] = jax.block_until_ready(jitted(*kept[0], x))

    return call


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    cases: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "transformer block 512, 512 tokens": (Block(512), (1, 512, 512)),
        "dense 2048 x 2, 1024 rows": (Dense(2048, 2), (1024, 2048)),
    }
    if options.quick:
        cases = {"transformer block 64, 32 tokens": (Block(64), (1, 32, 64))}
    rounds = 2 if options.quick else options.rounds
    data = np.random.default_rng(0)

    def measured(model: nn.Module, shape: tuple[int, ...]) -> tuple[dict[str, float], float]:
        x = jnp.asarray(data.standard_normal(shape), jnp.float32)
        variables = jax.jit(model.init)(jax.random.key(0), x)
        recipes = {"float": None, **RECIPES}
        return ratios({n: step_of(model, r, variables, x) for n, r in recipes.items()}, rounds)

    print_table(RECIPES, ((name, measured(*case)) for name, case in cases.items()))


if __name__ == "__main__":
    main()
