"""Whatever else is done with results that stay integers, values are those of the function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant as jq
from tests.arrays import normal

RECIPE = jq.w8a8_integer(jq.observers.minmax())
relu = jax.nn.relu


X, IMAGES = normal(0, 16, 12), normal(20, 2, 6, 6, 4)


def scaled(by: Any, seed: int, *shape: int) -> jax.Array:
    """In NumPy: each operation of `jnp` would be a program at every import."""
    w = np.random.default_rng(seed).standard_normal(shape) / by
    return jax.device_put(w.astype(np.float32))


PARAMS = {
    "w": scaled(4, 1, 12, 24),
    "b": normal(2, 24),
    "w2": scaled(4, 3, 24, 8),
    "w3": scaled(4, 5, 24, 8),
    "v": scaled(4, 7, 12, 24),
    "bs": normal(9, 2, 24),
    "w4": scaled(6, 8, 48, 8),
    "table": normal(10, 20, 12),
    "rows": normal(11, 16),
    "stack": scaled(4, 12, 3, 12, 12),
    "steps": normal(13, 16),
    "few": scaled(np.where(np.arange(24) < 5, 80, 4), 18, 12, 24),
    **{f"c{i}": scaled(5, 14 + i, 3, 3, 4, 4) for i in range(4)},
}


def conv(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def pre_activation(p: Any, x: jax.Array) -> jax.Array:
    h = conv(x, p["c0"])
    h = h + conv(relu(h), p["c1"])
    return conv(relu(h), p["c2"])


def post_activation(p: Any, x: jax.Array) -> jax.Array:
    h = relu(conv(x, p["c0"]))
    h = relu(h + conv(relu(conv(h, p["c1"])), p["c2"]))
    return conv(h, p["c3"])


def rows_in_a_loop(p: Any, x: jax.Array) -> jax.Array:
    """Vectors over rows, one for each layer, are not vectors over channels."""
    many = jnp.broadcast_to(p["rows"][None, :, None], (3, 16, 12))
    return lax.scan(
        lambda h, layer: (jnp.tanh(h @ layer[0] + layer[1]), None), x, (p["stack"], many)
    )[0]


def rows_out_of_a_loop(p: Any, x: jax.Array) -> jax.Array:
    rows = lax.scan(lambda c, s: (c, jnp.broadcast_to(s, (24,))), 0.0, p["steps"])[1]
    return relu(x @ p["w"] * jnp.abs(rows)) @ p["w2"]


def used_twice(use: Callable[[Any, jax.Array], Any]) -> Callable[..., Any]:
    def fn(p: Any, x: jax.Array) -> Any:
        h = x @ p["w"] + p["b"][None]
        return relu(h) @ p["w2"], use(p, h)

    return fn


class Read(dict):
    """Params that note which of them are read."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.names: dict[str, None] = {}

    def __getitem__(self, name: str) -> Any:
        self.names[name] = None
        return super().__getitem__(name)


def near(got: Any, want: Any, most: float) -> None:
    """All leaves, by the norm of their difference."""
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.linalg.norm(a - b) < most * np.linalg.norm(b)


ELSEWHERE = "its results are also used elsewhere, beyond the range of this input grid"
CASES: dict[str, tuple[Callable[..., Any], Any, list[str]]] = {
    "and moved": (used_twice(lambda p, h: h.reshape(-1)), X, [f"w -> w2: float, {ELSEWHERE}"]),
    "and clipped": (
        used_twice(lambda p, h: jnp.clip(h, -3.0, 3.0)),
        X,
        [f"w -> w2: float, {ELSEWHERE}"],
    ),
    "pre-activation": (
        pre_activation,
        IMAGES,
        [
            f"c0 -> c1: float, {ELSEWHERE}",
            f"c0 -> c2: float, {ELSEWHERE}",
            "c1 -> c2: float, it is added to a float operand",
        ],
    ),
    "post-activation": (
        post_activation,
        IMAGES,
        ["c0 -> c1: int8", "c0 -> c3: int8", "c1 -> c2: int8", "c2 -> c3: int8"],
    ),
    "two biases": (
        lambda p, x: (
            relu(x @ p["w"] + p["bs"][0][None]) @ p["w2"],
            relu(x @ p["v"] + p["bs"][1][None]) @ p["w3"],
        ),
        X,
        ["w -> w2: int8", "v -> w3: int8"],
    ),
    "two gains": (
        lambda p, x: (lambda h: (relu(h * 0.1) @ p["w2"], relu(h * 5.0) @ p["w3"]))(x @ p["w"]),
        X,
        [f"w -> w2: float, {ELSEWHERE}", f"w -> w3: float, {ELSEWHERE}"],
    ),
    "rows in a loop": (
        rows_in_a_loop,
        X,
        ["stack -> add in the root: float, add with a value that varies along non-channel axes"],
    ),
    "rows out of a loop": (
        rows_out_of_a_loop,
        X,
        ["w -> mul in the root: float, mul with a value that varies along non-channel axes"],
    ),
    "joined": (
        lambda p, x: jnp.concatenate([relu(x @ p["w"]), relu(x @ p["v"])], -1) @ p["w4"],
        X,
        ["w -> w4: int8", "v -> w4: int8"],
    ),
    "weights sliced": (
        lambda p, x: relu(x @ p["w"][:, :10] + p["b"][None, :10]) @ p["w2"][:10],
        X,
        ["w -> w2: int8"],
    ),
    "weights reshaped": (
        lambda p, x: (
            relu(
                jnp.einsum("bi,ihd->bhd", x, p["w"].reshape(12, 4, 6)) + p["b"].reshape(1, 4, 6)
            ).reshape(16, 24)
            @ p["w2"]
        ),
        X,
        ["w -> w2: int8"],
    ),
    "weights transposed": (
        lambda p, x: relu(x @ p["w"].T.T + p["b"][None]) @ p["w2"].T.T,
        X,
        ["w -> w2: int8"],
    ),
    "a barrier": (
        lambda p, x: relu(lax.optimization_barrier((x @ p["w"], x))[0]) @ p["w2"],
        X,
        ["w -> optimization_barrier in the root: float, optimization_barrier has no integer form"],
    ),
    "two parts of it": (  # of which the first is small
        lambda p, x: (lambda h: (h[:, :5] @ p["w2"][:5], h @ p["w3"]))(relu(x @ (p["few"]))),
        X,
        [f"few -> w2: float, {ELSEWHERE}", f"few -> w3: float, {ELSEWHERE}"],
    ),
    "looked up": (
        lambda p, t: relu(p["table"][t] @ p["w"] + p["b"][None]) @ p["w2"],
        jax.device_put(np.arange(20, dtype=np.int32)),
        ["w -> w2: int8"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_edges(name: str) -> None:
    fn, x, edges = CASES[name]
    params = Read(PARAMS)
    jax.eval_shape(lambda x: fn(params, x), x)
    params = {name: PARAMS[name] for name in params.names}
    qparams, report = jq.ptq(fn, params, RECIPE, batches=[x])
    assert [str(edge) for edge in report.edges] == edges
    near(*jax.jit(lambda q, p, x: (jq.quantized(fn)(q, x), fn(p, x)))(qparams, params, x), 0.03)


def test_what_is_folded_is_used_only_where_it_belongs() -> None:
    def fn(p: Any, x: jax.Array, s: float) -> jax.Array:
        return relu(x @ p["w"] * s) @ p["w2"]

    params = {name: PARAMS[name] for name in ("w", "w2")}
    qparams, _ = jq.ptq(fn, params, RECIPE, X, 1.0, batches=[(X, 1.0)])
    assert qparams["w"].calibration.folded is not None
    both = jax.jit(lambda q, p: (jq.quantized(fn)(q, X, 0.5), fn(p, X, 0.5)))
    near(*both(qparams, params), 0.03)


def test_what_has_no_integer_sums_is_no_edge() -> None:
    static = RECIPE.rules[0]
    groups = dataclasses.replace(static, pattern="w2", weights=jq.int4(group=4))
    params = {name: PARAMS[name] for name in ("w", "w2")}
    _, report = jq.ptq(
        lambda p, x: relu(x @ p["w"]) @ p["w2"], params, [groups, static], batches=[X]
    )
    reason = "a contraction that is not requantized takes floats"
    assert [str(e) for e in report.edges] == [f"w -> dot_general in the root: float, {reason}"]


def test_a_bias_has_no_gradient() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(relu(x @ p["w"] + p["b"][None]) @ p["w2"])

    params = {name: PARAMS[name] for name in ("w", "b", "w2")}
    qparams, _ = jq.ptq(fn, params, RECIPE, batches=[X])
    with pytest.raises(TypeError, match="between contractions have no gradient"):
        jax.grad(lambda b: jq.quantized(fn)({**qparams, "b": b}, X))(params["b"])


def test_sums_that_leave_no_room_for_a_bias_are_not_kept() -> None:
    bias = np.float32([0.0, 2e4, 1e4, 5e3])
    ones = jax.device_put(np.ones((2, 65000), np.float32))

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return x @ p["w"] + p["b"][None]

    params = jax.device_put({"w": np.ones((65000, 4), np.float32), "b": bias})
    qparams, _ = jq.ptq(fn, params, RECIPE, batches=[ones])
    got = np.asarray(jax.jit(jq.quantized(fn))(qparams, ones))
    np.testing.assert_allclose(got[0], 65000 + bias, rtol=0.01)


def test_a_grid_is_of_use_to_its_own_spec_only() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        return jax.nn.softmax(x @ p["w"] @ x.T) @ x

    params, x = {"w": normal(1, 12, 12)}, X
    recipe = jq.w8a8_static(jq.observers.minmax(), attention=True)
    static, _ = jq.ptq(fn, params, recipe, batches=[x])
    dynamic, _ = jq.ptq(fn, params, jq.w8a8(), x)
    other = jq.Recipe([jq.Rule("**", attention=jq.int4(granularity=jq.PerTensor()))])
    got, want = (jax.jit(jq.quantized(fn, other))(q, x) for q in (static, dynamic))
    near(got, want, 0.1)
