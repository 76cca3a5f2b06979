"""`ptq`: recipe and params in, quantized params and a report out; mistakes named before work."""

from __future__ import annotations

import re

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq


def fn(p, x):
    h = jnp.tanh(x @ p["enc"]["w"] + p["enc"]["b"])
    return h @ p["head"]["w"]


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    w, head = rng.standard_normal((32, 64)), rng.standard_normal((64, 8))
    enc = {"w": jnp.asarray(w, jnp.float32), "b": jnp.zeros((1, 64))}
    return {"enc": enc, "head": {"w": jnp.asarray(head, jnp.float32)}}


x = jnp.ones((4, 32))


def test_every_leaf_is_in_the_report(params) -> None:
    qparams, report = jq.ptq(fn, params, jq.w8a8(), x)
    assert [leaf.path for leaf in report.leaves] == ["enc/b", "enc/w", "head/w"]
    assert not report["enc/b"].quantized
    assert "add" in report["enc/b"].action
    assert report["enc/w"].sqnr_db > 40
    assert report.bytes_after == sum(
        leaf.nbytes
        for leaf in jax.tree.leaves(qparams, is_leaf=lambda a: isinstance(a, jq.QTensor))
    )
    assert isinstance(qparams["enc"]["b"], jax.Array)


def test_the_first_rule_that_matches_wins(params) -> None:
    recipe = jq.Recipe(
        [jq.Rule("head/*", skip=True), jq.Rule("enc/*", weights=jq.int4(group=8)), *jq.w8a8().rules]
    )
    qparams, report = jq.ptq(fn, params, recipe, x)
    assert qparams["enc"]["w"].spec.format.name == "int4"
    assert isinstance(qparams["head"]["w"], jax.Array)
    assert "skip" in report["head/w"].action


def test_bad_recipes_are_named(params) -> None:
    with pytest.raises(ValueError, match="decoder"):
        jq.ptq(fn, params, jq.Recipe([jq.Rule("decoder/**", weights=jq.int8())]), x)
    with pytest.raises(ValueError, match="group size"):
        jq.ptq(fn, params, jq.w4a16(group=0), x)
    with pytest.raises(ValueError, match="int99"):
        jq.QSpec("int99")
    with pytest.raises(ValueError, match="asymmetric"):
        jq.QSpec("nf4", symmetric=False)
    out_of_range = jq.Recipe([jq.Rule("enc/w", weights=jq.QSpec("int8", jq.PerChannel(2)))])
    with pytest.raises(ValueError, match=r"enc/w.*axis 2"):
        jq.ptq(fn, params, out_of_range, x)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_weights_are_named(params, bad) -> None:
    broken = {**params, "head": {"w": params["head"]["w"].at[3, 2].set(bad)}}
    with pytest.raises(ValueError, match="head/w"):
        jq.ptq(fn, broken, jq.w8a8(), x)


def test_params_that_do_not_fit(params) -> None:
    with pytest.raises(ValueError, match=r"cannot be traced.*'head'"):
        jq.ptq(fn, {"enc": params["enc"]}, jq.w8a8(), x)


def test_nothing_to_quantize(params) -> None:
    with pytest.raises(ValueError, match="nothing to quantize"):
        jq.ptq(lambda p, x: x + p["enc"]["b"].sum(), params, jq.w8a8(), x)
    with pytest.raises(ValueError, match="nothing"):
        jq.ptq(lambda p, x: x * 2, params, jq.w8a8(), x)


def test_a_dtype_that_cannot_be_quantized() -> None:
    only_ints = {"w": jnp.ones((4, 4), jnp.int32)}
    with pytest.raises(ValueError, match="w"):
        jq.ptq(lambda p, x: x @ p["w"], only_ints, jq.w8a8(), jnp.ones((2, 4), jnp.int32))


def test_what_is_quantized_already_stays(params) -> None:
    once, _ = jq.ptq(fn, params, jq.Recipe([jq.Rule("enc/w", weights=jq.int8())]), x)
    twice, report = jq.ptq(fn, once, jq.Recipe([jq.Rule("head/*", weights=jq.int4())]), x)
    assert twice["enc"]["w"].spec == once["enc"]["w"].spec
    assert "already" in report["enc/w"].action


def test_the_same_codes_under_jit_and_from_shapes(params) -> None:
    eager, _ = jq.ptq(fn, params, jq.w4a16(group=16), x)
    sites = jq.trace(fn, params, x)
    jitted = jax.jit(lambda p: jq.quantize_params(p, jq.w4a16(group=16), sites=sites)[0])(params)
    chex.assert_trees_all_equal(eager, jitted)
    shapes = jax.eval_shape(lambda: params)
    abstract, report = jq.ptq(fn, shapes, jq.w4a16(group=16), x)
    assert jax.tree.structure(abstract) == jax.tree.structure(eager)
    assert jax.tree.map(lambda a: a.shape, abstract) == jax.tree.map(lambda a: a.shape, eager)
    assert report.bytes_after == jq.ptq(fn, params, jq.w4a16(group=16), x)[1].bytes_after


def test_stochastic_rounding_needs_its_key_and_repeats(params) -> None:
    recipe = jq.Recipe([jq.Rule("**", weights=jq.int4(), encoder=jq.encoders.rtn(stochastic=True))])
    first, _ = jq.ptq(fn, params, recipe, x, key=jax.random.key(1))
    again, _ = jq.ptq(fn, params, recipe, x, key=jax.random.key(1))
    other, _ = jq.ptq(fn, params, recipe, x, key=jax.random.key(2))
    chex.assert_trees_all_equal(first, again)
    assert not np.array_equal(first["head"]["w"].codes, other["head"]["w"].codes)


@pytest.mark.parametrize("recipe", [jq.w8a16(), jq.w4a16(group=16), jq.nf4(group=16)], ids=repr)
def test_float16_is_computed_in_bfloat16_on_a_tpu_and_the_report_says_so(params, recipe) -> None:
    half = jax.tree.map(lambda a: a.astype(jnp.float16), params)
    rows = x.astype(jnp.float16)
    qparams, report = jq.ptq(fn, half, recipe, rows, platforms=["cpu", "tpu"])
    policy = [e for e in report.events if e.kind == "compute dtype"]
    assert [e.where for e in policy] == ["tpu"]
    assert re.search("bfloat16", policy[0].message)
    for platform, dtype in (("tpu", "bf16"), ("cuda", "f16")):
        made = jax.export.export(jax.jit(jq.quantized(fn)), platforms=[platform])(qparams, rows)
        dots = re.findall(r"dot_general.*: \(tensor<[0-9x]*x(\w+)>", made.mlir_module())
        assert dots == [dtype] * 2
        assert made.out_avals[0].dtype == jnp.float16


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (1, 1), (1, 8), (8, 1)])
@pytest.mark.parametrize("recipe", [jq.w8a8(), jq.w4a16(group=4), jq.nf4(group=4)], ids=repr)
def test_degenerate_shapes(shape: tuple[int, int], recipe: jq.Recipe) -> None:
    # a weight in which every value would need its own scale is kept: hence the second one
    two = lambda p, x: (x @ p["w"], jnp.ones((3, 16)) @ p["v"])
    params = {"w": jnp.ones(shape), "v": jnp.ones((16, 4))}
    rows = jnp.ones((3, shape[0]))
    qparams, report = jq.ptq(two, params, recipe, rows)
    got = jax.jit(jq.quantized(two))(qparams, rows)
    # all values equal the largest, which int4 with half a step to spare holds to 1 / 15
    jax.tree.map(lambda g, y: np.testing.assert_allclose(g, y, rtol=0.07), got, two(params, rows))
    assert np.isfinite(got[0]).all()
    str(report)


@pytest.mark.parametrize("recipe", [jq.w8a8, "w8a8", None, [jq.w8a8()]], ids=range(4))
def test_recipes_are_checked_before_any_work(recipe) -> None:
    with pytest.raises(ValueError, match=r"^ptq: expected a Recipe such as"):
        jq.ptq(None, None, recipe, x)


def test_rules_make_a_recipe_and_swapped_arguments_are_named(params) -> None:
    rule = jq.Rule("head/*", weights=jq.int8())
    for given in (rule, [rule], jq.Recipe([rule])):
        assert jq.ptq(fn, params, given, x)[1].quantized == 1
    with pytest.raises(ValueError, match="ptq: got a Recipe for params"):
        jq.ptq(fn, jq.w8a8(), params, x)
    with pytest.raises(ValueError, match="expected a function"):
        jq.ptq(params, params, jq.w8a8(), x)


def test_platforms(params) -> None:
    half = jax.tree.map(lambda a: a.astype(jnp.float16), params)
    rows = x.astype(jnp.float16)
    _, report = jq.ptq(fn, half, jq.w8a16(), rows, platforms="tpu")
    assert [e.where for e in report.events] == ["tpu"]
    assert not jq.ptq(fn, half, jq.w8a16(), rows, platforms=["gpu", "cpu"])[1].events
    with pytest.raises(ValueError, match="unknown platform 'tpuv5'; known: cpu, cuda, rocm, tpu"):
        jq.ptq(fn, half, jq.w8a16(), rows, platforms=["tpuv5"])


def test_attention_is_in_the_report() -> None:
    def attend(p, x):
        h = x @ p["w"]
        return jax.nn.softmax(h @ h.T) @ h

    w = {"w": jnp.eye(8)}
    rows = jnp.ones((4, 8))
    _, report = jq.ptq(attend, w, jq.w8a8(), rows)
    assert [name for _, name in report.attention] == ["int8", "int8"]
    assert "attention: 2 contractions int8 (" in str(report)
    _, report = jq.ptq(attend, w, jq.w8a16(), rows)
    assert "attention: 2 contractions left float (" in str(report)


def test_an_event_says_everything_once() -> None:
    p = {"w": jnp.ones((8, 8)), "v": jnp.ones((8, 8))}
    rows = jnp.ones((2, 8))
    _, report = jq.ptq(lambda p, x: x @ p["w"] + (p["w"] * x[:1]).sum(), p, jq.w8a8(), rows)
    assert str(report.events[0]) == "dequantized by mul at w: in the root"


def test_codebooks_of_ones_own(params) -> None:
    ternary = jq.numerics.codebook_format([-1.0, 0.0, 1.0], name="ternary")
    rule = jq.Rule("head/*", weights=jq.QSpec(ternary, jq.PerGroup(16)))
    assert jq.ptq(fn, params, rule, x)[1]["head/w"].action == "ternary in groups of 16"
    with pytest.raises(ValueError, match="codebook_format"):
        jq.QSpec([-1, 0, 1])
