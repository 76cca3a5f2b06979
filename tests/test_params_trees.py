"""Params trees after quantization: their types, what is trained, and where they live."""

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxquant as jq
from jaxquant import PerChannel, PerGroup, QSpec, QTensor, Recipe, Rule
from jaxquant.interpret.sites import Site, Sites


def weights(pattern, granularity):
    return Recipe([Rule(pattern, weights=QSpec("int8", granularity))])


def test_trees_keep_their_types():
    recipe = weights("**/kernel", PerChannel(-1))
    box = flax.core.meta.Partitioned(jnp.ones((8, 4)), names=("in", "out"))
    tree = flax.core.freeze({"l": {"kernel": box, "bias": jnp.ones(4)}, "none": None})
    qtree, report = jq.quantize_params(tree, recipe)
    assert isinstance(qtree, flax.core.FrozenDict)
    assert isinstance(qtree["l"]["kernel"], flax.core.meta.Partitioned)
    assert qtree["l"]["kernel"].names == ("in", "out")
    assert isinstance(qtree["l"]["kernel"].value, QTensor)
    assert [leaf.path for leaf in report.leaves] == ["l/bias", "l/kernel"]
    assert jax.tree.structure(jq.dequantize_params(qtree)) == jax.tree.structure(tree)

    state = nnx.state(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    qstate, report = jq.quantize_params(state, recipe)
    assert isinstance(qstate, nnx.State)
    assert isinstance(qstate["kernel"], nnx.Param)
    assert report.quantized == 1
    trainable, quantized = jq.partition(qstate)
    assert jax.tree.structure(jq.combine(trainable, quantized)) == jax.tree.structure(qstate)


def test_partition_feeds_grad_and_optax():
    params = {"head": jax.random.normal(jax.random.key(0), (16, 10)), "bias": jnp.ones(10)}
    tree = params | {"steps": jnp.arange(3), "key": jax.random.key(0), "head2": params["head"]}
    qtree, _ = jq.quantize_params(tree, weights("head", PerChannel(1)))
    trainable, quantized = jq.partition(qtree)
    assert trainable["head"] is trainable["steps"] is trainable["key"] is None
    assert quantized["head"] is qtree["head"]
    assert quantized["head2"] is None
    assert jax.tree.structure(jq.combine(trainable, quantized)) == jax.tree.structure(qtree)

    def loss(trainable):
        p = jq.dequantize_params(jq.combine(trainable, quantized))
        return jnp.sum((p["head"] * p["head2"]) ** 2)

    gradients = jax.jit(jax.grad(loss))(trainable)
    head = jq.dequantize(qtree["head"])
    np.testing.assert_allclose(gradients["head2"], 2 * params["head"] * head**2, rtol=1e-5)
    optimizer = optax.adam(0.1)
    updates, _ = optimizer.update(gradients, optimizer.init(trainable), trainable)
    trained = optax.apply_updates(trainable, updates)
    assert jq.combine(trained, quantized)["head"] is qtree["head"]
    with pytest.raises(ValueError, match="bias: both trees have this leaf"):
        jq.combine(trainable, trainable)


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
