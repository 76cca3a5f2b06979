"""A `QTensor` is a pytree like any other: whatever JAX does to arrays it does to these."""

import copy
import pickle
import re

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import PerChannel, PerGroup, PerTensor, QSpec
from jaxquant.qtensor import ContractionConfig, with_contraction

SPECS = [
    QSpec("int8", PerChannel(1)),
    QSpec("int4", PerGroup(8, 0)),
    QSpec("int3", PerGroup(8, 0), symmetric=False),
    QSpec("nvfp4", PerGroup(16, 0)),
    QSpec("int8", PerTensor()),
]


@pytest.fixture(scope="module")
def w():
    return np.random.default_rng(0).standard_normal((4, 32, 6)).astype(np.float32)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_a_slice_of_a_stack_is_the_layer(spec, w):
    stacked = jq.quantize(w, spec, batch_axes=1).validate()
    assert stacked.batch == (4,)
    assert stacked.shape == w.shape
    values = np.asarray(jq.dequantize(stacked))
    for layer in (0, 3):
        sliced = jax.tree.map(lambda a, i=layer: np.asarray(a)[i], stacked)
        assert_same(sliced, jq.quantize(w[layer], spec))
        np.testing.assert_array_equal(jq.dequantize(sliced), values[layer])


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_vmap_makes_the_same_stack(spec, w):
    mapped = jax.jit(jax.vmap(lambda layer: jq.quantize(layer, spec)))(w)
    assert_same(mapped, jq.quantize(w, spec, batch_axes=1))
    restored = jax.vmap(jq.dequantize)(mapped)
    np.testing.assert_array_equal(restored, jq.dequantize(mapped))


@pytest.mark.parametrize("spec", SPECS[:3], ids=repr)
def test_scan_takes_layers_and_constants(spec, w):
    stacked = jq.quantize(w, spec, batch_axes=1)
    constant = jq.quantize(w[0], spec)

    @jax.jit
    def run(stacked, constant):
        def body(carry, layer):
            assert layer.shape == (32, 6)
            return carry + jq.dequantize(layer) * jq.dequantize(constant), layer

        return jax.lax.scan(body, jnp.zeros((32, 6)), stacked)

    total, again = run(stacked, constant)
    expected = np.sum(
        np.asarray(jq.dequantize(stacked)) * np.asarray(jq.dequantize(constant)), axis=0
    )
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)
    assert_same(again, stacked)


def test_two_batch_axes(w):
    spec = QSpec("int4", PerGroup(8, 0))
    stacked = jq.quantize(w.reshape(2, 2, 32, 6), spec, batch_axes=2)
    assert stacked.batch == (2, 2)
    assert_same(jax.tree.map(lambda a: a[1, 0], stacked), jq.quantize(w[2], spec))


def test_eval_shape_promises_what_comes(w):
    for spec in SPECS:
        promised = jax.eval_shape(lambda w, s=spec: jq.quantize(w, s, batch_axes=1), w)
        got = jq.quantize(w, spec, batch_axes=1)
        chex.assert_trees_all_equal_shapes_and_dtypes(promised, got)
        assert (promised.nbytes, promised.shape) == (got.nbytes, got.shape)


def test_donation_reuses_the_codes(w):
    spec = QSpec("int8", PerChannel(-1))
    q = jq.quantize(w, spec)
    step = jax.jit(lambda q: jax.tree.map(lambda a: a * 2, q), donate_argnums=0)
    out = step(q)
    assert q.codes.is_deleted()
    assert q.scale.is_deleted()
    assert_same(out, jax.tree.map(lambda a: np.asarray(a) * 2, jq.quantize(w, spec)))


def test_placeholders_are_not_validated(w):
    q = jq.quantize(w[0], SPECS[1])
    leaves, tree = jax.tree.flatten(q)
    for filler in (None, 0, object(), "x"):
        jax.tree.unflatten(tree, [filler] * len(leaves))
    chex.assert_trees_all_equal_structs(jax.tree.unflatten(tree, leaves), q)


def test_copies_and_pickles(w):
    q = with_contraction(
        jq.quantize(w[0], SPECS[1]), ContractionConfig(jq.int8(), ((re.compile("a.*"), jq.int8()),))
    )
    assert_same(copy.copy(q), q)
    assert_same(copy.deepcopy(q), q)
    assert_same(pickle.loads(pickle.dumps(q)), q)


def test_static_data_take_part_in_the_cache_key(w):
    traces = []

    @jax.jit
    def run(q):
        traces.append(q)
        return q.scale

    q = jq.quantize(w[0], SPECS[0])
    run(q)
    run(jq.quantize(w[1], SPECS[0]))
    assert len(traces) == 1
    run(with_contraction(q, ContractionConfig(jq.int8())))
    assert len(traces) == 2


def test_export_writes_and_reads_the_structure(w):
    pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")
    attention = (("a/**", jq.int8()), (re.compile("b.*", re.IGNORECASE), None))
    q = with_contraction(
        jq.quantize(w, SPECS[3], batch_axes=1), ContractionConfig(jq.int8(), attention)
    )
    exported = jax.export.export(jax.jit(lambda q: (q, jq.dequantize(q))))(q)
    again = jax.export.deserialize(exported.serialize())
    out, values = again.call(q)
    assert_same(out, q)
    np.testing.assert_array_equal(values, jax.jit(jq.dequantize)(q))


def test_orbax_saves_and_restores(w, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    params = {"a": jq.quantize(w, SPECS[1], batch_axes=1), "b": jnp.ones(3)}
    abstract = jax.eval_shape(lambda: params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", params)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "params", abstract)
    assert_same(restored, params)
