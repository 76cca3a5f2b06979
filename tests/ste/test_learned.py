"""What is learned: where it begins, how it stays positive, and other numbers of bits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import PerGroup, PerTensor, QSpec
from jaxquant.ste import Estimator, Moments, kmeans, lsq, lsq_plus, pact, straight_through
from tests.ste import cases

ALL = [straight_through(), straight_through(clip=False), lsq(), lsq_plus(), pact()]
ALL += [kmeans(), kmeans(reassign=True)]
X = cases.normal((4, 50), seed=51) + np.float32(0.3)
MOMENTS = Moments(*(np.float32(v) for v in (np.abs(X).mean(), X.mean(), X.std(), X.min(), X.max())))


def test_estimators_are_values():
    assert len({*ALL, *ALL}) == len(ALL)
    for estimator in ALL:
        assert isinstance(estimator, Estimator)
        assert eval(repr(estimator), vars(jq.ste)) == estimator
    assert lsq() != lsq_plus() and straight_through() == straight_through(clip=True)


@pytest.mark.parametrize("spec", cases.few()[:3], ids=cases.label)
def test_where_weights_begin(spec):
    w = cases.normal(seed=52) + np.float32(0.2)
    values, groups = cases.values_of(spec), cases.groups_of(w.shape, spec.granularity)
    parts = [w[groups == k].astype(np.float64) for k in range(groups.max() + 1)]
    zero = 0 if spec.symmetric else (values[0] + values[-1] + 1) // 2

    def made(estimator):
        return {
            n: np.asarray(a).ravel()
            for n, a in estimator.init(w, spec, storage_last_axes=(0,)).items()
        }

    step = [2 * np.abs(p).mean() / np.sqrt(values[-1] - zero) for p in parts]
    np.testing.assert_allclose(made(lsq())["step"], step, rtol=1e-6)
    np.testing.assert_allclose(made(pact())["alpha"], [np.abs(p).max() for p in parts])
    got = made(lsq_plus())
    if spec.symmetric:
        ends = [max(abs(p.mean() - 3 * p.std()), abs(p.mean() + 3 * p.std())) for p in parts]
        np.testing.assert_allclose(got["step"], np.array(ends) / np.abs(values).max(), rtol=1e-5)
    else:
        low, high = [min(p.min(), 0) for p in parts], [max(p.max(), 0) for p in parts]
        np.testing.assert_allclose(got["offset"], low)
        np.testing.assert_allclose(got["step"], np.subtract(high, low) / 255, rtol=1e-6)


def test_where_activations_begin():
    mean_abs, mean, std, low, high = (float(a) for a in MOMENTS)
    cases_ = [
        (lsq(), QSpec("int4", PerTensor()), {"step": 2 * mean_abs / np.sqrt(7)}),
        (lsq(), QSpec("uint4", PerTensor()), {"step": 2 * mean_abs / np.sqrt(15)}),
        (lsq_plus(), QSpec("int4", PerTensor()), {"step": (abs(mean) + 3 * std) / 8}),
        (lsq_plus(), QSpec("uint4", PerTensor()), {"step": high / 15}),
        (
            lsq_plus(),
            QSpec("int4", PerTensor(), False),
            {"step": (high - low) / 15, "offset": low},
        ),
        (pact(), QSpec("uint4", PerTensor()), {"alpha": high}),
        (pact(), QSpec("int4", PerTensor()), {"alpha": max(high, -low)}),
        (straight_through(), QSpec("int4", PerTensor()), {}),
    ]
    for estimator, spec, want in cases_:
        got = estimator.init_activation(MOMENTS, spec)
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert float(got[name]) == pytest.approx(value, rel=1e-5), (estimator, spec)


@pytest.mark.parametrize("estimator", [lsq(), lsq_plus(), pact()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("name", ["int4", "uint4"])
def test_what_is_small_begins_in_proportion(estimator, name):
    spec = QSpec(name, PerTensor())
    small = estimator.init_activation(Moments(*(a * np.float32(2.0**-9) for a in MOMENTS)), spec)
    for key, value in estimator.init_activation(MOMENTS, spec).items():
        assert float(small[key]) == float(value) * 2.0**-9


def test_a_weight_of_zeros_begins_at_one():
    w, zero = np.zeros((4, 3), np.float32), Moments(*(np.float32(0.0),) * 5)
    for estimator in (lsq(), lsq_plus(), pact()):
        spec = QSpec("uint8", PerGroup(3, 0), False)
        made = estimator.init(w, spec)
        assert all(np.all(a == 1.0) for n, a in made.items() if n != "offset")
        np.testing.assert_array_equal(estimator.values(w, made, estimator.encode(w, made, spec)), 0)
        begun = estimator.init_activation(zero, spec)
        assert all(a == 1.0 for n, a in begun.items() if n != "offset")


@pytest.mark.parametrize(
    ("estimator", "spec"),
    [
        (lsq(), QSpec("mxfp4", PerTensor())),
        (lsq_plus(), QSpec("int4", PerTensor())),
        (pact(), QSpec("int4", PerTensor())),
    ],
    ids=repr,
)
def test_steps_of_zero_and_below_leave_finite_values(estimator, spec):
    w = jax.device_put(cases.normal((3, 4), seed=53))
    names = {n: a.shape for n, a in estimator.init(w, spec).items()}

    def run(value):
        learned = {n: jnp.full(s, value, jnp.float32) for n, s in names.items()}
        return cases.compiled(estimator, spec, w, learned, jnp.ones_like(w))

    for value in (0.0, -0.0, 1e-45, -1e-38, 1e-31, 3e38):
        q, y, _, (dw, dlearned) = run(value)
        assert np.all(np.asarray(q.scale, np.float32) > 0)
        for a in (y, dw, *dlearned.values()):
            assert np.isfinite(a).all(), value
    # one that was pushed through zero does what its reflection does, and goes the same way
    (q, y, _, (dw, there)), (q2, y2, _, (dw2, here)) = run(-0.3), run(0.3)
    chex.assert_trees_all_equal((q, y, dw), (q2, y2, dw2))
    for n in here:
        np.testing.assert_array_equal(there[n], -here[n])
        assert np.any(here[n] != 0)
    # at zero the gradient does not vanish, or it would stay there
    w = w.at[0, 0].set(9.0)
    assert all(np.all(a != 0) for a in run(0.0)[3][1].values())


@pytest.mark.parametrize("symmetric", [True, False])
def test_pact_starts_at_the_largest_magnitude_of_either_sign(symmetric):
    signed = QSpec("int4" if symmetric else "uint4", PerTensor(), symmetric)
    moments = Moments(*map(jnp.float32, (1.0, -1.0, 1.0, -5.0, 2.0)))  # low -5, high 2
    assert float(pact().init_activation(moments, signed)["alpha"]) == 5.0
    assert float(pact().init_activation(moments, QSpec("uint4", PerTensor()))["alpha"]) == 2.0


def test_the_range_stays_when_bits_change():
    old, new = QSpec("uint8", PerTensor(), False), QSpec("uint4", PerTensor(), False)
    learned = {"step": jnp.array([0.1, -0.2]), "offset": jnp.array([-1.0, 0.0])}
    got = lsq_plus().rescaled(learned, old, new)
    np.testing.assert_allclose(got["step"], [1.7, -3.4], rtol=1e-6)
    np.testing.assert_array_equal(got["offset"], learned["offset"])
    got = lsq().rescaled({"step": jnp.float32(1.0)}, QSpec("int8"), QSpec("int2"))
    assert float(got["step"]) == 85.0
    assert pact().rescaled({"alpha": 2.0}, old, new) == {"alpha": 2.0}
    assert straight_through().rescaled({}, old, new) == {}
