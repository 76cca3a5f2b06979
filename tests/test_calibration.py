"""What calibration fixed travels with a `QTensor`, through trees, moves and artifacts."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant as jq
from jaxquant.interpret import reshapes, slices
from jaxquant.qtensor import Calibration, ContractionConfig, Folded, QuantParams
from tests.arrays import array

L, K, N = 3, 8, 6
SPEC = jq.QSpec("int8", jq.PerChannel(-1))


def grid(seed: int, *batch: int, zero: bool = True) -> QuantParams:
    rng = np.random.default_rng(seed)
    scale = array(rng.uniform(0.01, 1, batch))
    return QuantParams(
        scale,
        array(rng.integers(-128, 127, batch), jnp.int32) if zero else None,
        jq.int8(granularity=jq.PerTensor()),
        f"site {seed}",
    )


def calibration(*batch: int) -> Calibration:
    whole = jnp.arange(np.prod((*batch, N)), dtype=jnp.int32).reshape(*batch, N)
    return Calibration(
        input=grid(1, *batch),
        output=grid(2, *batch, zero=False),
        offset=whole,
        folded=Folded(whole + 1, (whole + 2).astype(jnp.float32), None, ("add", "max")),
        attention={"attn": (grid(3, *batch), grid(4, *batch, zero=False))},
    )


def tensor(*batch: int, seed: int = 0) -> jq.QTensor:
    w = array(np.random.default_rng(seed).standard_normal((*batch, K, N)))
    q = jq.quantize(w, SPEC, batch_axes=len(batch))
    config = ContractionConfig(jq.int8(granularity=jq.PerTensor()), requantize="float32")
    return dataclasses.replace(q, contraction=config, calibration=calibration(*batch))


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    chex.assert_trees_all_equal(a, b)


def test_a_pytree_of_all_that_it_holds() -> None:
    q = tensor(L)
    held = len(jax.tree.leaves(q.calibration))
    assert held == 2 + 1 + 1 + 2 + 3
    assert len(jax.tree.leaves(q)) == held + 2
    leaves, tree = jax.tree.flatten(q)
    assert_same(jax.tree.unflatten(tree, leaves), q)
    assert jax.tree.structure(q) != jax.tree.structure(dataclasses.replace(q, calibration=None))
    bare = dataclasses.replace(q, calibration=None)
    assert q.nbytes - bare.nbytes == sum(a.nbytes for a in jax.tree.leaves(q.calibration)) == 288
    assert repr(q) == repr(bare)
    assert "codes=None" in repr(jax.tree.map(lambda _: None, q))
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(q)]
    assert ".calibration.input.scale" in names
    assert ".calibration.attention['attn'][0].zero_point" in names
    assert q.validate() is q


def test_a_slice_of_a_stack_is_the_layer_and_scan_and_vmap_see_layers() -> None:
    q = tensor(L)
    for i in range(L):
        layer = jax.tree.map(lambda a, i=i: a[i], q)
        assert layer.calibration.input.scale.shape == ()
        assert layer.calibration.offset.shape == (N,)
        assert float(layer.calibration.input.scale) == float(q.calibration.input.scale[i])
        assert layer.shape == (K, N)

    def seen(layer: jq.QTensor) -> Any:
        return layer.calibration.offset + layer.calibration.input.zero_point

    want = q.calibration.offset + q.calibration.input.zero_point[:, None]
    np.testing.assert_array_equal(lax.scan(lambda c, a: (c, seen(a)), 0, q)[1], want)
    np.testing.assert_array_equal(jax.vmap(seen)(q), want)


def test_partition_keeps_it_with_the_tensor() -> None:
    params = {"w": tensor(), "b": jnp.ones(N)}
    trained, rest = jq.partition(params)
    assert jax.tree.leaves(trained)[0] is params["b"]
    assert len(jax.tree.leaves(trained)) == 1  # scales of grids are floats, and not trained
    assert_same(jq.combine(trained, rest), params)


def test_export_writes_and_reads_it() -> None:
    pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")
    q = dataclasses.replace(
        tensor(L),
        calibration=dataclasses.replace(calibration(L), divisor=jnp.ones((L, K)), axis=(-2,)),
    )
    exported = jax.export.export(jax.jit(lambda q: q))(q)
    out = jax.export.deserialize(exported.serialize()).call(q)
    assert_same(out, q)
    assert out.calibration.axis == (-2,)
    assert out.calibration.folded.chain == ("add", "max")
    assert out.contraction == q.contraction


def kept(q: jq.QTensor, batch: Any) -> None:
    """Grids are left, everything that lay like the values is gone."""
    held = q.calibration
    assert (held.offset, held.folded, held.divisor) == (None,) * 3
    whole = tensor(*(() if batch is None else (L,))).calibration
    want = Calibration(input=whole.input, output=whole.output, attention=whole.attention)
    assert_same(held, want if batch is None else jax.tree.map(batch, want))


def test_moves_keep_the_grids_that_still_hold() -> None:
    q, one = tensor(L), tensor()
    held = q.calibration
    assert_same(held.moved(), Calibration(held.input, held.output, attention=held.attention))
    kept(slices.cut(q, (1, 0, 0), (2, K, N)), lambda a: a[1:3])
    kept(slices.cut(q, (jnp.int32(2), 0, 0), (1, K, N)), lambda a: a[2:3])
    kept(slices.cut(one, (0, 2), (K, 3)), None)
    kept(slices.cut(q, (0, 0, 1), (L, K, 2)), lambda a: a)
    kept(slices.reverse(q, (0, 1)), lambda a: a[::-1])
    kept(slices.reverse(one, (1,)), None)
    # a first axis that becomes the layers of a loop shares what there was
    split = reshapes.demote(one)
    assert split.batch == (K,)
    assert_same(
        split.calibration,
        jax.tree.map(lambda a: jnp.broadcast_to(a, (K, *a.shape)), one.calibration.moved()),
    )
    # there is no saying which index the grids of layers belong to
    assert reshapes.promote(q).calibration is None
    index = jnp.array([[2], [0]])
    rows = slices.rows(q, index, 0, lax.GatherScatterMode.CLIP)
    assert_same(rows.calibration, jax.tree.map(lambda a: a[jnp.array([2, 0])], q.calibration))
    assert slices.rows(one, index, 0, lax.GatherScatterMode.CLIP).calibration is None
    joined = slices.concatenate([one, tensor(seed=1)], 1)
    assert joined.shape == (K, 2 * N)
    assert_same(joined.calibration, dataclasses.replace(one.calibration.moved(), output=None))


def test_what_is_divided_is_not_joined_and_comes_back_in_any_stack() -> None:
    divisor = array(np.random.default_rng(5).uniform(0.1, 1, (L, K)))
    held = dataclasses.replace(calibration(L), divisor=divisor, axis=(-2,))
    plain = dataclasses.replace(tensor(L), calibration=None)
    q = dataclasses.replace(plain, calibration=held)
    want = jq.dequantize(plain) / divisor[:, :, None]
    np.testing.assert_allclose(jq.dequantize(q), want, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jq.dequantize)(q), want, rtol=1e-6)
    layer = jax.tree.map(lambda a: a[1], q)
    np.testing.assert_allclose(jq.dequantize(layer), want[1], rtol=1e-6)
    assert slices.concatenate([layer, layer], 1) is None
    other = dataclasses.replace(layer, calibration=None)
    assert slices.concatenate([other, layer], 1) is None
    (back,) = jax.tree.leaves(jq.dequantize_params({"w": q}))
    np.testing.assert_allclose(back, want, rtol=1e-6)


MOVED = {
    "turned": lambda w: w.T,
    "merged": lambda w: w.reshape(4, 2, N).reshape(K, N),
    "cut": lambda w: w[:, 1:4],
    "reversed": lambda w: w[:, ::-1],
    "negated": lambda w: -2.0 * w,
}


def test_a_moved_parameter_is_contracted_on_its_grid() -> None:
    def fn(p: Any, x: Any) -> Any:
        return {n: x @ f(p[n]) for n, f in MOVED.items()}

    rng = np.random.default_rng(0)
    params = {n: array(rng.standard_normal((N, K) if n == "turned" else (K, N))) for n in MOVED}
    x = array(rng.standard_normal((5, K)) + 0.5)
    q, report = jq.ptq(fn, params, jq.w8a8_static(jq.observers.minmax()), batches=[x])
    y = jax.jit(jq.quantized(fn))(q, 1.5 * x)
    assert not [e for e in report.events if e.kind in ("dequantized", "contracted in float")]
    for name, move in MOVED.items():
        held = q[name].calibration.input
        codes = np.round(np.asarray(1.5 * x) / np.asarray(held.scale)) + int(held.zero_point)
        values = (np.clip(codes, -128, 127) - int(held.zero_point)) * np.float64(held.scale)
        w = np.asarray(move(jq.dequantize(q[name])), np.float64)
        bound = np.abs(values) @ np.abs(w)
        assert (np.abs(y[name] - values @ w) <= 2.0**-21 * bound).all(), name
