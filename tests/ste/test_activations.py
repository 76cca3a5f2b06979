"""Gradients of activations, on grids that are learned or tracked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import PerTensor, QSpec
from jaxquant.ste import Moments, lsq, lsq_plus, pact, straight_through
from tests.ste import cases

SPECS = [
    QSpec(name, PerTensor(), symmetric)
    for name, symmetric in [
        *((f"{u}int{b}", True) for u in ("", "u") for b in (2, 4, 8)),
        *((f"{u}int{b}", False) for u in ("", "u") for b in (3, 8)),
        ("float8_e4m3fn", True),
        ("float8_e5m2", True),
    ]
]
X, G = cases.normal((4, 5, 3), seed=11), cases.normal((4, 5, 3), seed=12)
ROUNDED = jax.device_put(cases.normal((4, 5, 3), seed=13))  # any: it comes out as it went in


@functools.partial(jax.jit, static_argnums=(0, 1))
def passed(estimator, spec, learned, x=X, rounded=ROUNDED, g=G):
    y, pull = jax.vjp(
        lambda x, l: estimator.pass_activation(x, rounded, l, spec), jnp.asarray(x), learned
    )
    grid = estimator.grid(learned, spec) if learned else None
    return y, pull(jnp.asarray(g, x.dtype)), grid


def learned_of(estimator, spec):
    """Arrays that leave values on both sides of the range, the step below zero: reflected."""
    values = cases.values_of(spec)
    if estimator == pact():
        return {"alpha": jnp.float32(-0.8)}
    step = {"step": jnp.float32(-1.7 / np.ptp(values))}
    if estimator == lsq_plus() and not spec.symmetric:
        return {**step, "offset": jnp.float32(-0.6)}
    return step


@pytest.mark.parametrize("estimator", [lsq(), lsq_plus(), pact()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("spec", SPECS, ids=cases.label)
def test_formulas(spec, estimator):
    learned = learned_of(estimator, spec)
    values, numbers = cases.values_of(spec), {n: float(a) for n, a in learned.items()}
    width, zero = np.ptp(values), 0.0
    if estimator == pact():
        alpha = abs(numbers["alpha"])
        both = values[0] < 0 or not spec.symmetric
        low = -alpha if both else 0.0
        x = np.asarray(X)
        inside = (x > low if both else x >= low) & (x < alpha)
        slopes = {"alpha": np.where(x >= alpha, 1.0, np.where((x <= low) & both, -1.0, 0.0))}
        gain, g = 1.0, G
        scale = (alpha - low) / width if not spec.symmetric else alpha / (values[-1] + 0.5)
        scale = scale if spec.format.is_integer else alpha / values[-1]
        zero = (values[0] + values[-1] + 1) // 2
    else:
        scale = abs(numbers["step"])
        if not spec.symmetric:
            zero = (values[0] + values[-1] + 1) // 2
        if "offset" in numbers:
            zero = values[0] - np.round(numbers["offset"] / scale)
        v = X / scale
        g = np.where(cases.clear(v + zero, values), G, 0)
        ends, plus = values[[0, -1]] - zero, "offset" in numbers
        inside = (v > ends[0]) & (v < ends[1])
        rounded = cases.nearest(v + zero, values) - zero
        below, above = (0.0, width) if plus else ends
        slopes = {"step": np.where(v <= ends[0], below, np.where(v >= ends[1], above, rounded - v))}
        if plus:
            slopes["offset"] = np.where(inside, 0.0, 1.0)
        gain = 1 / np.sqrt(X[0].size * (width if plus else ends[1]))

    y, (dx, got), (s, z) = passed(estimator, spec, learned, g=g)
    np.testing.assert_array_equal(y, ROUNDED)
    assert 0 < inside.sum() < inside.size
    np.testing.assert_array_equal(dx, np.where(inside, g, 0))
    assert set(got) == set(slopes)
    for name, slope in slopes.items():
        each = g * slope
        sign = 1.0 if name == "offset" else np.sign(numbers[name])
        error = np.finfo(np.float32).eps * each.size * (np.abs(each) + np.abs(g * X / scale)).sum()
        assert abs(float(got[name]) - gain * sign * each.sum()) <= gain * error, name
    assert float(s) == pytest.approx(scale, rel=1e-6)
    assert (z is None) == spec.symmetric
    assert z is None or (int(z) == zero and z.dtype == jnp.int32)


def test_straight_through_on_a_tracked_grid():
    spec = QSpec("uint4", PerTensor(), False)
    grid = {"scale": jnp.float32(0.1), "zero_point": jnp.int32(6)}
    _, (dx, _), _ = passed(straight_through(), spec, grid)
    inside = (X >= -0.65 - 1e-6) & (X <= 0.95 + 1e-6)
    np.testing.assert_array_equal(dx, np.where(inside, G, 0))
    _, (dx, _), _ = passed(straight_through(clip=False), spec, grid)
    np.testing.assert_array_equal(dx, G)


def test_straight_through_of_dynamic_scales_cuts_off_negative_values_alone():
    _, (dx, _), _ = passed(straight_through(), QSpec("int8", PerTensor()), {})
    np.testing.assert_array_equal(dx, G)
    _, (dx, _), _ = passed(straight_through(), QSpec("uint8", PerTensor()), {})
    np.testing.assert_array_equal(dx, np.where(X >= 0, G, 0))
    with pytest.raises(ValueError, match="learns no grid"):
        straight_through().grid({}, QSpec("int8", PerTensor()))


def test_a_step_agrees_with_finite_differences_where_nothing_rounds_otherwise():
    """`d/ds s round(x / s)` at fixed codes is `round(v)`; LSQ adds `-v`, since rounding passes."""
    spec, s, h = QSpec("int4", PerTensor()), 0.2, 1e-3
    sure = np.abs(X / s - np.round(X / s)) < 0.4
    outside = (X / s < -8) | (X / s > 7)
    codes = np.clip(np.round(X / s), -8, 7)
    moved = [np.clip(np.round(X / t), -8, 7) for t in (s - h, s + h)]
    sure &= (moved[0] == codes) & (moved[1] == codes)
    g = np.where(sure, G, 0)
    # with the codes fixed, and x moved along with its step: v = x / s stays
    difference = (codes * (s + h) - codes * (s - h)) / (2 * h) - np.where(outside, 0, X / s)
    _, (_, got), _ = passed(lsq(), spec, {"step": jnp.float32(s)}, g=g)
    want = (g * difference).sum() / np.sqrt(15 * 7)
    assert float(got["step"]) == pytest.approx(want, abs=1e-5)


def test_alpha_agrees_with_finite_differences():
    """Of `clip(x, -alpha, alpha)`: the slope that PACT takes rounding not to change."""
    for spec, low in ((QSpec("int8", PerTensor()), -1.0), (QSpec("uint8", PerTensor()), 0.0)):
        alpha, h = 0.8, 1e-4
        ends = [(np.clip(X, low * a, a) * G).sum(dtype=float) for a in (alpha - h, alpha + h)]
        _, (_, got), _ = passed(pact(), spec, {"alpha": jnp.float32(alpha)})
        assert float(got["alpha"]) == pytest.approx((ends[1] - ends[0]) / (2 * h), rel=1e-3)


@pytest.mark.parametrize("estimator", [straight_through(), lsq(), lsq_plus(), pact()])
def test_narrow_activations_keep_their_dtype(estimator):
    spec = QSpec("uint8", PerTensor(), False)
    learned = {} if estimator == straight_through() else learned_of(estimator, spec)
    x, rounded = (jnp.asarray(a, jnp.bfloat16) for a in (X, ROUNDED))
    y, (dx, got), _ = passed(estimator, spec, learned, x=x, rounded=rounded)
    assert y.dtype == dx.dtype == jnp.bfloat16
    _, (dx32, got32), _ = passed(estimator, spec, learned, x=x.astype(jnp.float32))
    np.testing.assert_array_equal(dx, dx32.astype(jnp.bfloat16))
    for name, a in got.items():  # only the gradient that arrives is rounded
        assert a.dtype == jnp.float32
        assert float(a) == pytest.approx(float(got32[name]), rel=0.05, abs=0.05)


def test_grids_of_stacked_layers():
    spec = QSpec("uint8", PerTensor(), False)
    steps, offsets = jnp.array([0.1, -0.2, 0.3]), jnp.array([-1.0, -2.0, 0.5])
    learned = {"step": steps, "offset": offsets}
    scale, zero = lsq_plus().grid(learned, spec)
    np.testing.assert_array_equal(scale, jnp.abs(steps))
    assert zero.tolist() == [10, 10, 0]
    moments = Moments(*(jnp.full(3, v) for v in (0.8, 0.1, 1.0, -3.0, 2.0)))
    for estimator in (lsq(), lsq_plus(), pact()):
        made = estimator.init_activation(moments, spec)
        assert {a.shape for a in made.values()} == {(3,)}
