"""LLM.int8(): outlier columns of activations in float, the rest on integers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import PerChannel, PerGroup, QSpec, ops
from jaxquant.qtensor import Calibration, ContractionConfig, Outliers, with_contraction
from tests.arrays import array
from tests.encoders import bnb_reference as ref

ROWS = jq.int8(range="qmax")


def activations(rng, *shape, columns=(), dtype=np.float32):
    x = np.clip(rng.normal(size=shape), -3, 3).astype(dtype)
    for c in columns:
        x[..., c] *= 40
    return x


def llm_int8(x, codes, scale, threshold, capacity):
    """The formula in float64: `x` [rows, K], codes [K, N], scale [N]."""
    peak = np.abs(x).max(0)
    columns = np.flatnonzero(peak >= threshold)
    columns = columns[np.argsort(-peak[columns], kind="stable")][:capacity]
    big = np.zeros(x.shape, bool)
    big[:, columns] = np.abs(x[:, columns]) >= threshold
    rest = np.where(big, np.float32(0), x).astype(np.float32)
    amax = np.abs(rest).max(1)
    unit = np.float32(127) / np.where(amax == 0, np.float32(1), amax)
    q = np.rint(rest * unit[:, None])
    q[:, columns] = 0
    ints = q.astype(np.float64) @ codes.astype(np.float64)
    y = ints * amax[:, None].astype(np.float64) / 127
    y = y + x[:, columns].astype(np.float64) @ codes[columns].astype(np.float64)
    return y * scale[None].astype(np.float64)


def kernel(rng, k, n, outliers, spec=None):
    w = jax.device_put(rng.normal(size=(k, n)).astype(np.float32))
    spec = jq.int8(range="qmax", granularity=PerChannel(1)) if spec is None else spec
    q = jq.quantize(w, spec, storage_last_axes=(0,))
    return w, with_contraction(q, ContractionConfig(ROWS, outliers=outliers))


def dot(x, q, over=((1,), (0,))):
    return ops.dot_general(x, q, (over, ((), ())))

    return ops.dot_general(x, q, (over, ((), ())))


@pytest.mark.parametrize("columns", [(), (3,), (3, 17, 40), tuple(range(12))])
@pytest.mark.parametrize("rows", [1, 5])
def test_it_is_the_formula(rows, columns):
    rng = np.random.default_rng(len(columns))
    x = activations(rng, rows, 48, columns=columns)
    _, q = kernel(rng, 48, 24, Outliers(6.0, capacity=8))
    want = llm_int8(x, np.asarray(q.codes).T, np.asarray(q.scale)[:, 0], 6.0, 8)
    got = jax.jit(dot)(jnp.asarray(x), q)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6 * np.abs(want).max())


def test_outliers_no_longer_cost_the_rest():
    rng = np.random.default_rng(0)
    x = activations(rng, 64, 96, columns=(5, 60))
    _, q = kernel(rng, 96, 32, Outliers())
    want = x @ np.asarray(jq.dequantize(q))
    plain = with_contraction(q, ContractionConfig(ROWS))
    error = [np.abs(np.asarray(dot(jnp.asarray(x), p)) - want).mean() for p in (q, plain)]
    assert error[0] < 0.25 * error[1]


def test_codes_of_rows_and_columns_are_those_of_vectorwise_quantization():
    from jaxquant.ops.operands import Operand
    from jaxquant.ops.outliers import split

    rng = np.random.default_rng(1)
    for columns, rows in (((), 9), ((2, 30), 9), ((2, 30), 1)):
        x = activations(rng, rows, 64, columns=columns)
        x[0, :] = 0
        operand = Operand(jnp.asarray(x), None, None, (), (0,), (), (1,))
        codes, _, found = split(operand, ROWS, Outliers(6.0, capacity=4))
        want, amax, where = ref.vectorwise(x, 6.0)
        np.testing.assert_array_equal(codes.values, want)
        some = amax > 0
        np.testing.assert_allclose(np.asarray(codes.scale)[some, 0], amax[some] / 127, rtol=1.2e-7)
        got = np.sort(np.asarray(found.index)[np.asarray(found.valid)])
        np.testing.assert_array_equal(got, where)


def test_weights_are_those_of_vectorwise_quantization():
    rng = np.random.default_rng(2)
    w = rng.normal(size=(256, 300)).astype(np.float32)
    spec = jq.int8(range="qmax", granularity=PerChannel(1))
    for q in (jq.encoders.vectorwise()(jnp.asarray(w), spec, storage_last_axes=(0,))[0],):
        codes, amax, _ = ref.vectorwise(w.T)
        np.testing.assert_array_equal(q.validate().codes, codes)
        # XLA multiplies by the reciprocal of a constant
        np.testing.assert_allclose(np.asarray(q.scale)[:, 0], amax / 127, rtol=1.2e-7)
    two, _ = jq.encoders.vectorwise()(
        jnp.stack([w, 2 * w]), spec, storage_last_axes=(0,), batch_axes=1
    )
    np.testing.assert_array_equal(two.codes[1], q.codes)
    with pytest.raises(ValueError, match="range='qmax'"):
        jq.encoders.vectorwise()(jnp.asarray(w), jq.int8(granularity=PerChannel(1)))


@pytest.mark.parametrize(
    "spec",
    [
        QSpec("int4", PerGroup(16, 0)),
        QSpec("int8", PerGroup(10, 0)),
        QSpec("uint8", PerChannel(1), symmetric=False),
        QSpec("int8", PerGroup(16, 0), double=True),
        QSpec("nf4", PerGroup(16, 0)),
        QSpec("int8", PerChannel(0)),
    ],
    ids=repr,
)
def test_other_weights(spec):
    """Exact where only outliers are not zero, whatever the weight."""
    rng = np.random.default_rng(3)
    x = np.zeros((6, 48), np.float32)
    x[:, [4, 33, 47]] = activations(rng, 6, 3) * 50
    _, q = kernel(rng, 48, 20, Outliers(1e-3, capacity=4), spec)
    want = x.astype(np.float64) @ np.asarray(jq.dequantize(q), np.float64)
    np.testing.assert_allclose(dot(jnp.asarray(x), q), want, rtol=3e-6, atol=1e-4)


def test_several_axes_batches_and_half_precision():

    rng = np.random.default_rng(4)
    w = jax.device_put(rng.normal(size=(3, 4, 8, 10)).astype(np.float32))
    spec = jq.int8(range="qmax", granularity=PerChannel((0, 3)))
    q = with_contraction(
        jq.quantize(w, spec, storage_last_axes=(1, 2)),
        ContractionConfig(ROWS, outliers=Outliers(6.0, 4)),
    )
    x = activations(rng, 3, 5, 4, 8)
    x[0, :, 1, 2] *= 40
    x[2, :, 3, 7] *= 30
    numbers = (((2, 3), (1, 2)), ((0,), (0,)))
    full = np.einsum("bmij,bijn->bmn", x, np.asarray(jq.dequantize(q)))
    got = jax.jit(lambda x, q: ops.dot_general(x, q, numbers))(jnp.asarray(x), q)
    assert np.abs(got - full).max() < 0.2
    each = [
        llm_int8(
            x[b].reshape(5, 32), np.asarray(q.codes)[b].reshape(10, 32).T,
            np.asarray(q.scale)[b].reshape(10), 6.0, 4,
        )
        for b in range(3)
    ]  # fmt: skip
    np.testing.assert_allclose(got, np.stack(each), rtol=1e-5, atol=1e-4)
    half = ops.dot_general(jnp.asarray(x, jnp.bfloat16), q, numbers)
    assert half.dtype == jnp.float32 and np.abs(half - full).max() < 1.5


def test_transformations():
    rng = np.random.default_rng(5)
    x = jax.device_put(activations(rng, 4, 6, 32, columns=(7,)))
    _, q = kernel(rng, 32, 8, Outliers(6.0, 4))
    each = jnp.stack([dot(one, q) for one in x])
    np.testing.assert_allclose(jax.vmap(lambda x: dot(x, q))(x), each, rtol=1e-5, atol=1e-4)
    grad = jax.grad(lambda x: (dot(x, q) * 3.0).sum())(x[0])
    want = 3.0 * jnp.broadcast_to(jq.dequantize(q).sum(1), grad.shape)
    np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-4)
    bad = x[0].at[2, 3].set(jnp.nan)
    out = dot(bad, q)
    assert jnp.isnan(out[2]).all() and jnp.isfinite(out[jnp.array([0, 1, 3])]).all()


def test_fixed_columns():
    rng = np.random.default_rng(6)
    x = activations(rng, 5, 32, columns=(3, 9, 20))
    _, q = kernel(rng, 32, 8, Outliers(6.0, 4, calibrated=True))
    fixed = Calibration(outliers=jnp.array([9, 20, 3, -1]), over=(-2,))

    got = dot(jnp.asarray(x), dataclasses.replace(q, calibration=fixed))
    np.testing.assert_allclose(got, dot(jnp.asarray(x), q), rtol=1e-5, atol=1e-4)


def test_a_model():
    rng = np.random.default_rng(7)
    params = {n: array(rng.normal(size=(3, 32, 32)) * 0.15) for n in "ab"}
    x = jax.device_put(activations(rng, 6, 32, columns=(1,)))

    def fn(params, x):
        def layer(x, p):
            return jnp.tanh(x @ p["a"]) @ p["b"], None

        return jax.lax.scan(layer, x, params)[0]

    recipe = jq.llm_int8(capacity=8)
    qparams, report = jq.ptq(fn, params, recipe, x)
    assert qparams["a"].contraction.outliers == Outliers(6.0, 8)
    assert not report.events
    got, want = jax.jit(jq.quantized(fn))(qparams, x), fn(params, x)
    plain, _ = jq.ptq(fn, params, jq.w8a8(), x)
    cosine = [
        float(jnp.sum(y * want) / jnp.linalg.norm(y) / jnp.linalg.norm(want))
        for y in (got, jq.quantized(fn)(plain, x))
    ]
    assert cosine[0] > 0.999 and cosine[0] > cosine[1]


def test_calibrated_columns_of_a_model():
    rng = np.random.default_rng(8)
    params = {n: jax.device_put(rng.normal(size=(32, 32)).astype(np.float32)) for n in "ab"}
    x = jax.device_put(activations(rng, 6, 32, columns=(1, 30)))

    def fn(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    recipe = jq.llm_int8(capacity=4, calibrated=True)
    qparams, _ = jq.ptq(fn, params, recipe, batches=[x, x + 0.01])
    assert qparams["a"].calibration.outliers.tolist()[2:] == [-1, -1]
    assert sorted(qparams["a"].calibration.outliers.tolist()[:2]) == [1, 30]
    dynamic, _ = jq.ptq(fn, params, jq.llm_int8(capacity=4), x)
    np.testing.assert_allclose(
        jq.quantized(fn)(qparams, x), jq.quantized(fn)(dynamic, x), rtol=1e-5, atol=1e-4
    )
    with pytest.raises(ValueError, match="batches"):
        jq.ptq(fn, params, recipe, x)


def test_convolutions_are_without_and_say_so():
    x, w = jnp.ones((1, 8, 8, 4)), {"k": jnp.ones((3, 3, 4, 8))}

    def fn(params, x):
        return jax.lax.conv_general_dilated(
            x, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    _, report = jq.ptq(fn, w, jq.llm_int8(), x)
    assert any("outlier" in str(event) for event in report.events)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Outliers(0.0), "threshold"),
        (lambda: Outliers(capacity=0), "capacity"),
        (lambda: Outliers(capacity=1.5), "fraction"),
        (lambda: jq.Rule("**", weights=jq.int8(), outliers=Outliers()), "outliers need"),
        (
            lambda: jq.Rule(
                "**", weights=ROWS, activations=ROWS, outliers=Outliers(calibrated=True)
            ),
            "vectorwise",
        ),
    ],
)
def test_bad_input(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_against_bitsandbytes():
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    rng = np.random.default_rng(9)
    for rows, columns in ((7, ()), (7, (3, 50)), (1, (3,))):
        x = activations(rng, rows, 128, columns=columns)
        codes, amax, where = functional.int8_vectorwise_quant(torch.tensor(x), threshold=6.0)
        want = ref.vectorwise(x, 6.0)
        np.testing.assert_array_equal(codes.numpy(), want[0])
        np.testing.assert_array_equal(amax.numpy(), want[1])
        np.testing.assert_array_equal(np.sort(where.numpy()), want[2])
