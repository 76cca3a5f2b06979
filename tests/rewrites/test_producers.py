"""Factors of input channels absorbed before a weight: the rules, each by a small function."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxquant.rewrites.rescale import rescale
from tests.rewrites.producing import X, check, drawn, find

# Small functions, one for each rule


def mlp(act):
    def fn(p, x):
        return act(x @ p["up"] + p["b"][None]) @ p["down"]

    return fn


MLP = {"up": (6, 8), "b": (8,), "down": (8, 4)}


PASSING = {
    "relu": jax.nn.relu,
    "leaky": jax.nn.leaky_relu,
    "abs": jnp.abs,
    "where": lambda h: jnp.where(h > 0, h, 0.1 * h),
    "sign": lambda h: h * lax.stop_gradient(jnp.sign(h)),
    "identity": lambda h: h,
    "negative half": lambda h: -0.5 * h,
    "quarter": lambda h: h / 4.0,
    "heads": lambda h: h.reshape(5, 2, 4).transpose(1, 0, 2).transpose(1, 0, 2).reshape(5, 8),
    "reverse": lambda h: h[:, ::-1],
    "rolled": lambda h: jnp.concatenate([h[:, 3:], h[:, :3]], axis=1),
    "padded rows": lambda h: jnp.pad(h, ((1, 1), (0, 0))),
    "mean over rows": lambda h: h.mean(0, keepdims=True),
    "max over rows": lambda h: h.max(0, keepdims=True),
    "jit": jax.jit(jax.nn.relu),
    "remat": jax.checkpoint(jax.nn.relu),
    "dropout": lambda h: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), h, 0.0),
}


@pytest.mark.parametrize("name", PASSING)
def test_functions_that_commute(name):
    expected = {"up": "linear", "b": "bias"}
    check(mlp(PASSING[name]), drawn(MLP), (X,), "down", expected)


REFUSED = {
    "gelu": (jax.nn.gelu, "`"),
    "tanh": (jnp.tanh, "it comes from `tanh`"),
    "softmax": (lambda h: jax.nn.softmax(h), "it comes from|is also used by"),
    "shifted": (lambda h: h + 1.0, "it is computed with a constant"),
    "square": (jnp.square, "does not commute"),
    "product with itself": (lambda h: h * h, "also used by `mul`"),
    "relu6": (jax.nn.relu6, "constant|clamp|min"),
    "norm": (lambda h: h / jnp.linalg.norm(h, axis=-1, keepdims=True), "is also used by"),
    "padded channels": (lambda h: jnp.pad(h[:, 1:], ((0, 0), (1, 0))), "channels are padded"),
    "pooled": (
        lambda h: jnp.repeat(h.sum(-1, keepdims=True), 8, axis=-1),
        "only one value|one val",
    ),
    "sorted": (lambda h: jnp.sort(h, axis=-1), "does not commute"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_functions_that_do_not_commute(name):
    act, reason = REFUSED[name]
    found = find(mlp(act), drawn(MLP), (X,), "down")
    assert isinstance(found, str)
    assert re.search(reason, found), found


def test_other_readers_refuse():
    p = drawn(MLP)

    def reason(fn, params=p, paths=("down",)):
        found = find(fn, params, (X,), *paths)
        assert isinstance(found, str)
        return found

    relu = jax.nn.relu

    # its activation is returned, added later, contracted by another weight, its producer used again
    def returned(p, x):
        h = relu(x @ p["up"])
        return h @ p["down"], h

    assert "its activation is also a result of the function" in reason(returned)

    def residual(p, x):
        h = relu(x @ p["up"])
        return (h + jnp.tanh(h @ p["down"] @ p["back"])) @ p["last"]

    more = {**p, **drawn({"back": (4, 8), "last": (8, 2)}, 1)}
    assert "also used by `add`" in reason(residual, more)

    def two(p, x):
        h = relu(x @ p["up"])
        return h @ p["down"] + h @ p["other"]

    more = {**p, **drawn({"other": (8, 4)}, 1)}
    assert "also contracted with other" in reason(two, more)
    check(two, more, (X,), ("down", "other"), {"up": "linear"})
    assert reason(lambda p, x: relu(x @ p["up"]) @ p["down"] + p["up"].sum()).startswith(
        "up is also"
    )
    assert "down is used" in reason(lambda p, x: relu(x @ p["up"]) @ p["down"] + p["down"].sum())
    assert "input of the function" in reason(lambda p, x: x @ p["up"], paths=("up",))
    assert "not contracted" in reason(lambda p, x: x @ p["up"] + p["b"].sum(), paths=("down",))
    table = {"table": jnp.ones((9, 6)), "w": jnp.ones((6, 2))}
    found = find(lambda p, i: p["table"][i] @ p["w"], table, (jnp.arange(3),), "w")
    assert found == "it comes from a lookup of rows"


def test_products_choose_a_factor():
    shapes = {"gate": (6, 8), "up": (6, 8), "down": (8, 4)}

    def glu(p, x):
        return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]

    check(glu, drawn(shapes), (X,), "down", {"up": "linear"})

    def other_order(p, x):
        return ((x @ p["up"]) * jax.nn.silu(x @ p["gate"])) @ p["down"]

    check(other_order, drawn(shapes), (X,), "down", {"up": "linear"})

    def quotient(p, x):
        return (jnp.exp(x @ p["gate"]) / p["b"][None]) @ p["down"]

    check(quotient, drawn({**shapes, "b": (8,)}), (X,), "down", {"b": "norm"})

    def fused(p, x):
        a, b = jnp.split(x @ p["both"], 2, axis=-1)
        return (jax.nn.gelu(a) * b) @ p["down"]

    found = check(fused, drawn({"both": (6, 16), "down": (8, 4)}), (X,), "down", {"both": "linear"})
    [both] = found.producers
    assert both.index.tolist() == [[-1] * 8 + list(range(8))]

    def sliced(p, x):
        h = x @ p["both"]
        return (jax.nn.gelu(h[:, 8:]) * h[:, :8]) @ p["down"]

    check(sliced, drawn({"both": (6, 16), "down": (8, 4)}), (X,), "down", {"both": "linear"})


def test_constant_offset_of_a_scale():
    def fn(p, x):
        normed = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
        return (normed * (1.0 + p["scale"])[None]) @ p["w"]

    p = drawn({"scale": (6,), "w": (6, 3)})
    found = check(fn, p, (X,), "w", {"scale": "norm"})
    assert found.producers[0].offset == 1.0 and found.kind == "norm"


def test_mistakes():
    fn, params = mlp(jax.nn.relu), drawn(MLP)
    with pytest.raises(ValueError, match="no leaf 'dwn'"):
        rescale(fn, params, {"dwn": jnp.ones(8)}, X)
    with pytest.raises(ValueError, match=r"nothing absorbs the factors of .*up.*input of the"):
        rescale(fn, params, {"up": jnp.ones(6)}, X)
    with pytest.raises(ValueError, match=r"expected shape \[8\], got \[7\]"):
        rescale(fn, params, {"down": jnp.ones(7)}, X)
