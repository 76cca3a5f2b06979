"""Factors of input channels absorbed before a weight: whole models, and producers of every kind."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxquant as jq
from jaxquant.observers.inputs import InputStats
from jaxquant.rewrites.absorb import Absorber, absorb, scaled_leaf
from jaxquant.rewrites.rescale import rescale
from tests.arrays import array
from tests.rewrites.producing import X, check, drawn, find, names, randomized

# Models


class Block(nn.Module):
    """A transformer block; the norm before its parts or after the sum."""

    post: bool = False
    rms: bool = False
    act: str = "gelu"

    @nn.compact
    def __call__(self, x, _=None):
        norm = nn.RMSNorm if self.rms else nn.LayerNorm
        attn = nn.MultiHeadDotProductAttention(num_heads=2, name="attn")
        act = getattr(nn, self.act)

        def mlp(h):
            return nn.Dense(8, name="down")(act(nn.Dense(16, name="up")(h)))

        if self.post:
            x = norm(name="ln1")(x + attn(x))
            return norm(name="ln2")(x + mlp(x)), None
        x = x + attn(norm(name="ln1")(x))
        return x + mlp(norm(name="ln2")(x)), None


class Model(nn.Module):
    post: bool = False
    rms: bool = False
    act: str = "gelu"
    scanned: bool = False

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 8, name="embed")(ids)
        if self.scanned:
            layers = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            x, _ = layers(self.post, self.rms, self.act, name="layers")(x, None)
        else:
            for n in range(2):
                x, _ = Block(self.post, self.rms, self.act, name=f"layer_{n}")(x)
        return nn.Dense(5, name="head")(nn.LayerNorm(name="last")(x))


IDS = jnp.arange(6).reshape(2, 3)


def made(model, *args, seed=0):
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), *args))
    return randomized(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), params), seed)


@pytest.mark.slow
@pytest.mark.parametrize(("scanned", "rms"), [(False, True), (True, False)])
def test_pre_norm_transformer(scanned, rms):
    model = Model(rms=rms, act="relu", scanned=scanned)
    params = made(model, IDS)
    layer = "params/layers" if scanned else "params/layer_1"

    def of(norm):
        found = {f"{layer}/{norm}/scale": "norm"}
        return found if rms else {**found, f"{layer}/{norm}/bias": "bias"}

    def dense(name):
        return {f"{layer}/{name}/kernel": "linear", f"{layer}/{name}/bias": "bias"}

    qkv = [f"{layer}/attn/{n}/kernel" for n in ("query", "key", "value")]
    args = model.apply, params, (IDS,)
    found = check(*args, qkv, of("ln1"))
    assert found.kind == "norm" and found.channels == 8
    assert found.layers == ((3,) if scanned else ())
    check(*args, f"{layer}/up/kernel", of("ln2"))
    found = check(*args, f"{layer}/attn/out/kernel", dense("attn/value"))
    assert found.kind == "linear" and found.tied is None
    assert {a.axes[-2:] for a in found.weights} == {(1, 2) if scanned else (0, 1)}
    check(*args, f"{layer}/down/kernel", dense("up"))
    check(*args, "params/head/kernel", {"params/last/scale": "norm", "params/last/bias": "bias"})
    assert "also contracted with" in find(*args, *qkv[:2])


@pytest.mark.slow
def test_gelu_and_post_norm_are_refused():
    model = Model()
    params = made(model, IDS)
    assert isinstance(find(model.apply, params, (IDS,), "params/layer_0/down/kernel"), str)
    model = Model(post=True)
    params = made(model, IDS)
    for n in range(2):
        layer = f"params/layer_{n}"
        qkv = [f"{layer}/attn/{m}/kernel" for m in ("query", "key", "value")]
        assert "also used by `add`" in find(model.apply, params, (IDS,), f"{layer}/up/kernel")
        if n:
            assert "also used by `add`" in find(model.apply, params, (IDS,), *qkv)
        check(
            model.apply, params, (IDS,), f"{layer}/attn/out/kernel",
            {f"{layer}/attn/value/kernel": "linear", f"{layer}/attn/value/bias": "bias"},
        )  # fmt: skip


def llama(p, ids, repeat):
    """Rotary embeddings left out; grouped heads by `jnp.repeat` or by an einsum over groups."""

    def norm(x, scale):
        y = x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)
        return y * scale[None, None]

    def layer(x, p):
        h = norm(x, p["norm1"])
        b, t, _ = h.shape
        q = (h @ p["q"]).reshape(b, t, 4, 3)
        k = (h @ p["k"]).reshape(b, t, 2, 3)
        v = (h @ p["v"]).reshape(b, t, 2, 3)
        if repeat:
            k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
            a = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
            o = jnp.einsum("bhts,bshd->bthd", a, v).reshape(b, t, 12)
        else:
            q = q.reshape(b, t, 2, 2, 3)
            a = jax.nn.softmax(jnp.einsum("btgrd,bsgd->bgrts", q, k))
            o = jnp.einsum("bgrts,bsgd->btgrd", a, v).reshape(b, t, 12)
        x = x + o @ p["o"]
        h = norm(x, p["norm2"])
        return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"], None

    x, _ = lax.scan(layer, p["embed"][ids], p["layers"])
    return norm(x, p["last"]) @ p["embed"].T


LLAMA = {
    "norm1": (2, 6), "q": (2, 6, 12), "k": (2, 6, 6), "v": (2, 6, 6), "o": (2, 12, 6),
    "norm2": (2, 6), "gate": (2, 6, 10), "up": (2, 6, 10), "down": (2, 10, 6),
}  # fmt: skip


@pytest.mark.slow
def test_llama_with_grouped_heads():
    params = {
        "embed": drawn({"e": (11, 6)})["e"],
        "layers": drawn(LLAMA, 1),
        **drawn({"last": (6,)}),
    }

    def fn(p, ids):
        return llama(p, ids, True)

    args = fn, params, (IDS,)
    check(*args, [f"layers/{n}" for n in "qkv"], {"layers/norm1": "norm"})
    check(*args, ["layers/gate", "layers/up"], {"layers/norm2": "norm"})
    check(*args, "layers/down", {"layers/up": "linear"})
    classes = [0, 1, 2, 0, 1, 2, 6, 7, 8, 6, 7, 8]
    for repeat in (True, False):

        def grouped(p, ids, repeat=repeat):
            return llama(p, ids, repeat)

        found = check(grouped, params, (IDS,), "layers/o", {"layers/v": "linear"})
        assert found.tied.tolist() == classes
    # statistics that are tied give factors that are
    rng = np.random.default_rng(0)
    x = array(rng.normal(size=(2, 50, 12)) * rng.uniform(0.1, 9, 12))
    moments = jnp.einsum("lnk,lnj->lkj", x, x) / 50
    stats = InputStats(jnp.full(2, 50.0), abs(x).max(1), abs(x).mean(1), moments, (-2,))
    c, details = jq.awq()(
        [params["layers"]["o"]], [jq.QSpec("int3", jq.PerChannel(1))], found.tie_stats(stats)
    )
    np.testing.assert_allclose(found.tie(c), c, rtol=1e-6)
    assert (details["error"] < details["rounded"]).all()
    # tied to the lookup, whose rows would change
    assert "embed is used by `gather`" in find(*args, "embed")


def test_layers_need_producers_of_their_own():
    def shared(p, x):
        return lax.scan(lambda h, w: ((h * p["scale"][None]) @ w, None), x, p["w"])[0]

    params = drawn({"scale": (6,), "w": (3, 6, 6)})
    assert "not scanned by the same loops" in find(shared, params, (X,), "w")

    def outside(p, x):
        h = x * p["scale"][None]
        return lax.scan(lambda c, w: (c + h @ w, None), x, p["w"])[0]

    assert "not scanned by the same loops" in find(outside, params, (X,), "w")

    def carried(p, x):
        return lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), x, p["w"])[0]

    assert "`carry`" in find(carried, params, (X,), "w")


@pytest.mark.slow
def test_nested_loops_and_moved_layers():
    def fn(p, x):
        def inner(h, q):
            normed = h / jnp.linalg.norm(h)
            return h + (normed * q["scale"][None]) @ q["w"].T, None

        def outer(h, q):
            return lax.scan(inner, h, q)[0], None

        moved = {"scale": p["scale"].transpose(1, 0, 2), "w": jnp.moveaxis(p["w"], 3, 0)}
        return lax.scan(outer, x, moved)[0]

    params = drawn({"scale": (3, 2, 6), "w": (3, 6, 6, 2)})
    found = check(fn, params, (X,), "w", {"scale": "norm"})
    assert found.layers == (2, 3) and found.weights[0].axes == (0, 2, 3)


class Convs(nn.Module):
    act: str = "relu"

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), name="one")(x)
        x = nn.BatchNorm(use_running_average=True, name="bn")(x)
        x = nn.max_pool(getattr(nn, self.act)(x), (2, 2), (2, 2))
        x = nn.Conv(5, (3, 3), name="two")(x)
        x = nn.avg_pool(nn.leaky_relu(x), (2, 2), (2, 2))
        return nn.Dense(3, name="dense")(x.reshape(x.shape[0], -1))


@pytest.mark.slow
def test_convolutions_and_batchnorm():
    model, x = (
        Convs(),
        array(np.random.default_rng(3).normal(size=(2, 8, 8, 3))),
    )
    params = made(model, x)
    bn = {"params/bn/scale": "norm", "params/bn/bias": "bias"}
    found = check(model.apply, params, (x,), "params/two/kernel", bn)
    assert found.channels == 6 and found.weights[0].axes == (2,)
    # a dense layer after flattening: the positions of a channel are tied
    two = {"params/two/kernel": "linear", "params/two/bias": "bias"}
    found = check(model.apply, params, (x,), "params/dense/kernel", two)
    assert found.tied.tolist() == [0, 1, 2, 3, 4] * 4
    assert "input of the function" in find(model.apply, params, (x,), "params/one/kernel")
    model = Convs(act="sigmoid")
    assert "logistic" in find(model.apply, params, (x,), "params/two/kernel")


def test_experts():
    def fn(p, x):
        h = jnp.einsum("td,edh->eth", x, p["up"])
        h = jax.nn.silu(jnp.einsum("td,edh->eth", x, p["gate"])) * h
        return jnp.einsum("eth,ehd->td", h, p["down"])

    params = drawn({"up": (3, 6, 8), "gate": (3, 6, 8), "down": (3, 8, 6)})
    found = find(fn, params, (X,), "down")
    assert names(found) == {"up": "linear"} and found.channels == 24
    check(fn, params, (X,), "down", {"up": "linear"})


def test_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(6, rngs=rngs)
            self.dense = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.dense(self.norm(x))

    graphdef, state = nnx.split(Net(nnx.Rngs(0)))
    fn = lambda s, x: nnx.merge(graphdef, s)(x)
    found = find(fn, state, (X,), "dense/kernel")
    assert names(found) == {"norm/scale": "norm", "norm/bias": "bias"}


# Leaves


@pytest.mark.slow
def test_factors_of_quantized_producers_go_into_their_scales(key):
    a, b = jax.random.split(key)
    w, c = jax.random.normal(a, (24, 16)), jnp.exp(jax.random.normal(b, (16,)))
    params = {"up": w, "down": jnp.ones((16, 2))}
    fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    found = find(fn, params, (jnp.ones((1, 24)),), "down")
    [up] = found.producers
    for spec, storage_last_axes in (
        (jq.QSpec("int8", jq.PerChannel(1)), (0,)),
        (jq.QSpec("int4", jq.PerGroup(8, axis=0)), (0,)),
        (jq.QSpec("uint8", jq.PerChannel(1), symmetric=False), ()),
        (jq.QSpec("nf4", jq.PerGroup(16, axis=0)), (0,)),
    ):
        q = jq.quantize(w, spec, storage_last_axes=storage_last_axes)
        new = scaled_leaf(q, up, c).validate()
        np.testing.assert_array_equal(new.codes, q.codes)
        want = np.asarray(jq.dequantize(q)) / np.asarray(c)[None]
        np.testing.assert_allclose(jq.dequantize(new), want, rtol=1e-6, atol=1e-7)
    for spec in (
        jq.QSpec("int8", jq.PerTensor()),
        jq.QSpec("int8", jq.PerGroup(8, axis=1)),
        jq.QSpec("int8", jq.PerBlock(8, 8)),
        jq.QSpec("mxfp4", jq.PerGroup(8, axis=0)),
    ):
        with pytest.raises(ValueError, match="up is quantized and cannot absorb"):
            scaled_leaf(jq.quantize(w, spec), up, c)


def test_stacked_quantized_producers(key):
    """Heads and their sizes as output axes, layers in front."""
    w = jax.random.normal(key, (3, 6, 2, 4))
    q = jq.quantize(
        w, jq.QSpec("int4", jq.PerGroup(4, axis=0)), storage_last_axes=(0,), batch_axes=1
    )
    index = np.arange(24).reshape(3, 1, 2, 4)
    absorber = Absorber("v", w.shape, index, -1, "linear")
    c = jnp.exp(jax.random.normal(key, (3, 8)))
    new = scaled_leaf(q, absorber, c).validate()
    want = np.asarray(jq.dequantize(q)) / np.asarray(c).reshape(3, 1, 2, 4)
    np.testing.assert_allclose(jq.dequantize(new), want, rtol=1e-6, atol=1e-7)


def test_half_precision():
    fn = lambda p, x: jax.nn.relu((x @ p["up"]).astype(jnp.bfloat16)) @ p["down"]
    params = {"up": jnp.ones((6, 8)), "down": jnp.ones((8, 2), jnp.bfloat16)}
    found = find(fn, params, (X,), "down")
    assert names(found) == {"up": "linear"}
    new = absorb(params, found, jnp.full(8, 3.0))
    assert new["down"].dtype == jnp.bfloat16 and new["up"].dtype == jnp.float32
    assert float(new["down"][0, 0]) == 3.0


@pytest.mark.slow
def test_several_factors_at_once():
    model = Model(rms=True, act="relu")
    params = made(model, IDS)
    rng, factors = np.random.default_rng(0), {}
    for n in range(2):
        layer = f"params/layer_{n}"
        groups = [tuple(f"{layer}/attn/{m}/kernel" for m in ("query", "key", "value"))]
        groups += [(f"{layer}/{m}/kernel",) for m in ("attn/out", "up", "down")]
        for paths in groups:
            width = find(model.apply, params, (IDS,), *paths).channels
            factors[paths] = array(np.exp(rng.normal(size=width)))
    new, found = rescale(model.apply, params, factors, IDS)
    a, b = (np.asarray(jax.jit(model.apply)(p, IDS)) for p in (params, new))
    assert set(found) == set(factors) and np.abs(a - b).max() <= 1e-5 * np.abs(a).max()
