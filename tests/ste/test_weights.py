"""Gradients of weights, each held to the formula of its paper."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import PerChannel, PerTensor, QSpec
from jaxquant.ste import lsq, lsq_plus, pact, straight_through
from tests.ste import cases

W, G = cases.normal(seed=1), cases.normal(seed=2)


def spread(base: float, count: int, seed: int) -> np.ndarray:
    """Learned values around `base`, every third one below zero: it is reflected."""
    drawn = base * np.random.default_rng(seed).uniform(0.8, 1.2, count)
    return np.where(np.arange(count) % 3 == 2, -drawn, drawn).astype(np.float32)


def run(estimator, spec, learned, g=G):
    # Codes by a program for each case; the rest op by op, programs that most cases share.
    q, y, again, (dw, dlearned) = cases.trained(estimator, spec, W, learned, g)
    q.validate()
    np.testing.assert_array_equal(y, again)
    return q, np.asarray(y), np.asarray(dw), jax.tree.map(np.asarray, dlearned)


@pytest.mark.parametrize("spec", cases.table(0, odd=False), ids=cases.label)
def test_straight_through_is_one_inside_and_zero_outside(spec):
    q, _, dw, dlearned = run(straight_through(), spec, {})
    expected = jq.quantize(W, spec, storage_last_axes=(0,))
    chex.assert_trees_all_equal(q, expected)
    assert dlearned == {}
    # the scale comes from the largest magnitude: only what has no sign there is cut off
    values, groups = cases.values_of(spec), cases.groups_of(W.shape, spec.granularity)
    inside = np.ones(W.shape, bool)
    if spec.symmetric and values[0] > -values[-1] / 2 - 1e-9:
        scale = np.asarray(q.scale, np.float64).ravel()[groups]
        end = values[0] - (0.5 if spec.format.is_integer else 0.0)
        inside = W / scale >= end
        assert not inside.all()
    np.testing.assert_array_equal(dw, np.where(inside, G, 0))

    # and on half of that range
    half = dataclasses.replace(q, scale=(0.5 * q.scale.astype(jnp.float32)).astype(q.scale.dtype))
    dw = jax.vjp(lambda w: straight_through().values(w, {}, half), jnp.asarray(W))[1](G)[0]
    scale = np.asarray(half.scale, np.float64).ravel()[groups]
    scale = scale * (1.0 if q.global_scale is None else float(q.global_scale))
    zero = 0.0 if q.zero_point is None else np.asarray(q.zero_point, np.float64).ravel()[groups]
    margin = 0.5 if spec.format.is_integer else 0.0
    v = W / scale + zero
    inside = (v >= values[0] - margin) & (v <= values[-1] + margin)
    doubt = np.abs(v[..., None] - [values[0] - margin, values[-1] + margin]).min(-1)
    sure = doubt > 0.07 * np.ptp(values)  # of scales with three bits the rounding error is allowed
    sure |= (doubt > 1e-4 * np.ptp(values)) & (spec.scale_dtype != "float8_e4m3fn")
    assert not inside[sure].all()
    np.testing.assert_array_equal(dw[sure], np.where(inside, G, 0)[sure])


@pytest.mark.parametrize("rule", ["half", "qmax", "signed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_straight_through_cuts_nothing_off_by_any_rule(rule, dtype):
    spec = QSpec("int2", PerChannel(1), range=rule, scale_dtype=dtype)
    w = cases.normal((40, 64), seed=5)
    w[0] = -(np.abs(w).max(0) - 1e-6)  # nearly as large on either side
    _, _, _, (dw, _) = cases.compiled(straight_through(), spec, w, {}, np.ones_like(w))
    np.testing.assert_array_equal(dw, 1)


def test_straight_through_without_clipping_is_the_identity():
    spec = QSpec("uint4", PerTensor())
    *_, (dw, _) = cases.compiled(straight_through(clip=False), spec, W, {}, G)
    np.testing.assert_array_equal(dw, G)


@pytest.mark.parametrize("spec", cases.table(1), ids=cases.label)
def test_lsq(spec):
    values, groups = cases.values_of(spec), cases.groups_of(W.shape, spec.granularity)
    zero = 0 if spec.symmetric else (values[0] + values[-1] + 1) // 2
    low, high = values[0] - zero, values[-1] - zero
    shape = jax.eval_shape(lambda w: lsq().init(w, spec, storage_last_axes=(0,)), W)["step"].shape
    step = spread(0.9 / high, groups.max() + 1, seed=3)
    scale = cases.stored(np.abs(step), spec)[groups]
    v = W / scale
    sure = cases.clear(v + zero, values)
    g = np.where(sure, G, 0)
    _, y, dw, got = run(lsq(), spec, {"step": step.reshape(shape)}, g)

    rounded = cases.nearest(v + zero, values) - zero
    np.testing.assert_allclose(y[sure], (rounded * scale)[sure], rtol=1e-6)
    inside = (v > low) & (v < high)
    assert 0 < inside.sum() < inside.size
    np.testing.assert_array_equal(dw, np.where(inside, g, 0))
    slope = np.where(v <= low, low, np.where(v >= high, high, rounded - v))
    count = np.bincount(groups.ravel())
    gain = np.sign(step) / np.sqrt(count * max(high, -low if not spec.format.is_integer else 0))
    error = cases.bound(g * slope, g * v, groups) * np.abs(gain)
    assert np.all(np.abs(got["step"].ravel() - cases.summed(g * slope, groups) * gain) <= error)


@pytest.mark.parametrize("spec", cases.asymmetric(2), ids=cases.label)
def test_lsq_plus(spec):
    values, groups = cases.values_of(spec), cases.groups_of(W.shape, spec.granularity)
    shape = jax.eval_shape(lambda w: lsq().init(w, spec, storage_last_axes=(0,)), W)["step"].shape
    width = values[-1] - values[0]
    step = spread(1.5 / width if not spec.symmetric else 0.9 / values[-1], groups.max() + 1, seed=4)
    offset = -np.random.default_rng(5).uniform(0.3, 1.0, step.size).astype(np.float32)
    learned = {"step": step.reshape(shape)}
    if not spec.symmetric:
        learned["offset"] = offset.reshape(shape)

    scale = cases.stored(np.abs(step), spec)
    count = np.bincount(groups.ravel())
    if spec.symmetric:
        beta, low, high, top = 0.0, values[0], values[-1], np.abs(values).max()
        top = values[-1] if spec.format.is_integer else top
    else:
        zero = np.clip(np.round(values[0] - offset / scale), values[0], values[-1])
        beta, low, high, top = ((values[0] - zero) * scale)[groups], 0.0, width, width
    u = (W - beta) / scale[groups]
    codes = values if spec.symmetric else values - values[0]
    g = np.where(cases.clear(u, codes), G, 0)
    q, _, dw, got = run(lsq_plus(), spec, learned, g)
    assert set(got) == set(learned)
    if not spec.symmetric:
        np.testing.assert_array_equal(q.zero_point.ravel(), zero)
    inside = (u > low) & (u < high)
    assert 0 < inside.sum() < inside.size
    np.testing.assert_array_equal(dw, np.where(inside, g, 0))
    rounded = cases.nearest(u, codes)
    slope = np.where(u <= low, low, np.where(u >= high, high, rounded - u))
    gain = 1 / np.sqrt(count * top)
    # W / S is rounded before the zero point is added
    error = cases.bound(g * slope, g * (np.abs(u) + width), groups) * gain
    want = cases.summed(g * slope, groups) * gain * np.sign(step)
    assert np.all(np.abs(got["step"].ravel() - want) <= error)
    if not spec.symmetric:
        want = cases.summed(np.where(inside, 0.0, g), groups) * gain
        error = cases.bound(g, g, groups) * gain
        assert np.all(np.abs(got["offset"].ravel() - want) <= error)


@pytest.mark.parametrize("spec", cases.asymmetric(3), ids=cases.label)
def test_pact(spec):
    groups = cases.groups_of(W.shape, spec.granularity)
    shape = jax.eval_shape(lambda w: pact().init(w, spec, storage_last_axes=(0,)), W)["alpha"].shape
    alpha = spread(0.9, groups.max() + 1, seed=6)
    _, y, dw, got = run(pact(), spec, {"alpha": alpha.reshape(shape)})

    high = np.abs(alpha)[groups]
    both = cases.values_of(spec)[0] < 0 or not spec.symmetric
    low = -high if both else 0.0 * high
    w = np.asarray(W)
    inside = (w > low if both else w >= 0) & (w < high)
    np.testing.assert_array_equal(dw, np.where(inside, G, 0))
    slope = np.where(w >= high, 1.0, np.where((w <= low) & both, -1.0, 0.0))
    want = cases.summed(G * slope, groups) * np.sign(alpha)
    error = cases.bound(G, G, groups)
    assert np.all(np.abs(got["alpha"].ravel() - want) <= error)

    step = (high - low) / (np.ptp(cases.values_of(spec)) or 1.0)
    if spec.format.is_integer:  # the range is cut off at alpha, and rounded
        assert np.all(np.abs(y - np.clip(W, low, high)) <= 1.01 * step)


@pytest.mark.parametrize("bits", [2, 8])
def test_ends_of_the_range_are_outside(bits):
    low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    w = 0.5 * np.array([low, low + 1, high - 1, high, high + 3], np.float32)
    spec = QSpec(f"int{bits}", PerTensor())
    *_, (dw, dl) = cases.compiled(
        lsq(), spec, w, {"step": jnp.full(1, 0.5)}, np.ones(5, np.float32)
    )
    assert dw.tolist() == [0.0, float(bits > 1), float(low < high - 1 < high), 0.0, 0.0]
    assert float(dl["step"][0]) == pytest.approx((low + 2 * high) / np.sqrt(5 * high), rel=1e-6)
