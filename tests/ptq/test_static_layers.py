"""Static activations of layers in their many shapes, and under JAX's transforms."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant as jq
from jaxquant.observers import minmax, percentile
from tests.arrays import array, normal
from tests.ops import integer_reference as ref
from tests.ptq.static import (
    ASYM,
    F32,
    INT8,
    UINT8,
    W4,
    W8,
    W8A,
    equations,
    expected_grid,
    mlp,
    rounded,
)

CONV = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def images(p: Any, x: Any) -> Any:
    def conv(name: str, strides: tuple[int, int], padding: str, groups: int = 1) -> Any:
        return lax.conv_general_dilated(
            x, p[name], strides, padding, feature_group_count=groups, **CONV
        )

    return {
        "same": conv("same", (1, 1), "SAME"),
        "strided": conv("strided", (2, 3), "SAME"),
        "depthwise": conv("depthwise", (1, 2), "SAME", 4),
        "packed": conv("packed", (1, 1), "VALID"),
        "half": x.astype(jnp.bfloat16)[:, 0, 0] @ p["half"],
    }


def test_convolutions_and_bfloat16() -> None:
    params = {
        "same": normal(1, 3, 3, 4, 5),
        "strided": normal(2, 3, 2, 4, 3),
        "depthwise": normal(3, 3, 3, 1, 8),
        "packed": normal(4, 2, 2, 4, 3),
        "half": normal(5, 4, 6).astype(jnp.bfloat16),
    }
    weights = {"same": W8, "strided": W8A, "depthwise": W8A, "packed": W4, "half": W8}
    acts = {"same": ASYM, "strided": UINT8, "depthwise": ASYM, "packed": INT8, "half": ASYM}
    recipe = [
        jq.Rule(n, weights=weights[n], activations=acts[n], observer=minmax()) for n in params
    ]
    batch, x = normal(6, 2, 5, 6, 4) + 0.5, 2 * normal(7, 2, 5, 6, 4)
    qparams, report = jq.ptq(images, params, recipe, batches=[batch])
    y = jax.jit(jq.quantized(images))(qparams, x)
    assert not [e for e in report.events if e.kind == "contracted in float"]
    forms = {"same": ((1, 1), "SAME", 1), "strided": ((2, 3), "SAME", 1)}
    forms |= {"depthwise": ((1, 2), "SAME", 4), "packed": ((1, 1), "VALID", 1)}
    for name, (strides, padding, groups) in forms.items():
        scale, zero, least, most = expected_grid(acts[name], [batch])
        at, held = ref.layer(qparams[name]), qparams[name].calibration.input
        assert np.allclose(scale, held.scale, rtol=2e-7), name
        grid = ref.Grid(F32(held.scale), zero, least, most)
        codes = grid.whole(grid.code(x))
        total = ref.conv(codes, at.w, strides, padding, CONV["dimension_numbers"], groups=groups)
        want = total.astype(F32) * (at.scale[0, 0, 0] * grid.scale)
        if name == "packed":  # a CPU convolves what codes stand for
            np.testing.assert_allclose(y[name], want, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(y[name], want, name)
    at, half = ref.layer(qparams["half"]), x.astype(jnp.bfloat16)[:, 0, 0]
    want = (at.x.whole(at.x.code(half)) @ at.w).astype(F32) * (at.scale[0] * at.x.scale)
    assert y["half"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(y["half"], jnp.asarray(want).astype(jnp.bfloat16))


def in_a_loop(p: Any, x: Any) -> Any:
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), h), x, p["w"])


def unrolled(p: Any, x: Any) -> Any:
    inner = []
    for i in range(3):
        inner.append(x)
        x = jnp.tanh(x @ p["w"][i])
    return x, jnp.stack(inner)


def separate(p: Any, x: Any) -> Any:
    for i in range(3):
        x = jnp.tanh(x @ p[f"w{i}"])
    return x


def test_layers_of_a_loop_have_grids_of_their_own() -> None:
    w, x = normal(1, 3, 8, 8) * jnp.array([4.0, 1.0, 0.2])[:, None, None], normal(2, 4, 8) + 1.0
    rule = jq.Rule("**", weights=W8, activations=ASYM, observer=minmax())
    alone = {f"w{i}": w[i] for i in range(3)}
    q, _ = jq.ptq(in_a_loop, {"w": w}, rule, batches=[x])
    q0, _ = jq.ptq(unrolled, {"w": w}, rule, batches=[x])
    q1, _ = jq.ptq(separate, alone, rule, batches=[x])
    assert q["w"].calibration.input.scale.shape == (3,)
    for i in range(3):
        held = jax.tree.map(lambda a, i=i: a[i], q["w"]).calibration
        other = q1[f"w{i}"].calibration
        assert (held.input.spec, held.input.source) == (other.input.spec, "w:lhs")
        for a, b in zip(jax.tree.leaves(held), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=3e-7)
    y, y1 = jax.jit(jq.quantized(in_a_loop))(q, x)[0], jax.jit(jq.quantized(separate))(q1, x)
    np.testing.assert_allclose(y, y1, rtol=1e-6)

    # one array of weights that is indexed has one range for all of its layers
    y0, inner = jax.jit(jq.quantized(unrolled))(q0, x)
    seen = [np.asarray(a) for a in unrolled({"w": w}, x)[1]]
    scale, zero, *_ = expected_grid(ASYM, seen)
    held = q0["w"].calibration.input
    np.testing.assert_allclose(held.scale, scale, rtol=1e-5)
    assert held.scale.shape == ()
    assert abs(int(held.zero_point) - zero) <= 1
    grid = ref.Grid(F32(held.scale), int(held.zero_point), -128, 127)
    codes = grid.whole(grid.code(inner[2])).astype(np.float64) * float(grid.scale)
    want = np.tanh(codes @ np.asarray(jq.dequantize(q0["w"]), np.float64)[2])
    np.testing.assert_allclose(y0, want, atol=2e-6)


def test_a_parameter_of_two_sites_has_the_range_of_both() -> None:
    def fn(p: Any, ids: Any) -> Any:
        h = p["table"][ids]
        return jnp.tanh(h @ p["w"]) @ p["table"].T + 3 * h @ p["w"] @ p["table"].T

    params, ids = {"table": normal(1, 12, 8), "w": normal(2, 8, 8)}, jnp.arange(5)
    rule = jq.Rule("**", weights=W8, activations=ASYM, observer=minmax())
    stats = jq.capture(fn, params, rule, batches=[ids])
    q, report = jq.ptq(fn, params, rule, ids, stats=stats)
    keys = [key for key in stats if key.startswith("table")]
    assert len(keys) == 2
    ends = [stats.finish(key, "lhs", ASYM) for key in keys]
    assert float(ends[0].high) < 2 < float(ends[1].high)
    scale, zero, *_ = expected_grid(ASYM, [np.array([r.low, r.high]) for r in ends])
    held = q["table"].calibration
    np.testing.assert_allclose(held.input.scale, scale, rtol=2e-7)
    assert int(held.input.zero_point) == zero
    assert held.offset.shape == (12,)  # what is kept is the same at both
    y = jax.jit(jq.quantized(fn))(q, ids)
    h = np.asarray(jq.dequantize(q["table"]))[:5]
    first = rounded(q["w"], h)
    at = ref.layer(q["table"])

    def looked_at(x: Any) -> Any:
        return (at.x.whole(at.x.code(x)) @ at.w.T).astype(F32) * (at.scale[:, 0] * at.x.scale)

    want = looked_at(np.tanh(first)) + looked_at(rounded(q["w"], 3 * h))
    np.testing.assert_allclose(y, want, atol=1e-5, rtol=1e-5)
    assert report["table"].sites == ("table", "table#1", "table#2")


# --------------------------------------------------------------------------------------------------
# Transforms


@functools.cache
def small() -> tuple[Any, jax.Array]:
    rule = jq.Rule("**", weights=W8, activations=ASYM, observer=percentile(99.0))
    params, x = {"a": normal(1, 8, 6), "b": normal(2, 6, 4)}, normal(3, 5, 8) + 0.3
    return jq.ptq(mlp, params, rule, batches=[x, 2 * x])[0], x


def test_gradients_are_straight_through() -> None:
    q, x = small()

    def loss(p: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(jq.quantized(mlp)(p, x)))

    # the values are those of the rounded function, the derivatives those of the dequantized one
    def rounds(x: Any, grid: Any) -> Any:
        codes = jnp.clip(jnp.round(x / grid.scale) + grid.zero_point, -128, 127)
        return x + lax.stop_gradient((codes - grid.zero_point) * grid.scale - x)

    def reference(x: Any) -> Any:
        a, b = (jq.dequantize(q[n]) for n in "ab")
        h = jnp.tanh(rounds(x, q["a"].calibration.input) @ a)
        return jnp.sum(jnp.sin(rounds(h, q["b"].calibration.input) @ b))

    got = jax.jit(jax.grad(loss, argnums=1))(q, 3 * x)
    np.testing.assert_allclose(got, jax.jit(jax.grad(reference))(3 * x), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="QTensor"):
        jax.eval_shape(jax.grad(loss, allow_int=True), q, x)


def test_vmap_export_and_trees(tmp_path: Any) -> None:
    q, x = small()
    call = jax.jit(jq.quantized(mlp))
    y = call(q, x)
    again = jax.tree.unflatten(jax.tree.structure(q), jax.tree.leaves(q))
    np.testing.assert_array_equal(call(again, x), y)
    rows = jax.jit(jax.vmap(jq.quantized(mlp), (None, 0)))(q, x)
    np.testing.assert_allclose(rows, y, rtol=1e-6)
    # a stack of whole models, each with grids of its own
    grid = q["a"].calibration.input
    coarse = dataclasses.replace(grid, scale=2 * grid.scale)
    held = dataclasses.replace(q["a"].calibration, input=coarse)
    other = q | {"a": dataclasses.replace(q["a"], calibration=held)}
    both = jax.tree.map(lambda *a: jnp.stack(a), q, other)
    pair = jax.jit(jax.vmap(jq.quantized(mlp), (0, None)))(both, x)
    np.testing.assert_allclose(pair, jnp.stack([y, call(other, x)]), rtol=1e-6)
    assert float(jnp.abs(pair[0] - pair[1]).max()) > 1e-3
    if pytest.importorskip("flatbuffers"):
        data = jax.export.export(call)(q, x).serialize()
        np.testing.assert_array_equal(jax.export.deserialize(data).call(q, x), y)
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "q", q)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "q", jax.eval_shape(lambda: q))
    np.testing.assert_array_equal(call(restored, x), y)


def test_casts_and_joins_keep_the_grid_and_its_zero_point() -> None:
    def cast(p: Any, x: Any) -> Any:
        return x.astype(jnp.bfloat16) @ p["a"].astype(jnp.bfloat16)

    def joined(p: Any, x: Any) -> Any:
        return x @ jnp.concatenate([p["a"], p["b"]], 1)

    params, x = {"a": normal(1, 8, 6), "b": normal(2, 8, 4)}, normal(3, 5, 8) + 0.5
    rule = jq.Rule("**", weights=W8, activations=ASYM, observer=minmax())
    q, _ = jq.ptq(cast, {"a": params["a"]}, rule, batches=[x])
    found = list(equations(jax.make_jaxpr(jq.quantized(cast))(q, x).jaxpr))
    text = jax.jit(jq.quantized(cast)).lower(q, x).as_text()
    assert text.count("stablehlo.dot_general") == 1
    assert "reduce_sum" not in [e.primitive.name for e in found]
    at, half = ref.layer(q["a"]), x.astype(jnp.bfloat16)
    want = (at.x.whole(at.x.code(half)) @ at.w).astype(F32) * (at.scale[0] * at.x.scale)
    y = jax.jit(jq.quantized(cast))(q, x)
    np.testing.assert_array_equal(y, jnp.asarray(want).astype(jnp.bfloat16))

    q, _ = jq.ptq(joined, params, rule, batches=[x])
    want = np.concatenate([rounded(q[n], x) for n in "ab"], axis=1)
    np.testing.assert_array_equal(jax.jit(jq.quantized(joined))(q, x), want)


def test_what_zero_points_add_is_known_for_a_table_that_is_transposed() -> None:
    """A tied embedding: else all its codes would be summed for every token."""

    def fn(params: Any, tokens: Any) -> Any:
        return jnp.tanh(params["table"][tokens] @ params["kernel"]) @ params["table"].T

    rng = np.random.default_rng(0)
    params = {
        name: array(rng.normal(size=size))
        for name, size in (("table", (50, 16)), ("kernel", (16, 16)))
    }
    tokens = jnp.arange(6)
    qparams, _ = jq.ptq(fn, params, jq.w8a8_static(), batches=[tokens, tokens + 3], progress=False)
    assert qparams["table"].calibration.offset.shape == (50,)
    program = jax.jit(jq.quantized(fn)).trace(qparams, tokens).lower().as_text()
    assert not re.search(r"stablehlo\.reduce\(.*tensor<50x16xi32>", program)
    expected = fn(params, tokens)
    error = jax.jit(jq.quantized(fn))(qparams, tokens) - expected
    assert jnp.linalg.norm(error) < 0.03 * jnp.linalg.norm(expected)
