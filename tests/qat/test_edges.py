"""What is easily lost: NaN, derivative rules, codes of static activations, half-way states."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax

import jaxquant as jq
from jaxquant.ops import training
from tests.arrays import normal

TENSOR = jq.QSpec("int8", jq.PerTensor())
AVERAGE = jq.observers.moving_average()
LSQ = jq.Rule("**", weights=jq.int4(), activations=TENSOR, activation_estimator=jq.ste.lsq())
STATIC = jq.Rule("**", weights=jq.int8(), activations=TENSOR, observer=AVERAGE)


def fn(params: Any, x: Array) -> Array:
    return jnp.tanh(x @ params["a"]) @ params["b"]


def changed(a: Array, at: Any, value: float) -> Array:
    """`a.at[at].set(value)`, in NumPy."""
    a = np.array(a)
    a[at] = value
    return jax.device_put(a)


A, B = (np.asarray(normal(seed, *shape)) for seed, shape in enumerate([(32, 16), (16, 4)]))
PARAMS = jax.device_put({"a": A / 6, "b": B / 4})
X = normal(2, 256, 32)  # enough values for XLA's vectorized maximum, which loses NaN


@pytest.mark.parametrize("place", [0, 4000, 8191])
@pytest.mark.parametrize("recipe", [jq.w8a8(), jq.int8_training(), STATIC, LSQ], ids=str)
def test_nan_is_seen(recipe: Any, place: int) -> None:
    state = jq.init_quant_state(fn, PARAMS, recipe, X)
    fake = jq.fake_quantized(fn, recipe)
    bad = changed(X, divmod(place, 32), np.nan)
    y, new = jax.jit(fake)(PARAMS, bad, quant_state=state)
    assert np.isnan(np.asarray(y)[place // 32]).all()
    assert all(int(r["bad"]) == 1 for r in new.ranges.values())
    if recipe in (STATIC, LSQ):  # others start from nothing that the example shows
        with pytest.raises(ValueError, match="not finite"):
            jq.init_quant_state(fn, PARAMS, recipe, bad)


def test_nan_in_what_is_trained_is_seen() -> None:
    rule = dataclasses.replace(LSQ, weight_estimator=jq.ste.lsq())
    state, fake = jq.init_quant_state(fn, PARAMS, rule, X), jax.jit(jq.fake_quantized(fn, rule))
    for leaf in range(len(jax.tree.leaves(state.learned))):
        flat, tree = jax.tree.flatten(state.learned)
        flat[leaf] = jax.device_put(np.full_like(flat[leaf], np.nan))
        lost = dataclasses.replace(state, learned=jax.tree.unflatten(tree, flat))
        assert np.isnan(fake(PARAMS, X, quant_state=lost)[0]).any()
        with pytest.raises(ValueError, match="the learned array is not finite"):
            jq.convert(PARAMS, lost, rule)
    bad = {**PARAMS, "a": changed(PARAMS["a"], (3, 3), np.inf)}
    assert np.isnan(fake(bad, X, quant_state=state)[0]).any()


def test_int8_gradients_hold_nan() -> None:
    state = jq.init_quant_state(fn, PARAMS, jq.int8_training(), X)
    fake = jq.fake_quantized(fn, jq.int8_training())
    g = changed(np.ones((256, 4), np.float32), (200, 1), np.nan)
    grads = jax.jit(jax.grad(lambda p: (fake(p, X, quant_state=state)[0] * g).sum()))(PARAMS)
    assert all(np.isnan(a).any() for a in jax.tree.leaves(grads))


@jax.custom_vjp
def scaled(w: Array, x: Array) -> Array:
    return x @ w


scaled.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (1000 * r[1].T @ g, g @ r[0].T))


@pytest.mark.parametrize("schedule", [None, jq.Schedule(start=5)], ids=["rounds", "float"])
@pytest.mark.parametrize("rule", [jq.w8a8(), STATIC], ids=str)
def test_derivative_rules_are_kept(rule: Any, schedule: Any) -> None:
    params, run = {"w": PARAMS["a"]}, lambda p, x: scaled(p["w"], x)
    state = jq.init_quant_state(run, params, rule, X)
    fake = jq.fake_quantized(run, rule, schedule=schedule)
    grad = jax.jit(jax.grad(lambda p: fake(p, X, quant_state=state)[0].sum()))(params)["w"]
    want = np.broadcast_to(1000 * np.asarray(X).sum(0)[:, None], grad.shape)
    np.testing.assert_allclose(grad, want, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero", [False, True])
def test_weight_gradient_of_static_activations(bits: int, zero: bool) -> None:
    """`dw = x'^T Q(g)`, `x'` on the grid of the forward pass and not rounded once more."""
    spec = jq.QSpec(f"uint{bits}" if zero else f"int{bits}", jq.PerTensor(), symmetric=not zero)
    rule = jq.Rule(
        "**",
        weights=jq.int8(),
        activations=spec,
        observer=jq.observers.minmax(),
        gradients=jq.qtensor.Gradients(stochastic=False),
    )
    params = {"w": PARAMS["a"]}
    run = lambda p, x: x @ p["w"]
    state, fake = jq.init_quant_state(run, params, rule, X), jq.fake_quantized(run, rule)
    g = normal(5, 256, 16)
    got = jax.jit(jax.grad(lambda p: (fake(p, X, quant_state=state)[0] * g).sum()))(params)["w"]
    low, high = (float(f(np.asarray(X))) for f in (np.min, np.max))
    top = 2.0**bits - 1 if zero else 2.0 ** (bits - 1) - 1
    scale = (high - low) / top if zero else max(-low, high) / (top + 0.5)
    shift = round(-low / scale) if zero else 0
    least = 0 if zero else -top - 1
    rounded = scale * (np.clip(np.round(np.asarray(X) / scale) + shift, least, top) - shift)
    step = np.abs(np.asarray(g)).max(0) / 127.5
    want = rounded.T @ (step * np.clip(np.round(np.asarray(g) / step), -128, 127))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 * np.abs(want).max())


def test_sums_over_many_rows_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    state = jq.init_quant_state(fn, PARAMS, jq.int8_training(), X)
    fake = jq.fake_quantized(fn, jq.int8_training())
    grad = jax.grad(lambda p: fake(p, X, quant_state=state)[0].sum())
    whole = jax.jit(grad)(PARAMS)
    monkeypatch.setattr(training, "_ROWS", 100)
    parts = jax.jit(jax.grad(lambda p: fake(p, X, quant_state=state)[0].sum()))(PARAMS)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", [STATIC, LSQ], ids=str)
def test_layers_that_are_cut_before_a_scan(recipe: Any) -> None:
    params = {"w": normal(3, 4, 8, 8)}
    run = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"][1:])[0]
    with pytest.raises(ValueError, match=r"w.*expected activations for layers \[4\], got \[3\]"):
        jq.init_quant_state(run, params, recipe, normal(4, 5, 8))
    fake = jq.fake_quantized(run, jq.int8_training(jq.qtensor.Gradients(stochastic=False)))
    grads = jax.jit(jax.grad(lambda p: fake(p, normal(4, 5, 8)).sum()))(params)
    assert np.isfinite(grads["w"]).all()


def test_keys_of_any_kind() -> None:
    recipe = jq.int8_training()
    fake = jax.jit(jq.fake_quantized(fn, recipe))
    for key in (jax.random.key(1, impl="rbg"), jax.random.PRNGKey(1), jax.random.key(1)):
        state = jq.init_quant_state(fn, PARAMS, recipe, X, key=key)
        assert state.key.shape == (2,)
        fake(PARAMS, X, quant_state=state)
    for wrong in (0, jax.random.split(jax.random.key(0), 3)):
        with pytest.raises(ValueError, match="expected one PRNG key"):
            jq.init_quant_state(fn, PARAMS, recipe, X, key=wrong)


def test_half_way() -> None:
    rule = dataclasses.replace(LSQ, weight_estimator=jq.ste.lsq())
    state = jq.init_quant_state(fn, PARAMS, rule, X)
    schedule = jq.Schedule(bits=((0, 8), (10, 4)))
    with pytest.raises(ValueError, match=r"at step 0 .* last phase begins at step 10"):
        jq.convert(PARAMS, state, rule, schedule=schedule)
    there = dataclasses.replace(state, step=jax.device_put(np.int32(10)))
    jq.convert(PARAMS, there, rule, schedule=schedule)
    lost = dataclasses.replace(state, learned={"weights": {}, "activations": {}})
    with pytest.raises(ValueError, match=r"incomplete: learned/.*a/step is missing"):
        jq.convert(PARAMS, lost, rule)
    other = dataclasses.replace(rule, weights=jq.int8())
    with pytest.raises(ValueError, match="another recipe"):
        jq.qat.fake_quant_params(PARAMS, other, sites=jq.trace(fn, PARAMS, X), quant_state=state)
    assert len(repr(state)) < 200


@pytest.mark.parametrize(
    ("schedule", "recipe", "message"),
    [
        (jq.Schedule(freeze=5), LSQ, "no observer whose ranges could freeze"),
        (jq.Schedule(bits=((0, 4),)), jq.w8a8(), "no integer format of the recipe has fewer bits"),
    ],
    ids=["freeze", "bits"],
)
def test_schedules_that_would_do_nothing(schedule: Any, recipe: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jq.fake_quantized(fn, recipe, schedule=schedule)


def test_what_cannot_be_started_from() -> None:
    with pytest.raises(ValueError, match="expected arrays, since activation ranges start"):
        jq.init_quant_state(fn, PARAMS, LSQ, jax.ShapeDtypeStruct(X.shape, X.dtype))
    with pytest.raises(
        ValueError,
        match=r"^init_quant_state: the function cannot be traced .* takes 2 positional",
    ):
        jq.init_quant_state(fn, PARAMS, LSQ, X, X)
    encoder = dataclasses.replace(STATIC, encoder=jq.encoders.rtn(stochastic=True))
    with pytest.raises(ValueError, match="leave the encoder out"):
        jq.fake_quantized(fn, encoder)
