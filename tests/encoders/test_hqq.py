"""Half-quadratic quantization against a NumPy reference, and against round-to-nearest."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import PerBlock, PerChannel, PerGroup, PerTensor, QSpec, ops
from jaxquant.encoders import Encoder, hqq, rtn
from jaxquant.ops.activations import fake
from jaxquant.qtensor import ContractionConfig, storage_codes, with_contraction
from tests.arrays import array

codes_of = jax.jit(storage_codes)
rounded = jax.jit(fake, static_argnums=(1, 2))


def reference(w, qmin, qmax, iterations=20, p=0.7, beta=10.0, growth=1.01, gain=0.3):
    """Codes, scales and zero points of rows `[groups, n]`, in float64; each keeps its best."""

    def squares(z):
        q = np.clip(np.round(w * s + z), qmin, qmax)
        return ((w - (q - z) / s) ** 2).sum(1, keepdims=True)

    low, high = w.min(1, keepdims=True), w.max(1, keepdims=True)
    s = (qmax - qmin) / (high - low)
    z = first = qmin - low * s
    best, least, last = z, np.full(z.shape, np.inf), np.inf
    for _ in range(iterations + 1):
        q = np.clip(np.round(w * s + z), qmin, qmax)
        d = w - (q - z) / s
        off = np.maximum(np.abs(d), 1e-30)
        best, least = np.where(squares(z) < least, z, best), np.minimum(squares(z), least)
        error = np.abs(d).mean()
        stop, last = error >= last, error
        e = np.sign(d) * np.maximum(np.abs(d) - off ** (p - 1) / beta, 0)
        z, beta = (q - (w - e) * s).mean(1, keepdims=True), beta * growth
        if stop:
            break
    z = np.where(squares(best) < (1 - gain) * squares(np.round(first)), best, np.round(first))
    return np.clip(np.round(w * s + z), qmin, qmax), 1 / s, z


def heavy(*shape, seed=0):
    return (np.random.default_rng(seed).standard_t(4, shape) * 0.02).astype(np.float32)


@pytest.mark.parametrize("gain", [0.0, 0.3])
@pytest.mark.parametrize(
    ("name", "group", "times"),
    # small errors are all left out; of large ones the norm keeps a part
    [("uint4", 64, 1), ("uint3", 32, 1), ("int2", 64, 1), ("int2", 64, 30)],
)
def test_it_is_the_formula(name, group, times, gain):
    w = heavy(128, 24) * np.float32(times)
    spec = QSpec(name, PerGroup(group, 0), symmetric=False, zero_dtype="float32")
    q, info = hqq(gain=gain)(jnp.asarray(w), spec)
    q.validate()
    rows = w.T.reshape(-1, group).astype(np.float64)
    codes, scale, zero = reference(rows, spec.format.qmin, spec.format.qmax, gain=gain)
    np.testing.assert_allclose(np.asarray(q.scale).reshape(-1), scale[:, 0], rtol=1e-5)
    # where an error is a matter of rounding alone, float32 may keep another step's zero point
    assert np.mean(np.abs(np.asarray(q.zero_point).reshape(-1) - zero[:, 0]) < 1e-4) > 0.97
    assert np.mean(np.asarray(codes_of(q)).reshape(-1, group) == codes) > 0.99
    off = (w - np.asarray(jq.dequantize(q))) ** 2
    assert float(info.details["after"]) == pytest.approx(off.mean(), rel=1e-4)
    want = ((rows - (codes - zero) * scale) ** 2).mean()
    assert off.mean() == pytest.approx(want, rel=1e-3)
    assert 1 <= int(info.details["iterations"]) <= 20


@pytest.mark.parametrize("zero", [None, "float32", "float16"])
@pytest.mark.parametrize(("name", "group"), [("uint4", 64), ("uint3", 128), ("uint2", 64)])
def test_it_beats_round_to_nearest(name, group, zero):
    w = heavy(256, 48, seed=1)
    spec = QSpec(name, PerGroup(group, 0), symmetric=False, zero_dtype=zero)
    plain = dataclasses.replace(spec, zero_dtype=None)
    (q, info), (r, _) = hqq()(w, spec), rtn()(w, plain)

    def off(q):
        return np.mean((w - np.asarray(jq.dequantize(q))) ** 2)

    ours, theirs = off(q.validate()), off(r)
    assert ours <= theirs
    if zero is not None:
        assert ours < 0.995 * theirs
        free, _ = hqq(gain=0.0)(w, spec)
        assert off(free) < 0.95 * theirs
    assert float(info.details["before"]) == pytest.approx(theirs, rel=1e-3)
    assert float(info.details["after"]) == pytest.approx(ours, rel=1e-3)


def test_zero_stays_exact_where_little_would_be_gained():
    w = heavy(256, 64, seed=12)
    w[np.random.default_rng(13).random(w.shape) < 0.05] = 0.0
    spec = QSpec("uint4", PerGroup(64, 0), symmetric=False, zero_dtype="float32")
    taken, squares = [], []
    for gain in (0.0, 0.3, 0.6, 1.0):
        q, info = hqq(gain=gain)(jnp.asarray(w), spec)
        zero = np.asarray(q.zero_point)
        whole = zero == np.round(zero)
        taken.append(np.mean(~whole))
        squares.append(float(info.details["after"]))
        held = np.asarray(jq.dequantize(q)).reshape(4, 64, 64)
        exact = (held == 0.0) | (w.reshape(4, 64, 64) != 0.0)
        assert exact.all(1).T[whole.reshape(64, 4)].all()
    assert taken[0] > 0.5 and taken[-1] == 0.0 and 0.0 < taken[1] < taken[0]
    assert taken == sorted(taken, reverse=True) and squares == sorted(squares)


@pytest.mark.parametrize(
    "spec",
    [
        QSpec("uint4", PerChannel(2), symmetric=False, zero_dtype="float32"),
        QSpec("uint4", PerGroup(10, (0, 1)), symmetric=False, zero_dtype="bfloat16"),
        QSpec("int8", PerTensor(), symmetric=False),
        QSpec("uint4", PerBlock(3, 5, (1, 2)), symmetric=False, zero_dtype="float32"),
        QSpec("uint4", PerGroup(16, 0), symmetric=False, double=True, zero_dtype="float16"),
    ],
    ids=repr,
)
def test_every_granularity(spec):
    w = jnp.asarray(heavy(16, 4, 10, seed=3))
    q, info = hqq()(w, spec)
    plain = dataclasses.replace(spec, zero_dtype=None)
    assert q.validate().shape == w.shape
    assert info.sqnr_db > rtn()(w, plain)[1].sqnr_db - 1.0


def test_stacked_layers_and_dtypes():
    w = heavy(2, 3, 64, 8, seed=4)
    spec = QSpec("uint4", PerGroup(32, 0), symmetric=False, zero_dtype="float32")
    q, info = jax.jit(lambda w: hqq()(w, spec, storage_last_axes=(0,), batch_axes=2))(w)
    assert q.validate().batch == (2, 3) and info.details["iterations"].shape == (2, 3)
    one, _ = hqq()(w[1, 2], spec, storage_last_axes=(0,))
    np.testing.assert_array_equal(np.asarray(q.codes)[1, 2], one.codes)
    half, _ = hqq()(w[0, 0].astype(jnp.bfloat16), spec)
    assert half.dtype == "bfloat16"
    assert jax.eval_shape(jq.dequantize, half).dtype == jnp.bfloat16


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-30, 1e30])
@pytest.mark.parametrize("zero", [None, "float32"])
def test_values_that_are_all_alike(value, zero):
    w = np.full((8, 3), value, np.float32)
    q, _ = hqq()(w, QSpec("uint4", PerGroup(4, 0), symmetric=False, zero_dtype=zero))
    np.testing.assert_allclose(jq.dequantize(q), w, rtol=1e-6)


def test_no_steps_are_round_to_nearest_with_a_float_zero_point():
    w = jnp.asarray(heavy(64, 8, seed=5))
    spec = QSpec("uint4", PerGroup(32, 0), symmetric=False, zero_dtype="float32")
    (q, info), r = hqq(iterations=0, gain=0.0)(w, spec), jq.quantize(w, spec)
    assert int(info.details["iterations"]) == 0
    ours, theirs = np.asarray(q.zero_point), np.asarray(r.zero_point)
    exact = ours == np.round(theirs)
    np.testing.assert_allclose(ours[~exact], theirs[~exact], rtol=1e-5, atol=1e-5)
    assert 0.0 < np.mean(exact) < 1.0
    apart = np.asarray(codes_of(q), np.int32) - np.asarray(codes_of(r), np.int32)
    assert np.max(np.abs(apart)) <= 1


def test_it_is_a_value():
    assert isinstance(hqq(), Encoder) and hqq() == hqq() and len({hqq(), hqq(p=0.5)}) == 2
    for bad in (
        {"iterations": -1},
        {"p": 0.0},
        {"p": 1.5},
        {"beta": 0.0},
        {"iterations": 2.5},
        {"gain": 1.5},
    ):
        with pytest.raises(ValueError, match="hqq"):
            hqq(**bad)
    for spec in (jq.int4().at((0,), 2), QSpec("nf4").at((0,), 2)):
        with pytest.raises(ValueError, match="asymmetric"):
            hqq()(np.ones((4, 4), np.float32), spec)


# Float zero points in contractions.


@functools.cache
def contracted(name, gran):
    w = heavy(64, 24, seed=6) + np.float32(0.01)
    q, _ = hqq()(
        w, QSpec(name, gran, symmetric=False, zero_dtype="float32"), storage_last_axes=(0,)
    )
    return q, np.asarray(jq.dequantize(q), np.float64)


@pytest.mark.parametrize("activations", [None, jq.int8(), jq.QSpec("uint8", symmetric=False)])
@pytest.mark.parametrize(
    ("name", "gran"), [("uint4", PerGroup(16, 0)), ("int8", PerChannel(1)), ("uint8", PerTensor())]
)
def test_contractions_with_float_zero_points(name, gran, activations):
    plain, values = contracted(name, gran)
    q = with_contraction(plain, ContractionConfig(activations))
    every = [np.random.default_rng(7).normal(size=(n, 64)).astype(np.float32) for n in (1, 9)]

    @jax.jit
    def run(every, q):
        return [ops.dot_general(x, q, (((1,), (0,)), ((), ()))) for x in every]

    for x, got in zip(every, run(every, q), strict=True):
        seen = x if activations is None else rounded(x, activations, (1,))
        want = np.asarray(seen, np.float64) @ values
        tolerance = 3e-4 if activations is None else 2e-5
        np.testing.assert_allclose(
            got, want, rtol=1e-5, atol=tolerance * np.abs(want).max(), err_msg=f"{len(x)} rows"
        )


def test_convolutions_with_float_zero_points():
    w = jnp.asarray(heavy(3, 3, 4, 8, seed=8) + 0.01)
    spec = QSpec("int8", PerChannel(3), symmetric=False, zero_dtype="float32")
    q, _ = hqq()(w, spec)
    x = np.random.default_rng(9).normal(size=(2, 6, 6, 4)).astype(np.float32)
    numbers = ("NHWC", "HWIO", "NHWC")

    @jax.jit
    def run(x, seen, q):
        got = ops.conv_general_dilated(x, q, (1, 1), "SAME", dimension_numbers=numbers)
        want = jax.lax.conv_general_dilated(
            seen, jq.dequantize(q), (1, 1), "SAME", dimension_numbers=numbers
        )
        return got, want

    for activations in (None, jq.int8()):
        seen = x if activations is None else rounded(x, activations, (1, 2, 3))
        got, want = run(x, seen, with_contraction(q, ContractionConfig(activations)))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", ["dynamic", "static", "integer"])
def test_models_with_float_zero_points(recipe):
    rng = np.random.default_rng(10)
    params = {n: array(rng.normal(size=(32, 32)) * 0.2) for n in "ab"}
    x = rng.normal(size=(8, 32)).astype(np.float32)

    def fn(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    base = {"dynamic": jq.w8a8, "static": jq.w8a8_static, "integer": jq.w8a8_integer}[recipe]()
    spec = QSpec("int8", symmetric=False, zero_dtype="float32")
    rule = dataclasses.replace(base.rules[0], weights=spec, encoder=hqq())
    batches = {} if recipe == "dynamic" else {"batches": [x]}
    qparams, _ = jq.ptq(fn, params, [rule], *(() if batches else (x,)), **batches)
    got = np.asarray(jq.quantized(fn)(qparams, x))
    want = np.maximum(x @ np.asarray(params["a"]), 0) @ np.asarray(params["b"])
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 0.02
