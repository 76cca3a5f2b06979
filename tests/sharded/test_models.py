"""A sharded quantized model equals the unsharded one, and no weight is gathered."""

from __future__ import annotations

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from tests.arrays import array

D, F, L = 64, 256, 2
RECIPES = {
    "w8a8": jq.w8a8(),
    "w8a16": jq.w8a16(),
    "w4a16": jq.w4a16(group=32),
    "w4a8": jq.w4a8(group=32),
    "nf4": jq.nf4(group=32),
}
# Megatron's split: up by columns, down by rows; the embedding by its vocabulary
SPECS = {"emb": P("model", None), "up": P(None, None, "model"), "down": P(None, "model", None)}


def fn(p, ids):
    h = jnp.take(p["emb"], ids, axis=0, mode="clip")

    def block(h, layer):
        up = jnp.einsum("bd,df->bf", h, layer["up"])
        return h + jnp.einsum("bf,fd->bd", jnp.tanh(up), layer["down"]), None

    return lax.scan(block, h, {"up": p["up"], "down": p["down"]})[0]


def dense(p, h):
    """Without a lookup, whose sharding explicit meshes cannot infer."""

    def block(h, layer):
        up = jnp.tanh(jnp.dot(h, layer["up"], out_sharding=P("data", "model")))
        return h + jnp.dot(up, layer["down"], out_sharding=P("data", None)), None

    return lax.scan(block, h, {"up": p["up"], "down": p["down"]})[0]


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = {"emb": (128, D), "up": (L, D, F), "down": (L, F, D)}
    return {k: array(rng.standard_normal(s) / 8) for k, s in shapes.items()}


def place(params, mesh):
    return {k: jax.device_put(v, NamedSharding(mesh, SPECS[k])) for k, v in params.items()}


def gathers(text: str) -> list[str]:
    """Element types and shapes that an all-gather brings together."""
    return re.findall(r"= (\S+) all-gather(?:-start)?\(", text)


@pytest.mark.parametrize("name", RECIPES)
def test_automatic_mesh(name: str, params) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    ids = jnp.arange(16)
    want_params, _ = jq.ptq(fn, params, RECIPES[name], ids)
    want = jax.jit(jq.quantized(fn))(want_params, ids)

    sharded = place(params, mesh)
    qparams, _ = jq.ptq(fn, sharded, RECIPES[name], ids)
    for path in SPECS:  # one shard of codes is a fraction of the whole
        codes = qparams[path].codes
        assert codes.addressable_shards[0].data.size * 4 == codes.size, path
    batch = jax.device_put(ids, NamedSharding(mesh, P("data")))
    chex.assert_trees_all_equal(*map(codes_of, (qparams, want_params)))
    call = jax.jit(jq.quantized(fn))
    np.testing.assert_allclose(call(qparams, batch), want, rtol=1e-5, atol=1e-5)
    text = call.lower(qparams, batch).compile().as_text()
    weights = {q.codes.shape[-2:] for q in jax.tree.leaves(qparams, is_leaf=jq_leaf)}
    for found in gathers(text):
        shape = tuple(int(n) for n in re.search(r"\[([\d,]*)\]", found)[1].split(",") if n)
        assert not found.startswith(("s8", "u8")), f"gathers codes: {found}"
        assert shape[-2:] not in weights, f"gathers a weight: {found}"


def jq_leaf(x) -> bool:
    return isinstance(x, jq.QTensor)


def codes_of(tree):
    return jax.tree.map(lambda q: q.codes, tree, is_leaf=jq_leaf)


@pytest.mark.parametrize("name", RECIPES)
def test_explicit_mesh(name: str, params) -> None:
    layers = {k: params[k] for k in ("up", "down")}
    h = array(np.random.default_rng(1).standard_normal((16, D)))

    def plain(p, h):
        block = lambda h, q: (h + jnp.tanh(h @ q["up"]) @ q["down"], None)
        return lax.scan(block, h, p)[0]

    want_params, _ = jq.ptq(plain, layers, RECIPES[name], h)
    want = jax.jit(jq.quantized(plain))(want_params, h)

    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        sharded = place(layers, mesh)
        rows = jax.device_put(h, NamedSharding(mesh, P("data", None)))
        qparams, _ = jq.ptq(dense, sharded, RECIPES[name], rows)
        chex.assert_trees_all_equal(*map(codes_of, (qparams, want_params)))
        call = jax.jit(jq.quantized(dense))
        got = call(qparams, rows)
        assert jax.typeof(got).sharding.spec[0] == "data"
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        if name == "w8a8":
            text = call.lower(qparams, rows).as_text()
            assert len(re.findall(r"dot_general.*xi8>, tensor<[0-9x]*xi8>", text)) == 2


def test_inside_shard_map(params) -> None:
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    weights = {"up": params["up"][0], "down": params["down"][0]}
    h = array(np.random.default_rng(2).standard_normal((4, D)))

    def plain(p, h):
        return jnp.tanh(h @ p["up"]) @ p["down"]

    specs = {"up": P(None, "model"), "down": P("model")}

    @jax.shard_map(mesh=mesh, in_specs=(specs, P()), out_specs=P())
    def parallel(p, h):
        return lax.psum(jnp.tanh(h @ p["up"]) @ p["down"], "model")

    qparams, report = jq.ptq(parallel, weights, jq.w8a16(), h)
    assert not report.events
    want = jax.jit(jq.quantized(plain))(qparams, h)
    got = jax.jit(jq.quantized(parallel))(qparams, h)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("spec", [P("model", None), P(None, "model")], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_out_sharding_is_honoured_and_gradients_follow(name: str, spec, params) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        w = jax.device_put(params["up"][0], NamedSharding(mesh, spec))
        h = jnp.ones((8, D))
        product = lambda p, h: jnp.dot(h, p["w"], out_sharding=P("data", None))
        qparams, _ = jq.ptq(product, {"w": w}, RECIPES[name], h)
        loss = lambda fn, p: lambda h: jnp.sum(jnp.sin(fn(p, h)))
        got = jax.jit(jq.quantized(product))(qparams, h)
        assert jax.typeof(got).sharding.spec == P("data", None)
        grad = jax.jit(jax.grad(loss(jq.quantized(product), qparams)))(h)
        dense = jq.dequantize_params(qparams)
        want = jax.jit(jax.grad(loss(product, dense)))(h)
        np.testing.assert_allclose(grad, want, rtol=2e-2, atol=2e-2)
