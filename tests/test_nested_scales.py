"""Scales that are quantized themselves, wherever values and their scales move."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import PerChannel, PerGroup, QSpec
from jaxquant.qtensor import Nested, nest, storage_scale, with_plain_scales

pytestmark = pytest.mark.usefixtures("uncontracted")


def weight(*shape, seed=0):
    return jax.device_put(np.random.default_rng(seed).standard_t(5, shape).astype(np.float32))


# one program, and not one for each operation
quantize = jax.jit(
    jq.quantize, static_argnums=1, static_argnames=("storage_last_axes", "batch_axes")
)


def spec(name="nf4", group=16, axis=0):
    return QSpec(name, PerGroup(group, axis), double=True)


def test_it_is_a_pytree_with_batch_axes():
    w = weight(3, 64, 24)
    q = quantize(w, spec(), batch_axes=1).validate()
    assert q.scale.shape == (3, 24, 4) and q.scale.dtype == jnp.uint8
    assert q.nested.scale.shape == (3, 1) and q.nested.offset.shape == (3,)
    host = jax.tree.map(np.asarray, q)
    for layer in range(3):
        one = jax.device_put(jax.tree.map(lambda a, layer=layer: a[layer], host)).validate()
        own = quantize(np.asarray(w)[layer], spec())
        np.testing.assert_array_equal(jq.dequantize(one), jq.dequantize(own))

    @jax.jit
    def ways(q):
        walked = jax.lax.scan(lambda c, layer: (c, jq.dequantize(layer)), 0, q)[1]
        return jax.vmap(jq.dequantize)(q), walked

    every, walked = ways(q)
    # whether `offset + scale * map` is rounded once or twice is XLA's choice
    np.testing.assert_allclose(every, jq.dequantize(q), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(walked, every, rtol=1e-6, atol=1e-6)


def test_plain_scales_stand_for_the_same():
    q = quantize(weight(64, 40), spec("int4"))
    p = with_plain_scales(q).validate()
    assert p.scale.dtype == jnp.float32 and not p.spec.double
    np.testing.assert_array_equal(jq.dequantize(p), jq.dequantize(q))
    assert with_plain_scales(p) is p


def test_error_is_that_of_scales_alone():
    w = weight(512, 64)
    q = quantize(w, spec(group=64))
    p = quantize(w, QSpec("nf4", PerGroup(64, 0)))
    np.testing.assert_array_equal(q.codes, p.codes)
    scale = np.asarray(p.scale)
    off = np.abs(np.asarray(jax.jit(storage_scale)(q)) - scale)
    assert off.max() < 0.02 * np.abs(scale - scale.mean()).max()


def test_scales_that_are_not_finite_are_seen():
    given = np.float32([1.0, np.nan, 2.0]), np.zeros((2, 3), np.float32), np.zeros(0, np.float32)
    (_, nested), zeros, none = jax.jit(lambda given: [nest(a) for a in given])(given)
    assert np.isnan(nested.scale).all()
    codes, nested = zeros
    assert codes.tolist() == [[0] * 3] * 2 and nested.scale.tolist() == [0.0]
    codes, nested = none
    assert codes.shape == (0,) and nested.scale.shape == (0,)


def test_validate_and_spec():
    q = quantize(weight(64, 8), spec())
    for bad in (
        dataclasses.replace(q, nested=None),
        dataclasses.replace(q, scale=jax.device_put(np.asarray(q.scale).astype(np.float32))),
        dataclasses.replace(
            q, nested=Nested(jax.device_put(np.asarray(q.nested.scale)[:0]), q.nested.offset)
        ),
    ):
        with pytest.raises(ValueError, match="expected"):
            bad.validate()
    with pytest.raises(ValueError, match="double"):
        QSpec("nf4", double=True, scale_dtype="float16")
    with pytest.raises(ValueError, match="double"):
        QSpec("nvfp4", double=True)
    with pytest.raises(ValueError, match="zero_dtype"):
        QSpec("int4", zero_dtype="float32")
    with pytest.raises(ValueError, match="zero_dtype"):
        QSpec("int4", symmetric=False, zero_dtype="int8")


FUNCTIONS = {
    "matmul": lambda w, x: x @ w,
    "transposed": lambda w, x: (w.T @ x.T).T,
    "einsum": lambda w, x: jnp.einsum("bk,kn->nb", x, w),
    "slice of columns": lambda w, x: x @ w[:, 8:24],
    "slice of rows": lambda w, x: x[:, :32] @ w[:32],
    "reshaped": lambda w, x: jnp.einsum("bk,khd->bhd", x, w.reshape(64, 4, 8)),
    "heads transposed": lambda w, x: jnp.einsum(
        "bk,hkd->bhd", x, jnp.transpose(w.reshape(64, 4, 8), (1, 0, 2))
    ),
    "scaled": lambda w, x: x @ (w * 3.0),
    "joined": lambda w, x: x @ jnp.concatenate([w, w], axis=1),
    "reversed": lambda w, x: x @ w[:, ::-1],
    "tied": lambda w, x: w[jnp.array([1, 5, 3])] @ (x @ w).T,
    "taken": lambda w, x: jnp.take(w.T, jnp.array([3, 0]), axis=0) @ x.T,
    "one more axis": lambda w, x: x @ w[None][0],
}


def served_and_float(functions, q, x):
    """Name, served result and that of the dequantized weight of each, by one program."""

    @jax.jit
    def program(q, x):
        served = {n: jq.quantized(lambda p, x, f=f: f(p["w"], x)) for n, f in functions.items()}
        w = jq.dequantize(q)
        return {n: (served[n]({"w": q}, x), f(w, x)) for n, f in functions.items()}

    results = program(q, x)
    assert set(results) == set(functions)
    return [(name, *map(np.asarray, pair)) for name, pair in results.items()]


@pytest.mark.parametrize("double", [False, True])
def test_functions(double):
    w, x = weight(64, 32), weight(5, 64, seed=1)
    q = quantize(w, QSpec("int8", PerGroup(16, 0), double=double), storage_last_axes=(0,))
    for name, got, want in served_and_float(FUNCTIONS, q, x):
        most = 1e-3 * np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=most, err_msg=name)


STACKED = {
    "scan": lambda w, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0],
    "indexed": lambda w, x: jnp.tanh(x @ w[0]) @ w[2],
    "dynamic": lambda w, x: jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w[i]), x),
    "some layers": lambda w, x: jax.lax.scan(lambda x, w: (x @ w * 0.1, None), x, w[1:])[0],
    "swapped": lambda w, x: jnp.einsum("bk,knl->bnl", x, jnp.transpose(w, (1, 2, 0))),
    "batched": lambda w, x: jnp.einsum("bk,lkn->lbn", x, w),
}


def test_stacked_layers():
    w, x = weight(3, 32, 32), weight(5, 32, seed=1)
    q = quantize(w, spec("int4"), storage_last_axes=(0,), batch_axes=1)
    for name, got, want in served_and_float(STACKED, q, x):
        most = 2e-3 * np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=most, err_msg=name)


@pytest.mark.parametrize("preset", [jq.nf4, jq.fp4])
def test_presets(preset):
    params = {"w": weight(1024, 256), "table": weight(50, 1024, seed=3)}

    def fn(params, ids):
        return params["table"][ids] @ params["w"]

    ids = np.array([3, 7, 11], np.int32)
    qparams, report = jq.ptq(fn, params, preset(double=True), ids)
    assert abs(report["w"].bits_per_weight - 4.127) < 2e-3
    got = np.asarray(jax.jit(jq.quantized(fn))(qparams, ids))
    want = fn({name: np.asarray(a) for name, a in params.items()}, ids)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 0.2


def test_rows_of_a_table():
    table = weight(40, 64)

    def fn(params, ids):
        return params["t"][ids]

    ids = np.array([[3, 7], [11, 39]], np.int32)
    q = quantize(table, QSpec("nf4", PerGroup(16, 1), double=True))
    got = jax.jit(jq.quantized(fn))({"t": q}, ids)
    np.testing.assert_allclose(got, np.asarray(jq.dequantize(q))[ids], rtol=1e-6)


def test_export():
    q = quantize(weight(64, 16), spec(), storage_last_axes=(0,))
    served = jax.jit(jq.quantized(lambda p, x: x @ p["w"]))
    x = weight(4, 64, seed=1)
    exported = jax.export.export(served)({"w": q}, x)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call({"w": q}, x), served({"w": q}, x))


def test_training_rounds_with_nested_scales():
    params, x = {"w": weight(64, 16)}, weight(4, 64, seed=1)
    fn = jq.fake_quantized(lambda p, x: x @ p["w"], jq.nf4(16, double=True))
    loss, grads = jax.jit(jax.value_and_grad(lambda p: (fn(p, x) ** 2).sum()))(params)
    assert np.isfinite(loss) and np.isfinite(grads["w"]).all()
    assert np.any(np.asarray(grads["w"]) != 0)


def test_channels_of_scales():
    w = weight(600, 8)
    q = quantize(w, QSpec("int8", PerChannel(0), double=True)).validate()
    assert q.nested.scale.shape == (3,)
    w = np.asarray(w)
    assert np.abs(np.asarray(jq.dequantize(q)) - w).max() < 0.05 * np.abs(w).max()
