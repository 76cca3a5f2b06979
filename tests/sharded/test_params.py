"""Quantized parameters live where the parameters did."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxquant as jq
from jaxquant import PerGroup, QSpec
from jaxquant.interpret.sites import Site, Sites
from tests.test_params_trees import weights

SPLITS = [("a", None, "b"), (None, "b", None), (None, None, ("a", "b"))]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("current", [False, True], ids=["", "set_mesh"])
def test_results_are_split_as_the_weight_was(axis_type, current):
    w = jax.random.normal(jax.random.key(1), (4, 64, 128))
    site = Site(
        key="w",
        primitive="dot_general",
        param="w",
        shape=w.shape,
        dtype="float32",
        contracted=(1,),
        scanned=(0,),
        batched=(),
        operands=((), ()),
        scope="",
    )
    sites = Sites((site,), {"w": (w.shape, "float32")}, {})
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2)
    for recipe in (jq.w8a8(), jq.w4a16(group=16)):

        def run(w, recipe=recipe):
            return jq.quantize_params({"w": w}, recipe, sites=sites)[0]["w"]

        plain = run(w)
        for split in SPLITS:
            placed = jax.device_put(w, NamedSharding(mesh, PartitionSpec(*split)))
            if current:
                with jax.set_mesh(mesh):
                    q = run(placed)
            else:
                q = run(placed)
            np.testing.assert_array_equal(np.asarray(q.codes), np.asarray(plain.codes))
            np.testing.assert_array_equal(np.asarray(q.scale), np.asarray(plain.scale))
            layers, rows, columns = split
            expected = PartitionSpec(layers, columns, rows)  # contracted axes are stored last
            assert q.codes.sharding.is_equivalent_to(NamedSharding(mesh, expected), 3)
            grouped = rows if q.scale.shape[2] > 1 else None
            expected = PartitionSpec(layers, columns, grouped)
            assert q.scale.sharding.is_equivalent_to(NamedSharding(mesh, expected), 3)
            assert q.codes.sharding.mesh == mesh

            shape = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=placed.sharding)
            promised = run(shape)
            assert promised.codes.sharding == q.codes.sharding
            assert promised.scale.sharding == q.scale.sharding

            restored = jq.dequantize_params({"w": q})["w"]
            assert restored.sharding.mesh == mesh
            np.testing.assert_allclose(restored, jq.dequantize(plain), rtol=1e-6)


def test_axes_that_do_not_divide_are_not_split():
    w = jax.random.normal(jax.random.key(1), (8, 48))
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    placed = jax.device_put(w, NamedSharding(mesh, PartitionSpec("a")))
    q = jq.quantize_params({"w": placed}, weights("w", PerGroup(4, 0)))[0]["w"]
    assert q.scale.shape == (48, 2)  # two groups over eight devices
    assert q.scale.sharding.is_fully_replicated
    np.testing.assert_array_equal(
        np.asarray(q.codes), np.asarray(jq.quantize(w, QSpec("int8", PerGroup(4, 0))).codes)
    )
