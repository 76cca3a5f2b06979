"""Training on int8: gradients against the formula, in NumPy, int64 and float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

import jaxquant as jq
from jaxquant import PerTensor, QSpec
from tests.arrays import normal
from tests.qat.programs import (
    NHWC,
    weights,
)
from tests.qat.rounding import codes, near

NEAREST = jq.int8_training(jq.qtensor.Gradients(stochastic=False))


def at_float8(x: np.ndarray, axis: Any) -> tuple[np.ndarray, np.ndarray]:
    """`x / S` as float8 e5m2, `S = amax / 57344`."""
    scale = np.abs(x).max(axis=axis, keepdims=True) / 57344
    return (x / scale).astype(ml_dtypes.float8_e5m2).astype(np.float64), scale


def grads_of(fn: Any, params: Any, x: Any, g: Any, recipe: Any, step: Any = 0) -> Any:
    """`y`, `dw` and `dx` for the cotangent `g`."""

    @jax.jit
    def run(params: Any, x: Any) -> Any:
        state = jq.init_quant_state(fn, params, recipe, x)
        state = dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))
        fake = jq.fake_quantized(fn, recipe)
        y, pull = jax.vjp(lambda p, x: fake(p, x, quant_state=state)[0], params, x)
        return y, *pull(g)

    return run(params, x)


# The einsums as [rows, in] x [in, out]: axes of x, of w and of g that are rows or columns
FORMS = {
    "right": ("mk,kn->mn", (6, 40), (40, 5)),
    "left": ("kn,mk->nm", (6, 40), (40, 5)),
    "several axes": ("bhk,hkd->bd", (6, 4, 10), (4, 10, 5)),
    "axes apart": ("hdk,kbh->bd", (10, 6, 4), (4, 5, 10)),
    "several rows": ("bsk,kcd->bscd", (2, 3, 40), (40, 5, 2)),
    "batch axis": ("ebd,edf->ebf", (2, 6, 40), (2, 40, 5)),
}


@pytest.mark.parametrize("name", FORMS)
def test_gradients_are_integer_contractions(name: str) -> None:
    """Scales that are contracted go to `g`, which gets a scale for each index that is kept."""
    form, x_shape, w_shape = FORMS[name]
    operands, out = form.split("->")
    flipped = name in ("left", "axes apart")
    of_x, of_w = operands.split(",")[::-1] if flipped else operands.split(",")

    def fn(p: Any, x: Any) -> Any:
        return jnp.einsum(form, p["w"], x) if flipped else jnp.einsum(form, x, p["w"])

    x, w = normal(0, *x_shape), weights(1, *w_shape, fan=40)
    g = normal(2, *jax.eval_shape(fn, {"w": w}, x).shape)
    y, dw, dx = grads_of(fn, {"w": w}, x, g, NEAREST)

    summed = [a for a in of_x if a in of_w and a not in out]
    rows = [a for a in of_x if a not in of_w]  # kept by dx, summed by dw
    columns = [a for a in of_w if a not in of_x]
    x, w, g = (np.asarray(a, np.float64) for a in (x, w, g))
    qx, sx = codes(x, tuple(of_x.index(a) for a in summed))
    qw, sw = codes(w, tuple(of_w.index(a) for a in summed))

    def product(numbers: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        assert a.dtype == b.dtype == np.int64
        return np.einsum(numbers, a, b)

    def at_g(scale: np.ndarray, of: str) -> np.ndarray:
        """A scale laid out to broadcast with `g`, or with another result."""
        kept = "".join(a for a in of if a in out)
        squeezed = scale.squeeze(tuple(of.index(a) for a in summed))
        return np.einsum(f"{kept},{out}->{out}", squeezed, np.ones(g.shape))

    near(y, product(f"{of_x},{of_w}->{out}", qx, qw) * at_g(sx, of_x) * at_g(sw, of_w))

    def gradient(other: np.ndarray, scale: np.ndarray, of: str, of_result: str, over: list) -> Any:
        qg, sg = codes(g * at_g(scale, of), tuple(out.index(a) for a in over))
        sums = product(f"{out},{of}->{of_result}", qg, other)
        kept = "".join(a for a in out if a not in over)
        sg = sg.squeeze(tuple(out.index(a) for a in over))
        return sums * np.einsum(f"{kept},{of_result}->{of_result}", sg, np.ones(sums.shape))

    near(dx, gradient(qw, sw, of_w, of_x, columns))
    near(dw["w"], gradient(qx, sx, of_x, of_w, rows))


FORMATS = {
    "float input": jq.qtensor.Gradients(input=None, stochastic=False),
    "float weight": jq.qtensor.Gradients(weight=None, stochastic=False),
    "int4 weight": jq.qtensor.Gradients(weight=jq.int4(), stochastic=False),
    "per tensor": jq.qtensor.Gradients(
        input=QSpec("int8", PerTensor()), weight=QSpec("int8", PerTensor()), stochastic=False
    ),
    "float8 input": jq.qtensor.Gradients(input=QSpec("float8_e5m2"), stochastic=False),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_selected_apart(name: str) -> None:
    gradients = FORMATS[name]
    x, w, g = normal(0, 6, 40), weights(1, 40, 5, fan=40), normal(2, 6, 5)
    recipe = jq.int8_training(gradients)
    _, dw, dx = grads_of(lambda p, x: x @ p["w"], {"w": w}, x, g, recipe)
    x, w, g = (np.asarray(a, np.float64) for a in (x, w, g))
    (qx, sx), (qw, sw) = codes(x, 1), codes(w, 0)

    def gradient(spec: QSpec | None, g: np.ndarray, scale: np.ndarray, axis: int) -> np.ndarray:
        """`Q(g S)`, a scale for each index of the axis that is kept."""
        if spec is None:
            return g * scale
        if not spec.format.is_integer:  # contracted in float: scales stay where they are
            q, own = at_float8(g, axis)
            return q * own * scale
        over = None if spec.granularity == PerTensor() else axis
        q, own = codes(g * scale, over, spec.format.qmax)
        return q * own

    near(dx, gradient(gradients.input, g, sw, 1) @ qw.T)
    near(dw["w"], qx.T @ gradient(gradients.weight, g, sx, 0))


def test_rounded_at_random_without_bias() -> None:
    """The mean over keys is the straight-through gradient."""
    params, x = {"w": weights(1, 40, 5, fan=40)}, normal(0, 6, 40)
    g, recipe, count = normal(2, 6, 5), jq.int8_training(), 4096

    def fn(p: Any, x: Any) -> Any:
        return x @ p["w"]

    state = jq.init_quant_state(fn, params, recipe, x)
    fake = jq.fake_quantized(fn, recipe)

    def grads(key: Any, step: Any) -> Any:
        now = dataclasses.replace(state, key=key, step=step)
        return jax.vjp(lambda p, x: fake(p, x, quant_state=now)[0], params, x)[1](g)

    keys = jax.vmap(jax.random.key_data)(jax.random.split(jax.random.key(1), count))
    each = jax.jit(jax.vmap(grads, (0, None)))(keys, state.step)
    (qx, sx), (qw, sw) = codes(np.asarray(x, np.float64), 1), codes(np.asarray(params["w"]), 0)
    want = {"w": (qx * sx).T @ np.asarray(g)}, np.asarray(g) @ (qw * sw).T
    for got, exact in zip(jax.tree.leaves(each), jax.tree.leaves(want), strict=True):
        got = np.asarray(got, np.float64)
        error = got.std(0) / np.sqrt(count)
        # one in ten thousand draws has a mean so far off: 200 values of 30 independent errors
        assert np.abs(got.mean(0) - exact).max() > 0
        assert (np.abs(got.mean(0) - exact) < 5 * error).all()


def test_sites_of_a_leaf_are_rounded_apart() -> None:
    """Their errors are independent: variances add up, where equal draws would add the errors."""
    params, x = {"w": weights(1, 40, 5, fan=40)}, normal(0, 6, 40)
    g, recipe = normal(2, 6, 5), jq.int8_training()

    def fn(p: Any, x: Any) -> Any:
        return x @ p["w"], x @ p["w"]

    state = jq.init_quant_state(fn, params, recipe, x)
    fake = jq.fake_quantized(fn, recipe)

    def grads(key: Any, share: Any) -> Any:
        now = dataclasses.replace(state, key=key)
        pull = jax.vjp(lambda p: fake(p, x, quant_state=now)[0], params)[1]
        return pull((g, share * g))[0]["w"]

    keys = jax.vmap(jax.random.key_data)(jax.random.split(jax.random.key(1), 256))
    each = jax.vmap(jax.vmap(grads, (0, None)), (None, 0))
    one, both = np.asarray(jax.jit(each)(keys, jnp.array([0.0, 0.9]))).var(1).mean((1, 2))
    assert 0.9 < both / (one * (1 + 0.9**2)) < 1.1


def test_a_state_has_one_gradient_and_the_next_another() -> None:
    """For every site of a leaf, and every layer of a stack."""
    recipe = jq.int8_training()
    one = jnp.broadcast_to(weights(1, 16, 16, fan=16)[None], (2, 16, 16))
    params, x = {"stack": one, "twice": weights(2, 16, 3, fan=16)}, normal(0, 6, 16)

    def fn(p: Any, x: Any) -> Any:
        # the same rows go to both layers, and to both sites
        h = lax.scan(lambda total, w: (total + x @ w, x @ w), x, p["stack"])[1]
        return h, x @ p["twice"], x @ p["twice"]

    g = normal(3, 2, 6, 16), normal(4, 6, 3), normal(4, 6, 3)
    found = jax.vmap(lambda step: grads_of(fn, params, x, g, recipe, step)[1])(jnp.array([0, 0, 1]))
    for first, again, other in jax.tree.leaves(found):
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()


def product(p: Any, x: Any) -> Any:
    return x @ p["w"]


@pytest.mark.parametrize("shapes", [((0, 40), (40, 5)), ((6, 40), (40, 0))], ids=str)
def test_empty_axes(shapes: Any) -> None:
    """Sums over nothing are 0: as in float."""
    params, x = {"w": weights(1, *shapes[1], fan=40)}, normal(0, *shapes[0])
    want, pull = jax.vjp(product, params, x)
    got = grads_of(product, params, x, want, jq.int8_training())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves((want, *pull(want))), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_vector_is_one_row() -> None:
    params, x, g = {"w": weights(1, 40, 5, fan=40)}, normal(0, 40), normal(2, 5)
    y, dw, dx = grads_of(product, params, x, g, NEAREST)
    rows = grads_of(product, params, x[None], g[None], NEAREST)
    for got, want in zip((y, dw["w"], dx), (rows[0][0], rows[1]["w"], rows[2][0]), strict=True):
        np.testing.assert_array_equal(got, want)


def test_convolutions_take_rounded_gradients() -> None:
    """In float, rounded with a scale for each image, and for each channel."""
    x, k = normal(0, 3, 5, 5, 4), weights(1, 3, 3, 4, 6, fan=36)

    def fn(p: Any, x: Any) -> Any:
        return lax.conv_general_dilated(x, p["k"], (2, 1), "SAME", dimension_numbers=NHWC)

    g = normal(2, *jax.eval_shape(fn, {"k": k}, x).shape)
    y, dk, dx = grads_of(fn, {"k": k}, x, g, NEAREST)

    def rounded(a: Any, axis: tuple[int, ...]) -> jax.Array:
        q, scale = codes(np.asarray(a, np.float64), axis)
        return jnp.asarray(q * scale, jnp.float32)

    # rows of a convolution are images
    want, pull = jax.vjp(fn, {"k": rounded(k, (0, 1, 2))}, rounded(x, (1, 2, 3)))
    near(y, np.asarray(want))
    near(dx, np.asarray(pull(rounded(g, (1, 2, 3)))[1]))
    near(dk["k"], np.asarray(pull(rounded(g, (0, 1, 2)))[0]["k"]))


@pytest.mark.parametrize("stochastic", [False, True])
def test_gradients_that_vanish_or_are_not_finite(stochastic: bool) -> None:
    """Rows without a gradient stay without one; one that is NaN makes what it belongs to NaN."""
    x, w = normal(0, 6, 40), weights(1, 40, 5, fan=40)
    recipe = jq.int8_training(jq.qtensor.Gradients(stochastic=stochastic))
    g = normal(2, 6, 5).at[1].set(0.0).at[:, 4].set(0.0)
    cotangents = jnp.stack([g, jnp.zeros_like(g), g.at[2, 3].set(jnp.nan)])

    def pulled(g: Any) -> Any:
        return grads_of(lambda p, x: x @ p["w"], {"w": w}, x, g, recipe)[1:]

    dw, dx = jax.vmap(pulled)(cotangents)
    dw = dw["w"]
    assert np.isfinite(dw[:2]).all() and np.isfinite(dx[:2]).all()
    assert not dw[1].any() and not dx[1].any()
    assert not dx[0, 1].any() and dx[0, 0].all() and not dw[0, :, 4].any() and dw[0, :, 0].all()
    assert (np.isnan(dx[2]).any(1) == (np.arange(6) == 2)).all()
    assert (np.isnan(dw[2]).any(0) == (np.arange(5) == 3)).all()
