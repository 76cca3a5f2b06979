"""Which results stay integers on their way to the next contraction, and why others do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant as jq
from tests.arrays import normal
from tests.ops import integer_reference as ref
from tests.ptq.networks import (
    ACTIVATIONS,
    TENSOR,
)

pytestmark = pytest.mark.usefixtures("uncontracted")

relu = jax.nn.relu
PARAMS = {name: normal(n, 6, 6) for n, name in enumerate("abcd")} | {"v": normal(9, 6)}
X = normal(20, 5, 6)
RULE = jq.Rule(
    "[abcd]",
    weights=jq.int8(),
    activations=ACTIVATIONS["int8 asymmetric"],
    observer=jq.observers.minmax(),
    requantize="float32",
)


def symmetric(path: str) -> list[jq.Rule]:
    """Rules by which one parameter takes its input on a grid of its own."""
    own = jq.Rule(
        path,
        weights=jq.int8(),
        activations=ACTIVATIONS["int8"],
        observer=jq.observers.minmax(),
        requantize="float32",
    )
    return [own, RULE]


def fused(p, x):
    return relu(x @ p["a"]) @ p["b"]


def moved(p, x):
    y = jnp.flip(relu(x @ p["a"] + p["v"][None]), 0)[:4].T.reshape(2, 3, 4)
    y = jnp.concatenate([y, y[:, ::-1]], 1)
    return jnp.pad(y, ((0, 0), (0, 0), (1, 1))).reshape(-1, 6) @ p["b"]


def with_tanh(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


def residual(p, x):
    h = relu(x @ p["a"])
    return (h + h @ p["b"]) @ p["c"]


def projected(p, x):
    h = relu(x @ p["a"])
    return relu(h @ p["b"] + h @ p["c"]) @ p["d"]


def with_the_input(p, x):
    return (x + x @ p["a"]) @ p["b"]


def of_two_relus(p, x):
    return (relu(x @ p["a"]) + relu(x @ p["b"])) @ p["c"]


def gated(p, x):
    return ((x @ p["a"]) * (x @ p["b"])) @ p["c"]


def twice(p, x):
    h = relu(x @ p["a"])
    return h @ p["b"] + h @ p["c"]


def shared(p, x):
    return relu(relu(x @ p["a"]) @ p["b"]) @ p["b"]


def late_bias(p, x):
    return (relu(x @ p["a"]) + p["v"][None]) @ p["b"]


def in_a_loop(p, x):
    return lax.fori_loop(0, 2, lambda _, x: x @ p["b"], x @ p["a"])


AFTER = "add after a clamp, a move or a sum, where results are codes already"
OTHER = "its input grid differs from that of the first consumer of these results"
DYNAMIC = "a contraction that is not requantized takes floats"
INTEGERS = "a -> b: int8"
EDGES = [
    (fused, RULE, [INTEGERS]),
    (moved, RULE, [INTEGERS]),
    (with_tanh, RULE, ["a -> tanh in the root: float, tanh has no integer form"]),
    (residual, RULE, [INTEGERS, "a -> c: int8", "b -> c: int8"]),
    (projected, RULE, [INTEGERS, "a -> c: int8", "b -> d: int8", "c -> d: int8"]),
    (with_the_input, RULE, ["a -> add in the root: float, the other term is float"]),
    (
        of_two_relus,
        RULE,
        [
            "a -> add in the root: float, neither term is still a sum",
            "b -> add in the root: float, neither term is still a sum",
        ],
    ),
    (
        gated,
        RULE,
        [
            "a -> mul in the root: float, mul of two activations",
            "b -> mul in the root: float, mul of two activations",
        ],
    ),
    (twice, RULE, [INTEGERS, "a -> c: int8"]),
    (twice, symmetric("b"), [INTEGERS, f"a -> c: float, {OTHER}"]),
    (twice, symmetric("c"), [INTEGERS, f"a -> c: float, {OTHER}"]),
    (fused, symmetric("b"), [INTEGERS]),
    (shared, RULE, [INTEGERS, "b -> b#1: float, b is contracted at several sites"]),
    (late_bias, RULE, [f"a -> add in the root: float, {AFTER}"]),
    (
        in_a_loop,
        RULE,
        [f"{name} -> scan in the root: float, scan takes floats" for name in "ab"],
    ),
    (
        fused,
        [jq.Rule("b", weights=jq.int8()), RULE],
        [f"a -> dot_general in the root: float, {DYNAMIC}"],
    ),
]


@pytest.mark.parametrize(("fn", "rules", "edges"), EDGES)
def test_edges(fn, rules, edges):
    qparams, report = jq.ptq(fn, PARAMS, rules, batches=[X])
    assert [str(edge) for edge in report.edges] == edges
    for edge in report.edges:
        assert str(edge) in str(report) or edge.integer
    # floats or integers on the way, the result is what it should be
    y, expected = jax.jit(lambda q, p, x: (jq.quantized(fn)(q, x), fn(p, x)))(qparams, PARAMS, X)
    y, expected = np.asarray(y), np.asarray(expected)
    assert np.linalg.norm(y - expected) < 0.03 * np.linalg.norm(expected)


def test_an_edge_that_is_float_rounds_to_the_grid_of_its_taker():
    def fn(p, x):
        h = relu(x @ p["a"])
        return h @ p["b"], h @ p["c"]

    qparams, _ = jq.ptq(fn, PARAMS, symmetric("c"), batches=[X])
    a, b, c = (ref.layer(qparams[n], qparams["b"] if n == "a" else None) for n in "abc")
    total = ref.dense(a.x.whole(a.x.code(X)), a.w, "nk,ko->no")
    q = a.y.relu(ref.result(a, total, a.scale[:1]).codes())
    other = c.x.code(a.y.floats(q))
    for y, at, codes in zip(jax.jit(jq.quantized(fn))(qparams, X), (b, c), (q, other), strict=True):
        total = ref.dense(at.x.whole(codes), at.w, "nk,ko->no")
        np.testing.assert_array_equal(y, ref.result(at, total, at.scale[:1]).floats())


@pytest.mark.parametrize("path", ["a", "b"])
def test_layers_whose_inputs_have_different_bits(path):
    few = jq.Rule(
        path,
        weights=jq.int8(),
        activations=jq.int4(granularity=TENSOR),
        observer=jq.observers.minmax(),
        requantize="float32",
    )
    qparams, _ = jq.ptq(fused, PARAMS, [few, RULE], batches=[X])
    a, b = ref.layer(qparams["a"], qparams["b"]), ref.layer(qparams["b"])
    q = a.x.code(X)
    for at in (a, b):
        sums = ref.result(at, ref.dense(at.x.whole(q), at.w, "nk,ko->no"), at.scale[:1])
        q = q if at is b else at.y.relu(sums.codes())
    np.testing.assert_array_equal(jax.jit(jq.quantized(fused))(qparams, X), sums.floats())
