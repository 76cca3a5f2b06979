"""`QuantState`: what it holds, how it moves on, and how it is kept; `fake_quant_params` with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import lax

import jaxquant as jq
from tests.arrays import normal
from tests.qat.programs import (
    LSQ,
    Many,
    Program,
    mlp,
    mlp_params,
    rule,
    tensor,
    weights,
)


def same(a: Any, b: Any) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_what_it_holds_of_layers() -> None:
    """All that belongs to a stacked parameter is stacked; steps are those of the papers."""
    recipe = jq.Recipe(
        [
            jq.Rule("lsq", weights=jq.int4(), activations=tensor("uint4"), **LSQ),
            rule("kmeans", "kmeans"),
            rule("moving average", "seen"),
        ]
    )
    params = {name: weights(n, 3, 8, 8, fan=8) for n, name in enumerate(("lsq", "kmeans", "seen"))}
    x = normal(9, 5, 8)

    def fn(p: Any, x: Any) -> Any:
        def block(x: Any, w: Any) -> Any:
            return 2 * (x @ w["lsq"]), (x @ w["kmeans"], x @ w["seen"])

        return lax.scan(block, x, p)

    state = jq.init_quant_state(fn, params, recipe, x, key=jax.random.key(7))
    learned = state.learned
    assert jax.tree.map(jnp.shape, learned) == {
        "weights": {"lsq": {"step": (3, 8, 1)}, "kmeans": {"codebook": (3, 16)}},
        "activations": {"lsq": {"step": (3,)}},
    }
    assert state.constants.keys() == {"kmeans"}
    codes = state.constants["kmeans"]["codes"]
    assert codes.shape == (3, 8, 8) and codes.dtype == jnp.uint8
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(learned))
    assert int(state.step) == 0 and state.step.dtype == jnp.int32
    np.testing.assert_array_equal(state.key, jax.random.key_data(jax.random.key(7)))

    inputs = [np.asarray(x, np.float64)]
    for w in np.asarray(params["lsq"], np.float64)[:2]:
        inputs.append(2 * inputs[-1] @ w)
    want = [2 * np.abs(h).mean() / np.sqrt(15) for h in inputs]
    np.testing.assert_allclose(learned["activations"]["lsq"]["step"], want, rtol=1e-5)
    want = 2 * np.abs(np.asarray(params["lsq"])).mean(1) / np.sqrt(7)
    np.testing.assert_allclose(learned["weights"]["lsq"]["step"][..., 0], want, rtol=1e-5)
    # the observer begins with the example
    (entry,) = state.ranges.values()
    found = jq.observers.moving_average().range(entry)
    np.testing.assert_allclose(found.low, [h.min() for h in inputs], rtol=1e-5)
    np.testing.assert_allclose(found.high, [h.max() for h in inputs], rtol=1e-5)
    # each codebook value is the mean of its members
    for codebook, members, w in zip(
        learned["weights"]["kmeans"]["codebook"], codes, params["kmeans"], strict=True
    ):
        for n in np.unique(members):
            mean = np.asarray(w)[np.asarray(members) == n].mean()
            np.testing.assert_allclose(codebook[n], mean, rtol=1e-4, atol=1e-5)


class Training:
    """An MLP in training by all that learns at once, everything donated."""

    KINDS = ("lsq 4 unsigned", "pact", "lsq+", "kmeans")

    def __init__(self) -> None:
        x = normal(90, 32, 64)
        self.many = Many(Program(mlp, mlp_params, (x,)), self.KINDS)
        self.target = {k: jnp.tanh(x[:, :8] + x[:, 8:16]) for k in self.KINDS}
        self.optimizer = optax.adam(3e-3)
        self.fake = jq.fake_quantized(self.many.fn, self.many.recipe)
        self.step = jax.jit(self._step, donate_argnums=(0, 1, 2))

    def start(self) -> tuple[Any, jq.qat.QuantState, Any]:
        state = self.many.state()
        params, self.before = jax.tree.map(jnp.copy, (self.many.params, state))
        return params, state, self.optimizer.init((params, state.learned))

    def _step(self, params: Any, state: jq.qat.QuantState, moments: Any) -> Any:
        def loss(trained: Any) -> Any:
            params, learned = trained
            now = dataclasses.replace(state, learned=learned)
            y, after = self.fake(params, *self.many.args, quant_state=now)
            losses = {k: ((y[k] - self.target[k]) ** 2).mean() for k in y}
            return sum(losses.values()), (losses, after)

        trained = params, state.learned
        grads, (losses, after) = jax.grad(loss, has_aux=True)(trained)
        updates, moments = self.optimizer.update(grads, moments)
        params, learned = optax.apply_updates(trained, updates)
        return (params, dataclasses.replace(after, learned=learned), moments), losses


@pytest.fixture(scope="module")
def training() -> tuple[Training, Any, list[Any]]:
    run = Training()
    held, losses = run.start(), []
    for _ in range(40):
        held, found = run.step(*held)
        losses.append(found)
    return run, held, losses


@pytest.mark.parametrize("kind", Training.KINDS)
def test_training_lowers_the_loss(training: Any, kind: str) -> None:
    run, (_, state, _), losses = training
    first, last = (float(found[kind]) for found in (losses[0], losses[-1]))
    assert last < 0.7 * first
    assert int(state.step) == len(losses)
    for name, learned in state.learned["weights"].items():
        assert not same(learned, run.before.learned["weights"][name])
    assert same(state.constants, run.before.constants) and state.constants.keys() == {
        f"kmeans/{name}" for name in "ab"
    }


def test_a_checkpoint_goes_on(training: Any, tmp_path: Path) -> None:
    run, held, _ = training
    held = jax.tree.map(jnp.copy, held)
    assert isinstance(held[1], jq.qat.QuantState) and held[1].layout == run.before.layout
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "held", held)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, held)
        restored = checkpointer.restore(tmp_path / "held", abstract)
    assert same(restored, held)
    results = [
        run.step(*jax.tree.map(lambda a: jnp.array(np.asarray(a)), h)) for h in (held, restored)
    ]
    assert same(*results)


OBSERVERS = {
    "average": jq.observers.moving_average(0.75),
    "ends": jq.observers.minmax(),
    "largest": jq.observers.absmax(),
}
BATCHES = [1.0, 2.0, float("nan"), 0.5, float("inf"), 3.0, 9.0, 0.1]
FREEZE = 6


def observed() -> tuple[Any, Any, Any]:
    recipe = jq.Recipe(
        [
            jq.Rule(name, weights=jq.int8(), activations=tensor("int8"), observer=observer)
            for name, observer in OBSERVERS.items()
        ]
    )
    params = {name: weights(n, 8, 4, fan=8) for n, name in enumerate(OBSERVERS)}
    return lambda p, x: [(x + n) @ w for n, w in enumerate(p.values())], params, recipe


def test_ranges_follow_finite_batches_until_they_freeze() -> None:
    fn, params, recipe = observed()
    x = normal(1, 6, 8)
    state = jq.init_quant_state(fn, params, recipe, x)
    fake = jax.jit(jq.fake_quantized(fn, recipe, schedule=jq.Schedule(freeze=FREEZE)))
    batches = [x * factor if np.isfinite(factor) else x.at[2, 3].set(factor) for factor in BATCHES]
    for batch in batches:
        _, state = fake(params, batch, quant_state=state)
    assert int(state.step) == len(BATCHES)

    seen = [np.asarray(x), *map(np.asarray, batches[:FREEZE])]
    for n, (name, observer) in enumerate(OBSERVERS.items()):
        entry = state.ranges[f"{name}:lhs"]
        finite = [a + n for a in seen if np.isfinite(a).all()]
        assert int(entry["updates"]) == len(seen) and int(entry["bad"]) == 2
        low, high = (np.array([end(a) for a in finite]) for end in (np.min, np.max))
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        if name == "average":
            share = 0.75 ** np.arange(len(finite))[::-1]
            low, high = ((share * a).sum() / share.sum() for a in (low, high))
        else:
            low, high = low.min(), high.max()
        if name == "largest":
            low, high = -max(-low, high), max(-low, high)
        found = observer.range(entry)
        np.testing.assert_allclose([found.low, found.high], [low, high], rtol=1e-5)
