"""Functions with activations to observe, each beside a forward pass written out by hand.

`seen` runs eagerly and without loops of JAX's; it yields every operand that a site takes, as
`(key, operand, layer, array)`, with `layer` an index into the statistics' leading axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

D, B, L, T = 8, 4, 3, 5
Seen = Iterator[tuple[str, str, tuple[int, ...], Any]]


@dataclasses.dataclass(frozen=True)
class Program:
    """A function, its params, the same by hand, and groups of sites that take one array."""

    fn: Callable[..., Any]
    params: Any
    seen: Callable[..., Seen]
    batches: list[Any]
    shared: tuple[tuple[str, ...], ...] = ()


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    values = np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[-1])
    return jax.device_put(values.astype(np.float32).astype(dtype))


def batches(*shape: int, dtype: Any = jnp.float32) -> list[jax.Array]:
    made = [np.asarray(normal(100 + n, *shape, dtype=dtype)) for n in range(3)]
    return jax.device_put([(a * (1 + n)).astype(dtype) for n, a in enumerate(made)])


def dense(p, x):
    return jnp.maximum(x @ p["a"], 0) @ p["b"]


def dense_seen(p, x) -> Seen:
    yield "a", "lhs", (), x
    yield "b", "lhs", (), jnp.maximum(x @ p["a"], 0)


CONV = {"padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def conv(p, x):
    y = jnp.tanh(lax.conv_general_dilated(x, p["k"], (1, 1), **CONV))
    return lax.conv_general_dilated(y, p["l"], (2, 2), **CONV).mean((1, 2))


def conv_seen(p, x) -> Seen:
    yield "k", "lhs", (), x
    yield "l", "lhs", (), jnp.tanh(lax.conv_general_dilated(x, p["k"], (1, 1), **CONV))


def attention(p, x):
    q, k, v = (jnp.einsum("btd,de->bte", x, p["attn"][name]) for name in "qkv")
    scores = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k))
    return jnp.einsum("bqk,bkd->bqd", scores, v)


def attention_seen(p, x) -> Seen:
    q, k, v = (x @ p["attn"][name] for name in "qkv")
    for name in "qkv":
        yield f"attn/{name}", "lhs", (), x
    yield from (("attn", "lhs", (), q), ("attn", "rhs", (), k))
    scores = jax.nn.softmax(q @ k.transpose(0, 2, 1))
    yield from (("attn#1", "lhs", (), scores), ("attn#1", "rhs", (), v))


def tied(p, ids):
    return jnp.tanh(p["table"][ids] @ p["w"]) @ p["table"].T


def tied_seen(p, ids) -> Seen:
    yield "w", "lhs", (), p["table"][ids]
    yield "table#1", "lhs", (), jnp.tanh(p["table"][ids] @ p["w"])


@jax.jit
def helper(x, w):
    return jnp.tanh(x @ w)


def helpers(p, x):
    for name in ("a", "b", "a", "a"):
        x = helper(x, p[name])
    return x


def helpers_seen(p, x) -> Seen:
    for key in ("a", "b", "a#1", "a#2"):
        yield key, "lhs", (), x
        x = jnp.tanh(x @ p[key[0]])


def layer(w, x):
    y = jnp.tanh(x @ w["in"])
    return x + (y @ y.T) @ (y @ w["out"])


def layer_seen(w, x, layer: tuple[int, ...]) -> Seen:
    y = jnp.tanh(x @ w["in"])
    z = y @ w["out"]
    yield "layers/in", "lhs", layer, x
    yield "layers/out", "lhs", layer, y
    yield from (("layers", "lhs", layer, y), ("layers", "rhs", layer, y.T))
    yield from (("layers#1", "lhs", layer, y @ y.T), ("layers#1", "rhs", layer, z))


def layers(p, x):
    """From the last layer to the first, each of them under remat."""
    step = jax.checkpoint(lambda x, w: (layer(w, x), None))
    return lax.scan(step, x, p["layers"], reverse=True)[0]


def layers_seen(p, x) -> Seen:
    for n in reversed(range(L)):
        w = jax.tree.map(lambda a, n=n: a[n], p["layers"])
        yield from layer_seen(w, x, (n,))
        x = layer(w, x)


def nested(p, x):
    """Two groups of layers, walked over in each step of a time loop."""

    def time(x, drive):
        def group(x, ws):
            return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0], None

        return lax.scan(group, x + drive @ p["drive"], p["ws"])[0], None

    return lax.scan(time, x[0], x)[0]


def nested_seen(p, x) -> Seen:
    y = x[0]
    for drive in x:
        yield "drive", "lhs", (), drive
        y = y + drive @ p["drive"]
        for i, j in np.ndindex(2, L):
            yield "ws", "lhs", (i, j), y
            y = jnp.tanh(y @ p["ws"][i, j])


def recurrent(p, x):
    def cell(h, x_t):
        h = jnp.tanh(x_t @ p["x"] + h @ p["h"])
        return h, h @ p["y"]

    return lax.scan(cell, jnp.zeros((B, D)), x)[1]


def recurrent_seen(p, x) -> Seen:
    h = jnp.zeros((B, D))
    for x_t in x:
        yield "x", "lhs", (), x_t
        yield "h", "lhs", (), h
        h = jnp.tanh(x_t @ p["x"] + h @ p["h"])
        yield "y", "lhs", (), h


def loop(p, x):
    """As many steps as the first value says, which no trace knows."""
    steps = (jnp.abs(x[0, 0]) * 4).astype(int) + 1
    return lax.while_loop(
        lambda c: c[0] < steps, lambda c: (c[0] + 1, jnp.tanh(2 * c[1] @ p["w"])), (0, x)
    )[1]


def loop_seen(p, x) -> Seen:
    for _ in range(int(np.abs(x[0, 0]) * 4) + 1):
        yield "w", "lhs", (), 2 * x
        x = jnp.tanh(2 * x @ p["w"])


def branches(p, x):
    return lax.cond(x[0, 0] > 0, lambda x: x @ p["yes"], lambda x: (3 * x) @ p["no"], x) @ p["out"]


def branches_seen(p, x) -> Seen:
    name = "yes" if x[0, 0] > 0 else "no"
    x = x if name == "yes" else 3 * x
    yield name, "lhs", (), x
    yield "out", "lhs", (), x @ p[name]


def rows(p, x):
    """One row at a time under `vmap`, through a rule of its own and two kernels joined."""

    @jax.custom_vjp
    def project(w, row):
        return row @ w

    project.defvjp(
        lambda w, row: (row @ w, (w, row)), lambda r, g: (jnp.outer(r[1], g), g @ r[0].T)
    )

    def row(x):
        return project(p["w"], jnp.tanh(x)) @ jnp.concatenate([p["k"], p["v"]], axis=1)

    return jax.vmap(row)(x)


def rows_seen(p, x) -> Seen:
    yield "w", "lhs", (), jnp.tanh(x)
    for key in ("k", "v"):
        yield key, "lhs", (), jnp.tanh(x) @ p["w"]


def square(seed: int, *names: str) -> dict[str, jax.Array]:
    return {name: normal(seed + n, D, D) for n, name in enumerate(names)}


def stacked(seed: int, *names: str, lead: tuple[int, ...] = (L,)) -> dict[str, jax.Array]:
    return {name: normal(seed + n, *lead, D, D) for n, name in enumerate(names)}


HALF = jnp.bfloat16
KERNELS = {"k": normal(2, 3, 3, 2, D), "l": normal(3, 3, 3, D, 4)}
IDS = jax.device_put([np.array([[1, 5], [0, 2 + n]], np.int32) for n in range(3)])

PROGRAMS: dict[str, Program] = {
    "dense": Program(dense, square(1, "a", "b"), dense_seen, batches(B, D)),
    "bfloat16": Program(
        dense,
        jax.tree.map(lambda a: jax.device_put(np.asarray(a).astype(HALF)), square(1, "a", "b")),
        dense_seen,
        batches(B, D, dtype=HALF),
    ),
    "conv": Program(conv, KERNELS, conv_seen, batches(2, 6, 6, 2)),
    "attention": Program(
        attention,
        {"attn": square(4, *"qkv")},
        attention_seen,
        batches(2, T, D),
        (("attn/q", "attn/k", "attn/v"),),
    ),
    "tied": Program(tied, {"table": normal(5, 9, D), "w": normal(6, D, D)}, tied_seen, IDS),
    "helpers": Program(helpers, square(7, "a", "b"), helpers_seen, batches(B, D)),
    "layers": Program(
        layers,
        {"layers": stacked(8, "in", "out")},
        layers_seen,
        batches(T, D),
        (("layers/out", "layers"),),
    ),
    "nested": Program(
        nested,
        {**stacked(9, "ws", lead=(2, L)), **square(19, "drive")},
        nested_seen,
        batches(T, B, D),
    ),
    "recurrent": Program(recurrent, square(10, *"xhy"), recurrent_seen, batches(T, B, D)),
    "loop": Program(loop, square(11, "w"), loop_seen, batches(B, D)),
    "branches": Program(
        branches,
        square(12, "yes", "no", "out"),
        branches_seen,
        [*batches(B, D), jax.device_put(-np.asarray(batches(B, D)[0]))],
    ),
    "rows": Program(rows, square(13, *"wkv"), rows_seen, batches(B, D), (("k", "v"),)),
}
