"""What a schedule changes, and when."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import ste
from tests.arrays import normal
from tests.compiled import uncontracted
from tests.qat.programs import (
    LSQ,
    tensor,
    weights,
)

START, NARROW, END = 2, 4, 6
BITS = 3


def recipe_of(bits: int) -> jq.Recipe:
    """Three layers: learned, observed, and neither; a float format, which has its own bits."""
    spec, grid = getattr(jq, f"int{bits}")(), tensor(f"int{bits}")
    seen = jq.observers.moving_average()
    return jq.Recipe(
        [
            jq.Rule("lsq", weights=spec, activations=grid, **LSQ),
            jq.Rule("pact", weights=spec, activations=grid, activation_estimator=ste.pact()),
            jq.Rule("seen", weights=spec, activations=grid, observer=seen),
            jq.Rule("float", weights=jq.QSpec("float4_e2m1fn")),
        ]
    )


def fn(p: Any, x: Any) -> Any:
    return {name: x @ w for name, w in p.items()}


PARAMS = {n: weights(i, 16, 4, fan=16) for i, n in enumerate(("lsq", "pact", "seen", "float"))}
X = normal(9, 5, 16)


def made(recipe: jq.Recipe) -> jq.qat.QuantState:
    return jax.jit(lambda p: jq.init_quant_state(fn, p, recipe, X))(PARAMS)


@pytest.fixture(scope="module")
def steps() -> tuple[list[Any], list[jq.qat.QuantState]]:
    """Results and states of all steps; each sees more than the one before."""
    schedule = jq.Schedule(start=START, bits=((START, 8), (NARROW, BITS)), freeze=END)
    recipe = recipe_of(BITS)
    state = made(recipe)
    fake = uncontracted(jq.fake_quantized(fn, recipe, schedule=schedule))
    outs, states = [], [state]
    for n in range(8):
        y, state = fake(PARAMS, X * (1 + n), quant_state=state)
        outs.append(y)
        states.append(state)
    return outs, states


def test_float_first(steps: Any) -> None:
    for n in range(START):
        exact = uncontracted(fn)(PARAMS, X * (1 + n))
        for name in PARAMS:
            np.testing.assert_array_equal(steps[0][n][name], exact[name])


def test_more_bits_before_fewer(steps: Any) -> None:
    """With 8 bits, as a recipe of 8 bits whose steps cover the same range."""
    outs, states = steps
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[-1])
    ratio = (2**BITS - 1) / 255
    wide = made(recipe_of(8))
    served = uncontracted(jq.fake_quantized(fn, recipe_of(8)))
    narrow = uncontracted(jq.fake_quantized(fn, recipe_of(BITS)))
    for n in range(START, 8):
        state = states[n]
        if n < NARROW:
            learned = jax.tree.map(lambda a: a, state.learned)
            for what in learned.values():
                what["lsq"] = {"step": what["lsq"]["step"] * jnp.float32(ratio)}
            now = dataclasses.replace(wide, learned=learned, ranges=state.ranges)
            want = served(PARAMS, X * (1 + n), quant_state=now)[0]
        else:
            want = narrow(PARAMS, X * (1 + n), quant_state=state)[0]
        for name in PARAMS:
            np.testing.assert_array_equal(outs[n][name], want[name], err_msg=f"{name}, step {n}")


def test_ranges_freeze(steps: Any) -> None:
    _, states = steps
    seen = [float(s.ranges["seen:lhs"]["updates"]) for s in states]
    assert seen == [min(n, END) + 1 for n in range(len(states))]
    assert [int(s.step) for s in states] == list(range(len(states)))
    high = [float(jq.observers.moving_average().range(s.ranges["seen:lhs"]).high) for s in states]
    assert high[1 : END + 1] == sorted(set(high[1:])) and high[END:] == [high[END]] * 3


def test_a_whole_schedule_ends_as_it_is_served(steps: Any) -> None:
    outs, states = steps
    qparams = jax.jit(lambda p, s: jq.convert(p, s, recipe_of(BITS)))(PARAMS, states[-2])
    served = jax.jit(jq.quantized(fn))(qparams, X * 8)
    for name in ("lsq", "pact", "seen"):
        np.testing.assert_array_equal(served[name], outs[-1][name])


def batchnorm(p: Any, x: Any, *, running: bool) -> Any:
    """A layer, its statistics, and what they become."""
    h = x @ p["w"]
    mean, var = p["mean"], p["var"]
    if not running:
        mean, var = h.mean(0), h.var(0)
    kept = (p["mean"], p["var"]) if running else (p["mean"] + mean, p["var"] + var)
    return (h - mean[None]) / jnp.sqrt(var[None] + 1e-3), kept


@pytest.mark.slow
def test_frozen_batchnorm() -> None:
    recipe = jq.Recipe([jq.Rule("w", weights=jq.int4(), activations=tensor("int4"), **LSQ)])
    params = {"w": PARAMS["lsq"], "mean": normal(1, 4), "var": normal(2, 4) ** 2}

    def train(p: Any, x: Any) -> Any:
        return batchnorm(p, x, running=False)

    def frozen(p: Any, x: Any) -> Any:
        return batchnorm(p, x, running=True)

    state = jq.init_quant_state(train, params, recipe, X)
    schedule = jq.Schedule(freeze_batchnorm=2)
    fake = jax.jit(jq.fake_quantized(train, recipe, schedule=schedule, frozen=frozen))
    wants = [
        jax.jit(jq.fake_quantized(call, recipe))(params, X, quant_state=state)[0]
        for call in (train, frozen)
    ]
    for n in range(4):
        got, state = fake(params, X, quant_state=state)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wants[n >= 2]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[1][0], params["mean"])


def test_gradients_of_a_phase() -> None:
    """Float gradients while computing in float: nothing is learned of steps yet."""
    recipe, schedule = recipe_of(4), jq.Schedule(start=1)
    fake = jq.fake_quantized(fn, recipe, schedule=schedule)
    state = made(recipe)

    @jax.jit
    def grads(step: Any) -> Any:
        def loss(params: Any, learned: Any) -> Any:
            now = dataclasses.replace(state, learned=learned, step=step)
            y = fake(params, X, quant_state=now)[0]
            return sum((a**2).sum() for a in y.values())

        return jax.grad(loss, (0, 1))(PARAMS, state.learned)

    exact = jax.grad(lambda p: sum((a**2).sum() for a in fn(p, X).values()))(PARAMS)
    dparams, dlearned = grads(jnp.int32(0))
    for name in PARAMS:
        np.testing.assert_allclose(dparams[name], exact[name], rtol=1e-5, atol=1e-5)
    assert not any(a.any() for a in jax.tree.leaves(dlearned))
    dparams, dlearned = grads(jnp.int32(1))
    assert all(a.any() for a in jax.tree.leaves(dlearned))
