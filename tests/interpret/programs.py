"""Functions as users write them, one for each thing the interpreter must carry through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

D, F, B, L = 16, 32, 4, 3


@dataclasses.dataclass(frozen=True)
class Program:
    """A function with its params and arguments.

    `dots` contractions must run on codes; `dequantized` names the primitives that may not.
    `rounds` says that the program itself rounds its weights to bfloat16.
    """

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    dots: int
    dequantized: tuple[str, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    rounds: bool = False


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    values = np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[-1])
    return jax.device_put(values.astype(np.float32).astype(dtype))


def half(a: jax.Array) -> jax.Array:
    return jax.device_put(np.asarray(a).astype(jnp.bfloat16))


x = normal(0, B, D)
w = normal(1, D, F)
v = normal(2, F, D)
sq = normal(3, D, D)
stack = normal(4, L, D, D)
first = np.asarray(stack)[0]


def mlp(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["w"]) @ p["v"]


@jax.jit
def helper(x: Any, w: Any) -> Any:
    return jnp.tanh(x @ w)


def helpers(p: Any, x: Any) -> Any:
    for i in range(4):
        x = helper(x, p[f"w{i}"])
    return x


def scan_layers(p: Any, x: Any) -> Any:
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), h.sum()), x, p["w"])


def scan_remat(p: Any, x: Any) -> Any:
    block = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
    return lax.scan(block, x, p["w"])[0]


def recurrent(p: Any, xs: Any) -> Any:
    def cell(h: Any, x: Any) -> Any:
        h = jnp.tanh(x @ p["in"] + h @ p["hidden"])
        return h, h

    return lax.scan(cell, jnp.zeros((B, D)), xs)[1]


def decode(p: Any, x: Any) -> Any:
    """Params in the carry, as decode loops have them."""

    def step(carry: Any) -> Any:
        p, h, n = carry
        return p, jnp.tanh(h @ p["w"]), n + 1

    return lax.while_loop(lambda c: c[2] < 3, step, (p, x, 0))[1]


def changed_carry(p: Any, x: Any) -> Any:
    return lax.fori_loop(0, 2, lambda _, c: (c[0] * 0.5, c[1] + x @ c[0]), (p["w"], x))[1]


def branch(p: Any, x: Any) -> Any:
    return lax.cond(x.sum() > 0, lambda w, v: x @ w, lambda w, v: (x @ v) * 2, p["w"], p["v"])


def passed_on(p: Any, x: Any) -> Any:
    return x @ lax.cond(x.sum() > 0, lambda w, v: w, lambda w, v: v, p["w"], p["v"])


@jax.custom_jvp
def soft(x: Any) -> Any:
    return jnp.log1p(jnp.exp(x))


soft.defjvp(lambda primals, tangents: (soft(*primals), jax.nn.sigmoid(primals[0]) * tangents[0]))


@jax.custom_vjp
def dense_vjp(x: Any, w: Any) -> Any:
    return x @ w


dense_vjp.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


def dynamic_layer(p: Any, x: Any) -> Any:
    return lax.fori_loop(0, L, lambda i, h: jnp.tanh(h @ p["w"][i]), x)


def fused(p: Any, x: Any) -> Any:
    q, k, v = jnp.split(p["qkv"], 3, axis=1)
    return x @ q + (x @ k) * (x @ v)


def fused_heads(p: Any, x: Any) -> Any:
    heads = p["qkv"].reshape(D, 3, 4, D)
    return jnp.einsum("bd,dthk->bthk", x, heads)


def experts(p: Any, x: Any) -> Any:
    return lax.ragged_dot(x, p["w"], jnp.array([1, 3, 0], jnp.int32))


def callbacks(p: Any, x: Any) -> Any:
    jax.debug.print("row {r}", r=x[0, 0])
    y = x @ p["w"]
    return jax.pure_callback(lambda a: np.asarray(a) * 2, jax.typeof(y), y)


def dropout(p: Any, x: Any, key: Any) -> Any:
    keep = jax.random.bernoulli(key, 0.8, x.shape)
    return jnp.where(keep, x, 0.0) @ p["w"]


def options(p: Any, x: Any, *, act: str, scale: float, bias: bool, extra: Any = None) -> Any:
    y = {"tanh": jnp.tanh, "relu": jax.nn.relu}[act](x @ p["w"]) * scale
    return y + 1 if bias and extra is None else y


def conv(p: Any, x: Any) -> Any:
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, p["k"], (2, 1), "SAME", dimension_numbers=numbers)
    return lax.conv_transpose(y, p["t"], (2, 2), "SAME", dimension_numbers=numbers)


def attention(p: Any, x: Any) -> Any:
    q, k, v = (jnp.einsum("bsd,dhk->bshk", x, p[n]) for n in "qkv")
    return jnp.einsum("bshk,hkd->bsd", jax.nn.dot_product_attention(q, k, v), p["o"])


# what is made here is made by NumPy: by `jnp` it would be a program for each shape at every import
_PROGRAMS = {
    "mlp": Program(mlp, {"w": w, "v": v}, (x,), 2),
    "jitted helper": Program(helpers, {f"w{i}": first * (i + 1) for i in range(4)}, (x,), 1),
    "weight on the left": Program(lambda p, x: p["w"].T @ x.T, {"w": w}, (x,), 1),
    "transposed weight": Program(
        lambda p, x: x @ p["w"].T, {"w": np.asarray(v) @ np.asarray(sq)}, (normal(5, B, D),), 1
    ),
    "tied both ways": Program(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, {"w": w}, (x,), 2),
    "several contracted axes": Program(
        lambda p, x: jnp.einsum("bhk,hkd->bd", x, p["w"]),
        {"w": normal(6, 4, 8, D)},
        (normal(7, B, 4, 8),),
        1,
    ),
    "batch axis": Program(
        lambda p, x: jnp.einsum("ebd,edf->ebf", x, p["w"]),
        {"w": normal(8, 3, D, F)},
        (normal(9, 3, B, D),),
        1,
    ),
    "batch axis in the middle": Program(
        lambda p, x: jnp.einsum("bed,def->bef", x, p["w"]),
        {"w": normal(8, D, 3, F)},
        (normal(9, B, 3, D),),
        1,
    ),
    "scan": Program(scan_layers, {"w": stack}, (x,), 1),
    "scan over remat": Program(scan_remat, {"w": stack}, (x,), 1),
    "scan over the last axis": Program(
        lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, jnp.moveaxis(p["w"], 1, 0))[
            0
        ],
        {"w": np.moveaxis(np.asarray(stack), 0, 1)},
        (x,),
        1,
    ),
    "recurrent": Program(
        recurrent, {"in": sq, "hidden": np.asarray(sq).T}, (normal(10, 5, B, D),), 2
    ),
    "decode loop": Program(decode, {"w": sq}, (x,), 1),
    "branch": Program(branch, {"w": w, "v": 2 * np.asarray(w)}, (x,), 2),
    "custom_jvp beside": Program(lambda p, x: soft(x @ p["w"]), {"w": w}, (x,), 1),
    "custom_jvp around": Program(lambda p, x: jax.jit(jax.nn.relu)(x @ p["w"]), {"w": w}, (x,), 1),
    "custom_vjp with a site": Program(lambda p, x: dense_vjp(x, p["w"]), {"w": w}, (x,), 1),
    "python loop over a stack": Program(
        lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"][0]) @ p["w"][1]) @ p["w"][2],
        {"w": stack},
        (x,),
        3,
    ),
    "loop index into a stack": Program(dynamic_layer, {"w": stack}, (x,), 1),
    "fused and split": Program(fused, {"qkv": normal(11, D, 3 * F)}, (x,), 3),
    "fused and reshaped": Program(fused_heads, {"qkv": normal(12, D, 12 * D)}, (x,), 1),
    "joined": Program(
        lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1),
        {"w": w, "v": 3 * np.asarray(w)},
        (x,),
        1,
    ),
    "barrier, name, cast": Program(
        lambda p, x: (
            x
            @ lax.optimization_barrier(
                checkpoint_name(p["w"], "w").astype(jnp.bfloat16).astype(jnp.float32)
            )
        ),
        {"w": w},
        (x,),
        1,
        rounds=True,
    ),
    "scaled weight": Program(lambda p, x: x @ -(p["w"] * 2.0 / 3.0), {"w": w}, (x,), 1),
    "masked weight": Program(
        lambda p, x: x @ (p["w"] * jnp.tri(D, F)) + x @ p["v"], {"w": w, "v": w}, (x,), 1, ("mul",)
    ),
    "embedding": Program(
        lambda p, i: jnp.take(p["e"], i, axis=0) @ p["w"],
        {"e": normal(13, 50, D), "w": w},
        (np.array([[1, 49], [0, 7]], np.int32),),
        1,
    ),
    "tied embedding": Program(
        lambda p, i: jnp.tanh(p["e"][i]) @ p["e"].T,
        {"e": normal(13, 50, D)},
        (np.arange(6, dtype=np.int32),),
        1,
    ),
    "experts": Program(experts, {"w": stack}, (x,), 1),
    "callbacks": Program(callbacks, {"w": w}, (x,), 1),
    "dropout": Program(dropout, {"w": w}, (x, jax.random.key(3)), 1),
    "keyword and static arguments": Program(
        options,
        {"w": w},
        (x,),
        1,
        kwargs=(("act", "relu"), ("scale", 0.5), ("bias", True), ("extra", None)),
    ),
    "convolutions": Program(
        conv,
        {"k": normal(14, 3, 3, 8, 16), "t": normal(15, 2, 2, 16, 8)},
        (normal(16, 2, 6, 5, 8),),
        2,
    ),
    "attention": Program(
        attention,
        {n: normal(17, D, 4, 8) for n in "qkv"} | {"o": normal(18, 4, 8, D)},
        (normal(19, 2, 5, D),),
        4,
    ),
    "bfloat16": Program(
        mlp,
        {"w": half(w), "v": half(v)},
        (half(x),),
        2,
        rounds=True,
    ),
    "preferred type": Program(
        lambda p, x: lax.dot_general(
            x,
            p["w"],
            (((1,), (0,)), ((), ())),
            precision="highest",
            preferred_element_type=jnp.float32,
        ),
        {"w": half(w)},
        (half(x),),
        1,
        rounds=True,
    ),
    "nested containers": Program(
        lambda p, x: {"y": (x @ p[0]["a"][1], None), "p": p[0]["b"]},
        ({"a": [None, w], "b": np.arange(3, dtype=np.int32)},),
        (x,),
        1,
    ),
}
PROGRAMS = {
    name: dataclasses.replace(p, params=jax.device_put(p.params), args=jax.device_put(p.args))
    for name, p in _PROGRAMS.items()
}
