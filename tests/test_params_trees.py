"""Params trees after quantization: their types, and what is trained."""

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant import PerChannel, QSpec, QTensor, Recipe, Rule


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
