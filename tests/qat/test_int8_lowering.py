"""Training on int8: what the compiler is given."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant as jq
from tests.arrays import normal
from tests.lowered import inlined
from tests.qat.programs import (
    weights,
)

PLATFORMS = ("cpu", "cuda", "tpu")
INT8_DOT = re.compile(r"\(tensor<[\dx]*xi8>, tensor<[\dx]*xi8>\) -> tensor<[\dx]*xi32>")


def mlp(p: Any, x: Any) -> Any:
    for w in p[:-1]:
        x = jax.nn.relu(x @ w)
    return x @ p[-1]


def scanned(p: Any, x: Any) -> Any:
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p)[0]


def remat(p: Any, x: Any) -> Any:
    block = jax.checkpoint(
        lambda h, w: (jnp.tanh(h @ w), None), policy=jax.checkpoint_policies.everything_saveable
    )
    return lax.scan(block, x, p)[0]


SQUARE = [weights(n, 16, 16, fan=16) for n in range(3)]
X = normal(9, 4, 16)


@dataclasses.dataclass(frozen=True)
class Layers:
    """A function, and how many contractions its program has for each parameter and forward pass."""

    fn: Callable[..., Any]
    params: Any
    x: Any
    dots: int


LAYERS = {
    "right": Layers(mlp, SQUARE, X, 3),
    "left": Layers(lambda p, x: p[1].T @ jnp.tanh(p[0] @ x.T), SQUARE, X, 2),
    "stacked": Layers(scanned, jnp.stack(SQUARE), X, 1),
    "rematerialized": Layers(remat, jnp.stack(SQUARE), X, 1),
    "several axes": Layers(
        lambda p, x: jnp.einsum("bhk,hkd->bd", x, p),
        weights(0, 2, 8, 6, fan=16),
        normal(1, 4, 2, 8),
        1,
    ),
    "axes apart": Layers(
        lambda p, x: jnp.einsum("hdk,kbh->bd", p, x),
        weights(0, 2, 6, 8, fan=16),
        normal(1, 8, 4, 2),
        1,
    ),
    "batch axis": Layers(
        lambda p, x: jnp.einsum("ebd,edf->ebf", x, p),
        weights(0, 3, 16, 6, fan=16),
        normal(1, 3, 4, 16),
        1,
    ),
    "batch axis in the middle": Layers(
        lambda p, x: jnp.einsum("edf,bed->bef", p, x),
        weights(0, 3, 16, 6, fan=16),
        normal(1, 4, 3, 16),
        1,
    ),
    "bfloat16": Layers(
        mlp, [w.astype(jnp.bfloat16) for w in SQUARE[:2]], X.astype(jnp.bfloat16), 2
    ),
}


def training(case: Layers, recipe: jq.Recipe) -> tuple[Callable[..., Any], jq.qat.QuantState]:
    """A step that gives the loss and the gradients of params and input."""
    state = jax.jit(lambda p, x: jq.init_quant_state(case.fn, p, recipe, x))(case.params, case.x)
    fake = jq.fake_quantized(case.fn, recipe)

    def step(params: Any, x: Any, state: Any) -> Any:
        y, after = fake(params, x, quant_state=state)
        return (y.astype(jnp.float32) ** 2).mean(), after

    return step, state


def dots(text: str) -> list[str]:
    return [line for line in inlined(text).splitlines() if "stablehlo.dot_general" in line]


@pytest.mark.parametrize("name", LAYERS)
def test_three_contractions_on_int8(name: str) -> None:
    case = LAYERS[name]
    step, state = training(case, jq.int8_training())
    in_loop = name in ("stacked", "rematerialized")
    for argnums in (0, (0, 1)):
        traced = jax.jit(jax.value_and_grad(step, argnums, has_aux=True)).trace(
            case.params, case.x, state
        )
        for platform in PLATFORMS if argnums == 0 else PLATFORMS[:1]:
            found = dots(traced.lower(lowering_platforms=(platform,)).as_text())
            assert all(INT8_DOT.search(line) for line in found), found
            # without the gradient of the input the first layer has two, unless all are one loop
            fewer = 1 if argnums == 0 and not in_loop else 0
            assert len(found) == 3 * case.dots - fewer


def test_an_export_for_all_platforms() -> None:
    case = LAYERS["right"]
    step, state = training(case, jq.int8_training())

    def grads(params: Any, x: Any, key: Any) -> Any:
        return jax.grad(step, has_aux=True)(params, x, dataclasses.replace(state, key=key))[0]

    args = case.params, case.x, state.key
    exported = jax.export.export(jax.jit(grads), platforms=PLATFORMS)(*args)
    again = jax.export.deserialize(exported.serialize())
    for got, want in zip(again.call(*args), jax.jit(grads)(*args), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())
