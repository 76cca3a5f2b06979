"""`quantized(fn)` under jit, grad, vmap, export, and beside the float function."""

from __future__ import annotations

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import jaxquant as jq

from .programs import PROGRAMS, helpers, mlp, normal, scan_remat, soft, sq, stack, v, w, x

GRADS = ["mlp", "jitted helper", "weight on the left", "tied both ways", "scan", "scan over remat"]
GRADS += ["several contracted axes", "batch axis", "recurrent", "attention", "convolutions"]


def quantized_program(name: str, recipe: jq.Recipe):
    program = PROGRAMS[name]
    qparams, _ = jq.ptq(program.fn, program.params, recipe, *program.args)
    return program, qparams


@pytest.mark.parametrize("name", GRADS)
def test_gradients_are_those_of_the_dequantized_weights(name: str) -> None:
    program, qparams = quantized_program(name, jq.w8a16())

    def loss(fn, params, arg):
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(fn(params, arg)))

    (arg,) = program.args

    def both(qparams, arg):
        dense = jq.dequantize_params(qparams)
        got = jax.grad(functools.partial(loss, jq.quantized(program.fn)), 1)(qparams, arg)
        return got, jax.grad(functools.partial(loss, program.fn), 1)(dense, arg)

    got, want = map(np.asarray, jax.jit(both)(qparams, arg))
    assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want)


def test_gradients_of_int8_activations_pass_straight_through() -> None:
    fn = lambda p, x: x @ p["w"]
    qparams, _ = jq.ptq(fn, {"w": w}, jq.w8a8(), x)
    g = normal(30, 4, 32)
    got = jax.jit(lambda x, g: jax.vjp(lambda x: jq.quantized(fn)(qparams, x), x)[1](g)[0])(x, g)
    want = np.asarray(g) @ np.asarray(jq.dequantize(qparams["w"])).T
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_float_leaves_beside_quantized_ones_train() -> None:
    fn = lambda p, x: jnp.tanh(x @ p["w"] + p["b"][None]) @ p["head"]
    params = {"w": w, "b": normal(31, 32), "head": v}
    recipe = jq.Recipe([jq.Rule("head", skip=True), jq.Rule("w", weights=jq.int8())])
    qparams, _ = jq.ptq(fn, params, recipe, x)
    trainable, fixed = jq.partition(qparams)

    def loss(trainable):
        return jnp.sum(jq.quantized(fn)(jq.combine(trainable, fixed), x) ** 2)

    got = jax.jit(jax.grad(loss))(trainable)
    dense = jq.dequantize_params(qparams)
    expected = jax.jit(jax.grad(lambda t: jnp.sum(fn({**dense, **t}, x) ** 2)))
    want = expected({"b": params["b"], "head": v})
    assert got["w"] is None
    np.testing.assert_allclose(got["b"], want["b"], rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(got["head"], want["head"], rtol=2e-3, atol=1e-3)


def test_asking_for_the_gradient_of_a_qtensor_raises() -> None:
    fn = lambda p, x: x @ p["w"]
    qparams, _ = jq.ptq(fn, {"w": w}, jq.w8a8(), x)
    with pytest.raises(TypeError, match="int8"):
        jax.grad(lambda q: jq.quantized(fn)(q, x).sum())(qparams)
    with pytest.raises(TypeError, match="partition"):
        jax.grad(lambda q: jq.quantized(fn)(q, x).sum(), allow_int=True)(qparams)


@pytest.mark.parametrize("name", ["mlp", "scan", "jitted helper", "tied both ways"])
def test_vmap_is_a_loop(name: str) -> None:
    program, qparams = quantized_program(name, jq.w8a8())
    fn = jq.quantized(program.fn)
    many = np.stack([x, 2 * np.asarray(x), np.asarray(x) - 1])
    got = jax.jit(jax.vmap(fn, (None, 0)))(qparams, many)
    one = jax.jit(fn)
    for i in range(3):
        want = one(qparams, many[i])
        near = lambda g, y, i=i: np.testing.assert_allclose(np.asarray(g)[i], y, atol=1e-5)
        jax.tree.map(near, got, want)


def test_vmap_over_models() -> None:
    models = {"w": np.stack([w, 2 * np.asarray(w)]), "v": np.stack([v, -np.asarray(v)])}
    one, _ = jq.ptq(mlp, {"w": w, "v": v}, jq.w8a8(), x)
    sites = jq.trace(mlp, {"w": w, "v": v}, x)
    make = lambda p: jq.quantize_params(p, jq.w8a8(), sites=sites)[0]
    both = jax.jit(jax.vmap(make))(models)
    assert jax.tree.map(lambda a: np.asarray(a)[0].tolist(), both) == jax.tree.map(
        lambda a: a.tolist(), one
    )
    got = jax.jit(jax.vmap(jq.quantized(mlp), (0, None)))(both, x)
    want = jax.jit(jq.quantized(mlp))(one, x)
    np.testing.assert_allclose(np.asarray(got)[0], want, atol=1e-6)


@pytest.mark.parametrize("recipe", [jq.w8a8(), jq.w4a16(group=8), jq.nf4(group=8)], ids=repr)
def test_export_with_a_symbolic_batch_and_back(recipe: jq.Recipe) -> None:
    qparams, _ = jq.ptq(mlp, {"w": w, "v": v}, recipe, x)
    rows = export.symbolic_shape("rows")[0]
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), qparams)
    made = export.export(jax.jit(jq.quantized(mlp)), platforms=["cpu", "cuda", "tpu"])(
        shapes, jax.ShapeDtypeStruct((rows, 16), jnp.float32)
    )
    again = export.deserialize(bytearray(made.serialize()))
    for n in (1, 5):
        batch = normal(40 + n, n, 16)
        want = jax.jit(jq.quantized(mlp))(qparams, batch)
        np.testing.assert_allclose(again.call(qparams, batch), want, rtol=1e-3, atol=1e-4)


def test_float_results_do_not_change_by_quantized_calls_in_either_order() -> None:
    params = {f"w{i}": np.asarray(stack)[0] * np.float32(i + 1) for i in range(4)}
    qparams, _ = jq.ptq(helpers, params, jq.w8a8(), x)

    def outcomes(order):
        jax.clear_caches()
        calls = {
            "float": lambda: jax.jit(helpers)(params, x),
            "quantized": lambda: jax.jit(jq.quantized(helpers))(qparams, x),
        }
        return {name: np.asarray(calls[name]()) for name in order}

    first = outcomes(["float", "quantized", "float"])
    second = outcomes(["quantized", "float", "quantized"])
    assert not np.array_equal(first["float"], first["quantized"])
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_a_helper_called_often_is_one_function_in_the_program() -> None:
    @jax.jit
    def block(x, w):
        return jnp.tanh(x @ w)

    def fn(p, x):
        for name in sorted(p):
            x = block(x, p[name])
        return x

    params = {f"w{i:02}": np.asarray(sq) * np.float32(1 + i / 10) for i in range(12)}
    qparams, _ = jq.ptq(fn, params, jq.w8a8(), x)
    text = jax.jit(jq.quantized(fn)).lower(qparams, x).as_text()
    assert len(re.findall(r"func\.func private @block", text)) == 1
    assert len(re.findall(r"call @block\(", text)) == 12
    assert text.count("stablehlo.dot_general") == 1


def test_loops_stay_loops_and_remat_stays_remat() -> None:
    qparams, _ = jq.ptq(scan_remat, {"w": stack}, jq.w8a8(), x)
    outer = jax.make_jaxpr(jq.quantized(scan_remat))(qparams, x)
    scans = [e for e in outer.jaxpr.eqns if e.primitive.name == "scan"]
    assert len(scans) == 1
    assert scans[0].params["length"] == 3
    assert "remat" in str(scans[0].params["jaxpr"]) or "checkpoint" in str(scans[0].params["jaxpr"])


def test_a_custom_rule_beside_a_site_is_kept() -> None:
    fn = lambda p, x: soft(x @ p["w"])
    big = jax.device_put(400 * np.asarray(x))
    qparams, _ = jq.ptq(fn, {"w": w}, jq.w8a8(), big)
    grads = jax.jit(jax.grad(lambda x: jq.quantized(fn)(qparams, x).sum()))(big)
    # without its rule, softplus has the gradient inf / inf there
    assert np.isfinite(grads).all()


def test_a_custom_rule_around_a_site_is_inlined_and_reported() -> None:
    program = PROGRAMS["custom_vjp with a site"]
    _, report = jq.ptq(program.fn, program.params, jq.w8a8(), *program.args)
    assert [e.kind for e in report.events] == ["inlined"]


def test_a_pallas_call_gets_the_dequantized_weight_and_the_report_says_so() -> None:
    from jax.experimental import pallas as pl

    def kernel(w_ref, o_ref):
        o_ref[...] = w_ref[...] * 2

    def fn(p, x):
        double = pl.pallas_call(
            kernel, out_shape=jax.ShapeDtypeStruct((16, 32), jnp.float32), interpret=True
        )
        return x @ double(p["w"]) + x @ p["w"]

    qparams, report = jq.ptq(fn, {"w": w}, jq.w8a16(), x)
    assert [(e.kind, e.where, e.primitive) for e in report.events] == [
        ("dequantized", "w", "pallas_call")
    ]
    w_ = np.asarray(jq.dequantize(qparams["w"]))
    want = np.asarray(x) @ (2 * w_) + np.asarray(x) @ w_
    np.testing.assert_allclose(jax.jit(jq.quantized(fn))(qparams, x), want, rtol=1e-3, atol=1e-3)


def test_quantized_params_come_out_as_they_went_in() -> None:
    fn = lambda p, x: (p, x @ p["w"])
    qparams, _ = jq.ptq(fn, {"w": w}, jq.w8a8(), x)
    out, _ = jax.jit(jq.quantized(fn))(qparams, x)
    assert jax.tree.structure(out) == jax.tree.structure(qparams)
    chex.assert_trees_all_equal(out, qparams)


def test_a_donated_cache_is_reused() -> None:
    def step(p, cache, x):
        return lax.dynamic_update_slice(cache, x @ p["w"], (0, 0))

    qparams, _ = jq.ptq(step, {"w": w}, jq.w8a8(), np.zeros((8, 32), np.float32), x)
    lowered = jax.jit(jq.quantized(step), donate_argnums=1).lower(
        qparams, np.zeros((8, 32), np.float32), x
    )
    assert "tf.aliasing_output" in lowered.as_text()


def test_without_a_qtensor_it_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="ptq"):
        jq.quantized(mlp)({"w": w, "v": v}, x)


def test_params_of_another_model_are_refused_by_name() -> None:
    qparams, _ = jq.ptq(mlp, {"w": w, "v": v}, jq.w8a8(), x)
    with pytest.raises(ValueError, match=r"cannot be traced.*'v'"):
        jq.quantized(mlp)({"w": qparams["w"]}, x)
