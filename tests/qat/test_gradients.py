"""Gradients of whole contractions against the formulas, in NumPy and float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import PerGroup, QSpec
from tests import reference
from tests.arrays import normal
from tests.qat.programs import (
    KINDS,
    LSQ,
    rule,
    tensor,
    weights,
)
from tests.qat.rounding import by_step, gain, near, on_scale

ROWS, D, N = 6, 40, 5
DENSE = (
    "w8a8",
    "per tensor",
    "moving average",
    "minmax",
    "absmax",
    "lsq 8",
    "lsq 4",
    "lsq 4 unsigned",
    "lsq 2",
    "lsq 2 unsigned",
    "lsq weights",
)


def steps_of(step: np.ndarray, spec: QSpec) -> np.ndarray:
    """Steps `[out, groups]` for every weight `[in, out]`."""
    if not isinstance(spec.granularity, PerGroup):
        return np.broadcast_to(step.reshape(1, -1), (D, N))
    return step[:, np.arange(D) // spec.granularity.size].T


class Dense:
    """`y = x w + b` for each kind, and its gradients for cotangents `g`."""

    def __init__(self) -> None:
        self.params, self.x, self.g = {}, {}, {}
        for n, kind in enumerate(DENSE):
            self.params[kind] = {"w": weights(n, D, N, fan=D), "bias": normal(n + 50, N)}
            self.x[kind], self.g[kind] = normal(n + 100, ROWS, D), normal(n + 150, ROWS, N)
        # ranges and steps of activations from a smaller batch: some values are outside
        self.example = {k: 0.6 * x for k, x in self.x.items()}
        recipe = jq.Recipe([rule(kind, f"{kind}/**") for kind in DENSE])

        def fn(p: Any, x: Any) -> Any:
            return {k: x[k] @ p[k]["w"] + p[k]["bias"][None] for k in DENSE}

        make = jax.jit(lambda p, x: jq.init_quant_state(fn, p, recipe, x))
        self.state = make(self.params, self.example)
        # shorter steps of weights, for the same reason
        learned = {
            "weights": jax.tree.map(lambda s: 0.1 * s, self.state.learned["weights"]),
            "activations": self.state.learned["activations"],
        }
        self.state = dataclasses.replace(self.state, learned=learned)
        fake = jq.fake_quantized(fn, recipe)

        @jax.jit
        def run(params: Any, learned: Any, x: Any) -> Any:
            def call(params: Any, learned: Any, x: Any) -> Any:
                state = dataclasses.replace(self.state, learned=learned)
                return fake(params, x, quant_state=state)[0]

            y, pull = jax.vjp(call, params, learned, x)
            return y, *pull(self.g)

        self.y, self.dparams, self.dlearned, self.dx = run(self.params, learned, self.x)


@pytest.fixture(scope="module")
def dense() -> Dense:
    return Dense()


@pytest.mark.parametrize("kind", DENSE)
def test_dense(dense: Dense, kind: str) -> None:
    how = KINDS[kind]
    x, w, bias, g, example = (
        np.asarray(a, np.float64)
        for a in (
            dense.x[kind],
            dense.params[kind]["w"],
            dense.params[kind]["bias"],
            dense.g[kind],
            dense.example[kind],
        )
    )
    path = f"{kind}/w"
    of_w, of_x = how["weights"].at((0,), 2), how["activations"].at((1,), 2)
    if "weight_estimator" in how:
        step = np.asarray(dense.state.learned["weights"][path]["step"], np.float64)
        rounded_w = by_step(w, steps_of(step, of_w), of_w)
    else:
        rounded_w = on_scale(w, *reference.scales(w, of_w), of_w)
    if "activation_estimator" in how:
        step_x = float(dense.state.learned["activations"][path]["step"])
        rounded_x = by_step(x, step_x, of_x)
    elif "observer" in how:
        scale, zero = (a.flat[0] for a in reference.scales(example, of_x))
        rounded_x = on_scale(x, scale, zero, of_x)
        assert not rounded_x.inside.all()
    else:
        rounded_x = on_scale(x, *reference.scales(x, of_x), of_x)
        assert rounded_x.inside.all()

    near(dense.y[kind], rounded_x.values @ rounded_w.values + bias)
    to_x, to_w = g @ rounded_w.values.T, rounded_x.values.T @ g
    near(dense.dx[kind], to_x * rounded_x.inside)
    near(dense.dparams[kind]["w"], to_w * rounded_w.inside)
    near(dense.dparams[kind]["bias"], g.sum(0))
    if rounded_w.slope is not None:
        assert not rounded_w.inside.all()
        products = to_w * rounded_w.slope
        if isinstance(of_w.granularity, PerGroup):
            size = of_w.granularity.size
            runs = [slice(n, n + size) for n in range(0, D, size)]
        else:
            size, runs = D, [slice(None)]
        want = np.stack([products[run].sum(0) for run in runs], -1)
        counts = np.array([w[run].shape[0] for run in runs])
        if of_w.granularity == jq.PerTensor():
            want, counts = want.sum(), np.array(D * N)
        want = want * gain(1, of_w) / np.sqrt(counts)
        near(dense.dlearned["weights"][path]["step"], want.reshape(step.shape))
    if rounded_x.slope is not None:
        want = (to_x * rounded_x.slope).sum() * gain(D, of_x)
        near(dense.dlearned["activations"][path]["step"], np.array(want), 2e-5)


def test_sites_of_one_leaf_add_up() -> None:
    """One step of the weight and one of both activations, whose gradients are sums."""
    spec = jq.int4()
    of_x = tensor("int4")
    recipe = jq.Recipe([jq.Rule("w", weights=spec, activations=of_x, **LSQ)])
    params, xs = {"w": weights(0, D, N, fan=D)}, (normal(1, ROWS, D), 2 * normal(2, 3, D))
    gs = normal(3, ROWS, N), normal(4, 3, N)

    def fn(p: Any, x: Any) -> Any:
        return [a @ p["w"] for a in x]

    state = jq.init_quant_state(fn, params, recipe, xs)
    fake = jq.fake_quantized(fn, recipe)

    @jax.jit
    def grads(params: Any, learned: Any) -> Any:
        def total(params: Any, learned: Any) -> Any:
            y = fake(params, xs, quant_state=dataclasses.replace(state, learned=learned))[0]
            return sum((a * g).sum() for a, g in zip(y, gs, strict=True))

        return jax.grad(total, (0, 1))(params, learned)

    dparams, dlearned = grads(params, state.learned)
    steps = [np.asarray(state.learned[n]["w"]["step"]) for n in ("weights", "activations")]
    mean = np.mean([np.abs(x).mean() for x in xs for _ in range(len(x))])
    np.testing.assert_allclose(steps[1], 2 * mean / np.sqrt(7), rtol=1e-5)
    w = by_step(np.asarray(params["w"], np.float64), steps[0].reshape(1, N), spec)
    rounded = [by_step(np.asarray(x, np.float64), steps[1], of_x) for x in xs]
    to_w = sum(x.values.T @ np.asarray(g) for x, g in zip(rounded, gs, strict=True))
    near(dparams["w"], to_w * w.inside)
    near(dlearned["weights"]["w"]["step"], (to_w * w.slope).sum(0)[:, None] * gain(D, spec))
    to_x = [np.asarray(g) @ w.values.T for g in gs]
    want = sum((d * x.slope).sum() for d, x in zip(to_x, rounded, strict=True)) * gain(D, of_x)
    near(dlearned["activations"]["w"]["step"], np.array(want), 2e-5)
