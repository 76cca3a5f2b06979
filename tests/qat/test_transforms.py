"""Gradients under `vmap`, loops, rematerialization and rules of their own."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxquant as jq
from tests import reference
from tests.arrays import normal
from tests.qat.programs import (
    PROGRAMS,
    Many,
    rule,
    weights,
)
from tests.qat.rounding import near, on_scale


def test_vmap_and_remat_and_loops() -> None:
    """One gradient, however it is asked for."""
    recipe = jq.Recipe([rule("lsq 4", "a"), rule("w8a8", "b")])
    params = {"a": weights(0, 8, 8, fan=8), "b": weights(1, 8, 8, fan=8)}
    x = normal(2, 3, 4, 8)

    def fn(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["a"]) @ p["b"]

    state = jq.init_quant_state(fn, params, recipe, x[0])
    fake = jq.fake_quantized(fn, recipe)

    def loss(fake: Any, trained: Any, x: Any) -> Any:
        params, learned = trained
        y, _ = fake(params, x, quant_state=dataclasses.replace(state, learned=learned))
        return (y**2).sum()

    def scanned(trained: Any) -> Any:
        return lax.scan(lambda total, x: (total + loss(fake, trained, x), None), 0.0, x)[0]

    @jax.jit
    def all_of(trained: Any) -> Any:
        each = [jax.grad(loss, 1)(fake, trained, row) for row in x]
        mapped = jax.vmap(lambda x: jax.grad(loss, 1)(fake, trained, x))(x)
        again = jax.grad(loss, 1)(jax.checkpoint(fake), trained, x[0])
        return each, mapped, again, jax.grad(scanned)(trained)

    each, mapped, again, total = all_of((params, state.learned))
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *each)
    for got, want in ((mapped, stacked), (again, each[0])):
        jax.tree.map(lambda a, b: near(a, np.asarray(b)), got, want)
    jax.tree.map(lambda a, b: near(a, np.asarray(b.sum(0))), total, stacked)


def blocks(p: Any, x: Any) -> Any:
    """Layers that are computed anew on the way back."""

    @jax.checkpoint
    def block(x: Any, w: Any) -> Any:
        return x + jnp.tanh(jnp.tanh(x @ w["in"]) @ w["up"]) @ w["down"], None

    return lax.scan(block, x, p)[0]


def test_scanned_and_rematerialized_layers() -> None:
    """Gradients of stacked params and steps are those of the layers one by one."""
    recipe = jq.Recipe([rule("lsq 4", "**/in"), rule("moving average", "**/up"), rule("w8a8")])
    stack = {name: weights(n, 2, 16, 16, fan=16) for n, name in enumerate(("in", "up", "down"))}
    params, x = {"stack": stack}, normal(1, 5, 16)
    apart = {f"l{n}": jax.tree.map(lambda a, n=n: a[n], stack) for n in range(2)}

    def one_by_one(p: Any, x: Any) -> Any:
        for w in (p["l0"], p["l1"]):
            x = x + jnp.tanh(jnp.tanh(x @ w["in"]) @ w["up"]) @ w["down"]
        return x

    def grads(fn: Any, params: Any) -> Any:
        @jax.jit
        def run(params: Any) -> Any:
            state = jq.init_quant_state(fn, params, recipe, x)

            def loss(params: Any, learned: Any) -> Any:
                now = dataclasses.replace(state, learned=learned)
                y, after = jq.fake_quantized(fn, recipe)(params, x, quant_state=now)
                return (y**2).sum(), (y, after.ranges)

            return jax.grad(loss, (0, 1), has_aux=True)(params, state.learned)

        return run(params)

    (dparams, dlearned), (y, ranges) = grads(lambda p, x: blocks(p["stack"], x), params)
    (dapart, dlearned_apart), (y_apart, _) = grads(one_by_one, apart)
    near(y, np.asarray(y_apart))
    for name in stack:
        near(dparams["stack"][name], np.stack([dapart[f"l{n}"][name] for n in range(2)]))
    for what in ("weights", "activations"):
        got = dlearned[what]["stack/in"]["step"]
        parts = [dlearned_apart[what][f"l{n}/in"]["step"] for n in range(2)]
        near(got, np.stack(parts))
    assert [state["low"].shape for state in ranges.values()] == [(2,)]


@jax.custom_jvp
def softplus_of_product(w: Any, x: Any) -> Any:
    return jnp.log1p(jnp.exp(x @ w))


@softplus_of_product.defjvp
def _softplus_of_product_jvp(primals: Any, tangents: Any) -> Any:
    (w, x), (dw, dx) = primals, tangents
    return softplus_of_product(w, x), jax.nn.sigmoid(x @ w) * (dx @ w + x @ dw)


def test_a_rule_of_its_own_is_kept() -> None:
    """The rule, at the quantized weight; differentiating what it computes would give NaN."""
    recipe = jq.Recipe([jq.Rule("w", weights=jq.int8(), activations=jq.int8())])
    params, x = {"w": 200 * weights(0, 8, 4, fan=8)}, normal(1, 6, 8)

    def fn(p: Any, x: Any) -> Any:
        return softplus_of_product(p["w"], x)

    fake = jq.fake_quantized(fn, recipe)
    y, pull = jax.vjp(jax.jit(fake), params, x)
    g = np.asarray(normal(2, 6, 4))
    finite = np.isfinite(y)
    assert 0.2 < finite.mean() < 1
    dparams, dx = pull(jnp.asarray(g))
    w = np.asarray(params["w"], np.float64)
    spec = jq.int8().at((0,), 2)
    values = on_scale(w, *reference.scales(w, spec), spec).values
    product = np.asarray(x, np.float64) @ values
    slope = g / (1 + np.exp(-product))
    near(dparams["w"], np.asarray(x).T @ slope, 1e-4)
    near(dx, slope @ values.T, 1e-4)
    qparams, _ = jq.ptq(fn, params, recipe, x)
    np.testing.assert_array_equal(y, jax.jit(jq.quantized(fn))(qparams, x))


def test_gradient_of_inputs_by_finite_differences() -> None:
    """Weights alone: the result is smooth in the input, so differences apply."""
    recipe = jq.Recipe([rule("w4a16")])
    params, x = {"w": weights(0, 40, 5, fan=40)}, normal(1, 2, 40)
    fake = jax.jit(jq.fake_quantized(lambda p, x: jnp.tanh(x @ p["w"]), recipe))
    dx = jax.grad(lambda x: fake(params, x).sum())(x)
    direction = normal(2, 2, 40)
    step = 1e-2
    above, below = (float(fake(params, x + s * direction).sum()) for s in (step, -step))
    np.testing.assert_allclose((dx * direction).sum(), (above - below) / (2 * step), rtol=2e-3)


def test_gradients_have_the_dtype_of_what_they_are_of() -> None:
    many = Many(PROGRAMS["bfloat16"])

    def grads(params: Any, x: Any) -> Any:
        state = jq.init_quant_state(many.fn, params, many.recipe, x)

        def loss(params: Any, learned: Any, x: Any) -> Any:
            now = dataclasses.replace(state, learned=learned)
            y, _ = jq.fake_quantized(many.fn, many.recipe)(params, x, quant_state=now)
            return sum(a.astype(jnp.float32).sum() for a in y.values())

        return jax.grad(loss, (0, 1, 2))(params, state.learned, x), (params, state.learned, x)

    got, want = jax.eval_shape(grads, many.params, *many.args)
    kinds = [jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (got, want)]
    assert kinds[0] == kinds[1]
