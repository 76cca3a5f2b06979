"""Learned steps that an optimizer pushed to zero or below."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from tests.qat.test_mistakes import LEARNS, PARAMS, X, fn, with_step


@pytest.fixture(scope="module")
def state() -> jq.qat.QuantState:
    return jq.init_quant_state(fn, PARAMS, LEARNS, X)


@pytest.mark.parametrize("what", ["weights", "activations"])
def test_steps_stay_positive(state: jq.qat.QuantState, what: str) -> None:
    """Below zero they are reflected, gradient included; at zero all is finite."""
    fake = jq.fake_quantized(fn, LEARNS)

    @jax.jit
    def run(learned: Any) -> Any:
        def loss(params: Any, learned: Any) -> Any:
            y, _ = fake(params, X, quant_state=dataclasses.replace(state, learned=learned))
            return (y**2).sum() + y.sum(), y

        return jax.grad(loss, (0, 1), has_aux=True)(PARAMS, learned)

    convert = jax.jit(lambda p, state: jq.convert(p, state, LEARNS))
    negative = with_step(state, what, "a", lambda s: -s)
    (grads, y), (other, y_other) = run(state.learned), run(negative.learned)
    np.testing.assert_array_equal(y, y_other)
    turned = with_step(dataclasses.replace(state, learned=other[1]), what, "a", lambda s: -s)
    for got, want in zip(
        jax.tree.leaves((other[0], turned.learned)), jax.tree.leaves(grads), strict=True
    ):
        np.testing.assert_array_equal(got, want)
    for a, b in zip(
        jax.tree.leaves(convert(PARAMS, state)),
        jax.tree.leaves(convert(PARAMS, negative)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)

    zero = with_step(state, what, "a", jnp.zeros_like)
    grads, y = run(zero.learned)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves((grads, y)))
    served = jax.jit(jq.quantized(fn))(convert(PARAMS, zero), X)
    np.testing.assert_array_equal(served, y)
    # it can grow again
    assert grads[1][what]["a"]["step"].any()
