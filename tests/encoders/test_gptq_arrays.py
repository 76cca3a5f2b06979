"""GPTQ on arrays of any shape, and what it says of input it cannot use."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import PerBlock, PerChannel, PerGroup, PerTensor, QSpec
from jaxquant.encoders import Encoder, from_matrix, gptq, rtn, to_matrix
from jaxquant.observers import Inputs, input_stats, inputs
from tests.encoders.test_gptq import moments, rows, weights


def error(info):
    return np.asarray(info.details["output_error"])


def test_it_is_a_value():
    assert isinstance(gptq(), Encoder) and gptq() == gptq() and gptq() != gptq(damping=0.1)
    assert len({gptq(), gptq(), gptq(act_order=True)}) == 2
    assert gptq().observer == inputs() and isinstance(gptq().observer, Inputs)


def matrix_of(w, stats, spec, **options):
    """The encoder on the matrix view, back in the array's own order."""
    matrix = jax.jit(to_matrix, static_argnums=1)(w, stats.axes)
    plain = dataclasses.replace(stats, axes=(-2,))
    q, _ = gptq(**options)(matrix, spec, stats=plain)
    return jax.jit(lambda q: from_matrix(jq.dequantize(q), w.shape, stats.axes))(q)


@pytest.mark.parametrize(
    ("shape", "axes", "spec", "view"),
    [
        ((4, 18, 10), (-3, -2), QSpec("int4", PerChannel(2)), QSpec("int4", PerChannel(1))),
        (
            (4, 18, 10),
            (-3, -2),
            QSpec("int4", PerGroup(16, (0, 1))),
            QSpec("int4", PerGroup(16, 0)),
        ),
        ((72, 2, 5), (-3,), QSpec("int4", PerGroup(16, 0)), QSpec("int4", PerGroup(16, 0))),
        (
            (3, 3, 8, 10),
            (-4, -3, -2),
            QSpec("uint4", PerGroup(24, (0, 1, 2)), symmetric=False),
            QSpec("uint4", PerGroup(24, 0), symmetric=False),
        ),
        ((10, 72), (-1,), QSpec("int4", PerGroup(16, 1)), QSpec("int4", PerGroup(16, 0))),
    ],
)
@pytest.mark.parametrize("act_order", [False, pytest.param("dynamic", marks=pytest.mark.slow)])
def test_any_axes_may_be_contracted(shape, axes, spec, view, act_order):
    w = weights(72, 10).reshape(-1)[: np.prod(shape)].reshape(shape)
    stats = moments(rows(72), axes)
    wanted = matrix_of(w, stats, view, act_order=act_order)
    for storage_last_axes in ((), axes) if not act_order else (axes,):
        q, _ = gptq(act_order=act_order)(w, spec, stats=stats, storage_last_axes=storage_last_axes)
        assert q.validate().shape == shape
        np.testing.assert_allclose(jq.dequantize(q), wanted, rtol=1e-5, atol=1e-6)


def test_groups_may_run_over_the_axes_in_another_order():
    w, x = weights(72, 10).reshape(4, 18, 10), rows(72)
    swapped = x.reshape(-1, 4, 18).transpose(0, 2, 1).reshape(-1, 72)
    spec = QSpec("int4", PerGroup(16, (1, 0)))
    a, _ = gptq()(w, spec, stats=moments(x, (-3, -2)))
    b, _ = gptq()(w, spec, stats=moments(swapped, (-2, -3)))
    np.testing.assert_allclose(jq.dequantize(a), jq.dequantize(b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "act_order", [*(pytest.param(o, marks=pytest.mark.slow) for o in (False, "static")), "dynamic"]
)
def test_experts_and_layers_are_encoded_one_by_one(act_order):
    w = weights(6 * 40, 8).reshape(2, 3, 40, 8)
    x = np.stack([rows(40, seed) for seed in range(6)]).reshape(2, 3, -1, 40)
    stats = moments(x, (-2,), (-3,))  # every axis before the rows' is one of their own
    spec = QSpec("int4", PerGroup(16, 1))
    encoder = gptq(act_order=act_order)
    q, info = encoder(w, spec, batch_axes=1, stats=stats)
    assert q.batch == (2,) and q.validate().shape == (2, 3, 40, 8) and error(info).shape == (2, 3)
    values = np.asarray(jq.dequantize(q))
    for at in np.ndindex(2, 3):
        one, said = encoder(w[at], QSpec("int4", PerGroup(16, 0)), stats=moments(x[at]))
        np.testing.assert_allclose(values[at], jq.dequantize(one), rtol=1e-5, atol=1e-6)
        assert error(info)[at] == pytest.approx(float(error(said)), rel=1e-4)


SLOW_SPECS = [
    QSpec("int4", PerChannel(())),
    QSpec("int4", PerBlock(8, 4)),
    QSpec("int4", PerGroup(24, 0), range="qmax", scale_dtype="bfloat16"),
    QSpec("int4", PerGroup(24, 0), scale_dtype="float16"),
    QSpec("float8_e5m2", PerGroup(24, 0)),
    QSpec("float6_e2m3fn", PerGroup(24, 0)),
    QSpec("nf4", PerGroup(24, 0), double=True),
]


@pytest.mark.parametrize(
    "spec",
    [
        QSpec("int4", PerTensor()),
        QSpec("int4", PerChannel((0, 1))),
        QSpec("int4", PerGroup(4, 1)),
        QSpec("int4", PerGroup(24, 0), range="signed"),
        QSpec("float8_e4m3fn", PerChannel(1)),
        QSpec("mxfp4").at((0,), 2),
        QSpec("nvfp4").at((0,), 2),
        QSpec(
            jq.numerics.codebook_format([-1, -0.3, -0.1, 0.1, 0.2, 0.9], "mine"), PerGroup(24, 0)
        ),
        *(pytest.param(spec, marks=pytest.mark.slow) for spec in SLOW_SPECS),
    ],
    ids=str,
)
def test_every_spec_beats_round_to_nearest(spec):
    w, stats = weights(72, 24), moments(rows(72))
    plain, _ = rtn()(w, spec)
    d = np.asarray(jq.dequantize(plain)) - w
    h = np.asarray(stats.hessian)
    bound = np.sum(d * (h @ d)) / np.sum(w * (h @ w))
    for options in ({}, {"act_order": "dynamic", "grid": "hessian"}):
        q, info = gptq(**options)(w, spec, stats=stats)
        assert jax.tree.structure(q.validate()) == jax.tree.structure(plain)
        assert bound == 0 or 0 < error(info) < 0.8 * bound
        d = np.asarray(jq.dequantize(q)) - w  # what is stored is what was computed with
        assert error(info) == pytest.approx(np.sum(d * (h @ d)) / np.sum(w * (h @ w)), rel=1e-3)
        assert info.sqnr_db > 0


@pytest.mark.parametrize("order", [False, "static", "dynamic"])
def test_it_traces(order):
    w, stats, spec = weights(40, 8), moments(rows(40)), QSpec("int4", PerGroup(16, 0))
    encoder = gptq(act_order=order)
    q, info = encoder(w, spec, stats=stats, storage_last_axes=(0,))
    again, said = jax.jit(lambda w, s: encoder(w, spec, stats=s, storage_last_axes=(0,)))(w, stats)
    np.testing.assert_array_equal(q.codes, again.codes)
    np.testing.assert_array_equal(q.scale, again.scale)
    assert float(error(info)) == pytest.approx(float(error(said)), rel=1e-5)


def test_low_precision_weights():
    w, stats, spec = weights(40, 8), moments(rows(40)), QSpec("int4", PerGroup(16, 0))
    w = w.astype(jnp.bfloat16)
    q, _ = gptq()(w, spec, stats=stats)
    wide, _ = gptq()(np.asarray(w, np.float32), spec, stats=stats)
    assert q.dtype == "bfloat16" and jax.eval_shape(jq.dequantize, q).dtype == jnp.bfloat16
    np.testing.assert_array_equal(q.codes, wide.codes)


def count(jaxpr):
    total = 0
    for eqn in jaxpr.eqns:
        inner = [p for p in jax.tree.leaves(dict(eqn.params), is_leaf=is_jaxpr) if is_jaxpr(p)]
        total += 1 + sum(count(getattr(p, "jaxpr", p)) for p in inner)
    return total


def is_jaxpr(p):
    return hasattr(p, "eqns") or hasattr(p, "jaxpr")


@pytest.mark.parametrize("order", [False, "static", "dynamic"])
def test_the_program_does_not_grow(order):
    def size(k, layers):
        spec = QSpec("int4", PerGroup(16, 0))
        stats = jax.eval_shape(lambda x: jax.vmap(moments)(x), jnp.zeros((layers, 9, k)))
        fn = lambda w, s: gptq(act_order=order)(w, spec, batch_axes=1, stats=s)
        return count(jax.make_jaxpr(fn)(jnp.zeros((layers, k, 8)), stats).jaxpr)

    # from more than one block on
    assert size(256, 2) == size(1024, 5)


# --------------------------------------------------------------------------------------------------
# Statistics that are less than one would wish


@pytest.mark.parametrize("dead", ["zero", "nearest"])
@pytest.mark.parametrize("order", [False, "static", "dynamic"])
def test_dead_inputs(dead, order):
    x, w, spec = rows(40), weights(40, 8), QSpec("int4", PerGroup(16, 0))
    gone = np.array([3, 17, 18, 39])
    x[:, gone] = 0.0
    q, info = gptq(dead=dead, act_order=order)(w, spec, stats=moments(x))
    assert int(info.details["dead"]) == 4
    values = np.asarray(jq.dequantize(q))
    if dead == "zero":
        assert (values[gone] == 0).all()
    else:
        plain = np.asarray(jq.dequantize(rtn()(w, spec)[0]))
        # on grids of other weights beside them, so not the same error, but no more than twice it
        assert np.square(values - w)[gone].mean() <= 4 * np.square(plain - w).mean()


def test_an_expert_without_rows_is_rounded_to_nearest():
    w = weights(2 * 40, 8).reshape(2, 40, 8)
    x = np.stack([rows(40), np.zeros_like(rows(40))])
    spec = QSpec("int4", PerGroup(16, 1))
    with pytest.warns(UserWarning, match="0 calibration rows for 40 columns, for 1 of 2 matrices"):
        q, info = gptq(grid="range")(w, spec, stats=moments(x, (-2,), (-3,)))
    plain, _ = rtn()(w[1], QSpec("int4", PerGroup(16, 0)))
    np.testing.assert_allclose(np.asarray(jq.dequantize(q))[1], jq.dequantize(plain), rtol=1e-6)
    assert info.details["dead"].tolist() == [0, 40] and np.isfinite(error(info)).all()


def test_damping_rises_by_itself():
    x = np.ones((80, 40), np.float32) * 1e3  # rank one
    q, info = gptq(damping=0.0)(weights(40, 8), QSpec("int4", PerChannel(1)), stats=moments(x))
    assert 0 < float(info.details["damping"]) < 1.0
    assert np.isfinite(error(info)) and np.isfinite(jq.dequantize(q)).all()
    _, info = gptq()(weights(40, 8), QSpec("int4", PerChannel(1)), stats=moments(rows(40)))
    assert float(info.details["damping"]) == pytest.approx(0.01)


def test_indefinite_moments_are_damped():
    stats = moments(rows(40))
    twisted = np.array(stats.hessian)
    twisted[0, 1] = twisted[1, 0] = 3 * np.sqrt(twisted[0, 0] * twisted[1, 1])
    stats = dataclasses.replace(stats, hessian=jnp.asarray(twisted))
    _, info = gptq()(weights(40, 8), QSpec("int4", PerChannel(1)), stats=stats)
    assert float(info.details["damping"]) > 0.01 and np.isfinite(error(info))


def test_few_rows_are_told():
    spec = QSpec("int4", PerChannel(1))
    with pytest.warns(UserWarning, match="12 calibration rows for 40 columns"):
        gptq()(weights(40, 8), spec, stats=moments(rows(40, count=12)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gptq()(weights(40, 8), spec, stats=moments(rows(40, count=40)))
        jax.jit(lambda w, s: gptq()(w, spec, stats=s))(weights(40, 8), moments(rows(40, count=12)))


def test_refusals():
    w, spec, stats = weights(40, 8), QSpec("int4", PerChannel(1)), moments(rows(40))
    with pytest.raises(ValueError, match="expected stats="):
        gptq()(w, spec)
    with pytest.raises(ValueError, match="expected InputStats, got dict"):
        gptq()(w, spec, stats={})
    observer = inputs(hessian=False)
    less = input_stats(jax.jit(lambda x: observer.update(observer.init(x), x))(rows(40)))
    with pytest.raises(ValueError, match="gather them with inputs"):
        gptq()(w, spec, stats=less)
    with pytest.raises(ValueError, match=r"second moments \[8, 8\] .* got \[40, 40\]"):
        gptq()(w.T, spec, stats=stats)
    with pytest.raises(ValueError, match="axis -3 of an array of shape"):
        gptq()(w, spec, stats=moments(rows(40), (-3,)))
    with pytest.raises(ValueError, match="that differ"):
        gptq()(w, spec, stats=moments(rows(40), (-2, -2)))
    with pytest.raises(ValueError, match="expected a float array"):
        gptq()(np.zeros((40, 8), np.int32), spec, stats=stats)
    bad = w.copy()
    bad[0, 0] = np.nan
    with pytest.raises(ValueError, match="non-finite values in the weight"):
        gptq()(bad, spec, stats=stats)
    twisted = np.array(stats.hessian)
    twisted[1, 2] = np.inf
    broken = dataclasses.replace(stats, hessian=jnp.asarray(twisted))
    with pytest.raises(ValueError, match=r"non-finite values in the second moments .*\[40, 40\]"):
        gptq()(w, spec, stats=broken)
    for options, words in (
        ({"damping": -1.0}, "damping"),
        ({"damping": float("nan")}, "damping"),
        ({"block": 0}, "block"),
        ({"shrinkage": 1.5}, "shrinkage"),
        ({"act_order": "desc"}, "act_order"),
        ({"grid": "best"}, "grid"),
        ({"dead": "keep"}, "dead"),
    ):
        with pytest.raises(ValueError, match=words):
            gptq(**options)
