"""What the interpreter concludes of values: signs, parameters, and what it must report."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant as jq
from jaxquant.interpret.values import known_nonneg
from tests.arrays import array

from .programs import normal, stack, w, x


def call(fn, params, recipe, *args):
    qparams, report = jq.ptq(fn, params, recipe, *args)
    return qparams, report, jax.jit(jq.quantized(fn))(qparams, *args)


def by_size(h):
    _, values = lax.sort_key_val(jnp.abs(h), h)
    return values @ values.T


def behind_a_barrier(h):
    _, b = jax.checkpoint(lambda h: lax.optimization_barrier((jnp.abs(h), h)))(h)
    return b @ b.T


def wrapped(h):
    codes = jnp.floor(jnp.abs(h) * 200).astype(jnp.uint8).astype(jnp.int8)
    return codes.astype(jnp.float32) @ codes.astype(jnp.float32).T


@pytest.mark.parametrize("after", [by_size, behind_a_barrier, wrapped])
def test_values_that_may_be_negative_keep_their_sign(after) -> None:
    fn = lambda p, x: after(x @ p["w"])
    _, _, got = call(fn, {"w": w}, jq.w8a8(), 3 * x)
    _, _, want = call(fn, {"w": w}, jq.w8a8(attention=False), 3 * x)
    assert np.linalg.norm(got - want) <= 0.02 * np.linalg.norm(want)


def test_softmax_gets_unsigned_codes_which_are_finer() -> None:
    def fn(p, x):
        h = x @ p["w"]
        return jax.nn.softmax(h @ h.T, where=None) @ h

    _, _, got = call(fn, {"w": w}, jq.w8a8(), x)
    _, _, want = call(fn, {"w": w}, jq.w8a8(attention=False), x)
    assert np.linalg.norm(got - want) <= 0.02 * np.linalg.norm(want)


@pytest.mark.parametrize(("value", "known"), [(0.0, True), (2.0, True), (-1.0, False)])
def test_the_sign_of_a_literal(value: float, known: bool) -> None:
    (eqn,) = jax.make_jaxpr(lambda x: lax.max(x, value))(1.0).eqns
    assert [known_nonneg({}, v) for v in eqn.invars] == [False, known]


@pytest.mark.parametrize("index", [-40, -4, -1, 1, 9])
def test_a_dynamic_index_out_of_range_is_clamped_as_in_float(index: int) -> None:
    fn = lambda p, x, i: x @ lax.dynamic_index_in_dim(p["w"], i, 0, keepdims=False)
    qparams, _, got = call(fn, {"w": stack}, jq.w8a16(), x, jnp.int32(index))
    want = fn(jq.dequantize_params(qparams), x, jnp.int32(index))
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_a_product_of_parameters_is_nobodys_site() -> None:
    fn = lambda p, x: x @ (p["w"] + p["a"] @ p["b"]) + x @ p["v"]
    params = {"w": w, "v": w, "a": normal(60, 16, 4), "b": normal(61, 4, 32)}
    found = jq.trace(fn, params, x)
    assert list(found) == ["v"]
    assert found.met["a"] == found.met["b"] == "dot_general"


def test_each_call_of_a_jitted_helper_is_reported_for_itself() -> None:
    def fn(p, x):
        return x @ p["w"] + x @ p["v"], x @ jnp.tril(p["w"]), x @ jnp.tril(p["v"])

    _, report, _ = call(fn, {"w": w, "v": w}, jq.w8a8(), x)
    assert {e.where for e in report.events} == {"w", "v"}


@pytest.mark.parametrize(
    ("weights", "on_integers"),
    [
        (jq.int4(group=4), True),
        (jq.int8(), True),
        (jq.QSpec("nf4", jq.PerGroup(8)), False),
        (jq.QSpec("int8", jq.PerChannel((0, 1))), False),
    ],
    ids=repr,
)
def test_what_was_to_run_on_integers_and_does_not_is_reported(weights, on_integers) -> None:
    fn = lambda p, x: x @ p["w"]
    recipe = jq.Recipe([jq.Rule("**", weights=weights, activations=jq.int8())])
    _, report, _ = call(fn, {"w": w}, recipe, x)
    assert [e.kind for e in report.events] == ([] if on_integers else ["contracted in float"])


@pytest.mark.parametrize("traced", ["input", "parameter"])
def test_a_scalar_factor_has_its_gradient(traced: str) -> None:
    def fn(p, x, t):
        return x @ (p["w"] * (t if traced == "input" else p["t"])) + x @ p["w"]

    params = {"w": w, "t": jnp.float32(2.0)}
    qparams, _, _ = call(fn, params, jq.w8a16(), x, jnp.float32(2.0))

    def loss(fn, params, t):
        return jnp.sum(jnp.sin(fn({**params, "t": t}, x, t)))

    got = jax.grad(lambda t: loss(jq.quantized(fn), qparams, t))(2.0)
    want = jax.grad(lambda t: loss(fn, jq.dequantize_params(qparams), t))(2.0)
    np.testing.assert_allclose(got, want, rtol=1e-3)


def test_only_params_handed_on_whole_come_out_quantized() -> None:
    fn = lambda p, x: (p["w"], p["w"] * 0.5, p["w"][::-1], p["w"].T, x @ p["w"])
    _, _, out = call(fn, {"w": normal(62, 16, 16)}, jq.w8a16(), x)
    assert [isinstance(o, jq.QTensor) for o in out] == [True, False, False, False, False]


@pytest.mark.parametrize("axis", [0, 1])
def test_stacked_parameters_stay_quantized(axis: int) -> None:
    spec = "bd,edf->ebf" if axis == 0 else "bd,def->ebf"
    fn = lambda p, x: jnp.einsum(spec, x, jnp.stack([p["a"], p["b"]], axis))
    qparams, report, got = call(fn, {"a": w, "b": 2 * w}, jq.w8a16(), x)
    assert [leaf.quantized for leaf in report.leaves] == [True, True]
    assert not report.events
    want = fn(jq.dequantize_params(qparams), x)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spec", ["int8", "int4", "nf4", "float8_e4m3fn"])
@pytest.mark.parametrize("size", [1e-30, 1e30, 1e37])
def test_very_large_and_small_weights_keep_their_precision(spec: str, size: float) -> None:
    spec = jq.QSpec(spec, jq.PerTensor())
    plain = jq.dequantize(jq.quantize(w, spec))
    scaled = jq.dequantize(jq.quantize(w * size, spec))
    np.testing.assert_allclose(scaled / size, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6", "mxfp8", "nvfp4"])
def test_float16_does_not_overflow_where_a_scale_is_rounded_up(name: str) -> None:
    fn = lambda p, x: x @ p["w"]
    rng = np.random.default_rng(0)
    big = array(rng.uniform(0.1, 1, (256, 8)) * 65000, jnp.float16)
    small = array(rng.standard_normal((4, 256)) * 1e-3, jnp.float16)
    recipe = jq.Recipe([jq.Rule("**", weights=jq.QSpec(name))])
    qparams, _, got = call(fn, {"w": big}, recipe, small)
    want = small.astype(jnp.float32) @ jq.dequantize(qparams["w"], jnp.float32)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=2e-2, atol=8.0)


@pytest.mark.parametrize("params", [{"w": [w]}, {"w": w[:5]}, [w], None], ids=type)
def test_params_of_another_structure(params) -> None:
    with pytest.raises(ValueError, match="cannot be traced"):
        jq.ptq(lambda p, x: x @ p["w"], params, jq.w8a8(), x)
