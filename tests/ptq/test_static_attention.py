"""Calibrated grids of contractions without a parameter."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import jaxquant as jq
from jaxquant.observers import absmax, minmax
from tests.arrays import normal
from tests.lowered import inlined
from tests.ops import integer_reference as ref
from tests.ptq.static import (
    F32,
    INT8,
    W8,
    rounded,
)

ATTENTION = [
    jq.Rule("**", weights=W8, activations=INT8, observer=minmax()),
    jq.Rule("**", attention=INT8, observer=absmax()),
]


class Block(nn.Module):
    """Attention, the same steps as `attended`."""

    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        dense = functools.partial(nn.Dense, 8, use_bias=False)
        q, k, v = (dense(name=n)(x) for n in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k), axis=-1)
        return x + jnp.einsum("bqk,bkd->bqd", weights, v), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return layers(name="layers")(x, None)[0]


def stacked(p: Any, x: Any) -> Any:
    return Stack().apply({"params": p}, x)


def one_by_one(p: Any, x: Any) -> Any:
    for i in range(2):
        x, _ = Block(name=f"layer{i}").apply({"params": p[f"layer{i}"]}, x, None)
    return x


def on(grid: Any, x: np.ndarray, unsigned: bool = False) -> np.ndarray:
    """What codes of `x` stand for, float64."""
    zero = 0 if grid.zero_point is None else int(grid.zero_point)
    assert zero == (-128 if unsigned else 0)
    held = ref.Grid(F32(grid.scale), zero, -128, 127)
    return held.whole(held.code(x)) * np.float64(held.scale)


def attended(q: Any, grids: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """One block by its equations, from the QTensors of a layer and the grids of its scores."""
    scores, values = grids.values()
    heads = {n: rounded(q[n]["kernel"], x).astype(np.float64) for n in "qkv"}
    logits = on(scores[0], heads["q"]) @ on(scores[1], heads["k"]).transpose(0, 2, 1)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    assert float(values[0].scale) <= 1 / 255 * (1 + 1e-6)  # a softmax is not negative
    return x + on(values[0], weights, unsigned=True) @ on(values[1], heads["v"])


@pytest.mark.slow
def test_attention_in_a_loop_has_the_grids_of_each_layer() -> None:
    x = normal(1, 2, 5, 8) + 0.5
    params = jax.jit(Stack().init)(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda a: a * jnp.array([2.0, 0.7])[:, None, None], params)
    alone = {f"layer{i}": jax.tree.map(lambda a, i=i: a[i], params["layers"]) for i in range(2)}
    q, report = jq.ptq(stacked, params, ATTENTION, batches=[x, 1.5 * x])
    q1, report1 = jq.ptq(one_by_one, alone, ATTENTION, batches=[x, 1.5 * x])
    held = [
        leaf.calibration.attention
        for leaf in jax.tree.leaves(q, is_leaf=lambda a: isinstance(a, jq.QTensor))
        if leaf.calibration.attention
    ]
    assert len(held) == 1  # one leaf carries the grids of all
    assert list(held[0]) == [key for key, fmt in report.attention if fmt == "int8"]
    assert len(report1.attention) == 2 * len(report.attention) == 4
    y = np.asarray(x)
    for i in range(2):
        layer, grids = jax.tree.map(lambda a, i=i: a[i], (q["layers"], held[0]))
        y = attended(layer, grids, y).astype(F32)
    call = jax.jit(jq.quantized(stacked))
    np.testing.assert_allclose(call(q, x), y, atol=3e-5, rtol=1e-5)
    y1 = jax.jit(jq.quantized(one_by_one))(q1, x)
    np.testing.assert_allclose(y1, y, atol=3e-5, rtol=1e-5)
    text = inlined(call.lower(q, x).as_text())
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) == 5 and all("xi8>" in line and "xf32>" not in line for line in dots)


@jax.jit
def product(a: Any, b: Any) -> Any:
    return jnp.tanh(a) @ b.T


def test_a_helper_has_grids_for_each_of_its_calls() -> None:
    def fn(p: Any, x: Any) -> Any:
        h = x @ p["w"]
        return product(h, h), product(0.1 * h, 10.0 * h)

    x, params = normal(1, 4, 8), {"w": 0.3 * normal(2, 8, 8)}
    q, report = jq.ptq(fn, params, ATTENTION, batches=[x])
    grids = list(q["w"].calibration.attention.values())
    assert len(grids) == len(report.attention) == 2
    h = rounded(q["w"], x)
    given = [(np.tanh(h), h), (np.tanh(F32(0.1) * h), F32(10.0) * h)]
    for y, (lhs, rhs), (a, b) in zip(jax.jit(jq.quantized(fn))(q, x), grids, given, strict=True):
        np.testing.assert_allclose(y, on(lhs, a) @ on(rhs, b).T, rtol=1e-5, atol=1e-5)
    assert float(grids[1][1].scale) > 5 * float(grids[0][1].scale)
    # with the grids of the first call the second would be clipped
    assert np.abs(on(grids[0][0], given[1][0]) @ on(grids[0][1], given[1][1]).T).max() < 0.5 * (
        np.abs(given[1][0] @ given[1][1].T).max()
    )


def test_grids_that_nothing_can_carry() -> None:
    def fn(p: Any, x: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            h = x @ w
            return h @ h.T @ x, None

        return lax.scan(layer, x, p["layers"])[0] @ p["head"]

    params = {"layers": normal(1, 2, 4, 4), "head": normal(2, 4, 3)}
    with pytest.raises(ValueError, match=r"no quantized parameter has the layers \[2\]"):
        jq.ptq(fn, params, [jq.Rule("head", weights=W8), ATTENTION[1]], batches=[normal(3, 4, 4)])
