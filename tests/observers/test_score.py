"""Clipped fraction and SQNR read off a histogram, against the data themselves."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import QSpec
from jaxquant.observers import Range, minmax, mse, profile, score, suggest
from tests.observers.cases import one_pass
from tests.observers.test_search import DATA, SPECS, data, rounded


def sqnr(x, low, high, spec):
    x = x.astype(np.float64)
    return 10 * np.log10(np.sum(x**2) / np.sum((x - rounded(x, low, high, spec)) ** 2))


@pytest.mark.parametrize("name", DATA)
def test_scores_are_those_of_the_data(name):
    x = data(name)
    state = one_pass(profile(), jnp.asarray(x)[None])
    low, high = min(x.min(), 0), max(x.max(), 0)
    for spec in SPECS:
        for factor in (1.0, 0.7, 0.3):
            ends = (np.float32(factor * low), np.float32(factor * high))
            found = score(state, Range(*map(jnp.asarray, ends)), spec)
            assert found.sqnr_db == pytest.approx(sqnr(x, *ends, spec), abs=0.3)
            assert found.signal == pytest.approx(np.mean(x.astype(np.float64) ** 2), rel=1e-3)
            scale = np.abs(rounded(x, *ends, spec))
            if factor == 1.0 and spec.range != "qmax":
                assert found.clipped == 0.0
            beyond = scale.max() < np.abs(x).max() * 0.95
            assert (found.clipped > 0) == beyond or found.clipped < 2e-3


def test_the_clipped_fraction_is_within_two_bins():
    x = data("normal")
    state = one_pass(profile(), jnp.asarray(x)[None])
    width = 2 * 2.0 ** int(state["exponent"]) / 2048
    for end in (0.5, 1.0, 2.0):
        found = score(state, Range(jnp.float32(-end), jnp.float32(end)), QSpec("int8"))
        exact = np.mean(np.abs(x) > end)
        assert abs(found.clipped - exact) <= np.mean(np.abs(np.abs(x) - end) <= width)


def test_no_signal():
    state = one_pass(profile(), np.zeros((1, 4), np.float32))
    range = profile().finish(state, QSpec("int8"))
    assert math.isnan(score(state, range, QSpec("int8")).sqnr_db)
    assert suggest(state, range, QSpec("int8")) is None


def suggestion(x, spec=None, **options):
    spec = spec or QSpec("int8")
    state = one_pass(profile(), jnp.asarray(x, jnp.float32)[None])
    range = profile().finish(state, spec)
    return suggest(state, range, spec, **options), state, range


def test_suggestions():
    rng = np.random.default_rng(0)
    even = rng.uniform(-1, 1, size=(SIZE_2D)).astype(np.float32)
    assert suggestion(even)[0] is None

    shifted = even + 1
    found, state, range = suggestion(shifted)
    assert found.what == "asymmetric"
    spec = QSpec("int8", symmetric=False)
    gain = sqnr(shifted, 0, shifted.max(), spec) - sqnr(shifted, 0, shifted.max(), QSpec("int8"))
    assert found.gain_db == pytest.approx(gain, abs=0.3) and gain > 5
    assert suggest(state, range, spec) is None

    heavy = data("outliers").reshape(-1, 8)  # outliers spread over channels
    found, *_ = suggestion(heavy, QSpec("int4"))
    assert found.what == "mse"
    best = mse().finish(one_pass(mse(), jnp.asarray(heavy)[None]), QSpec("int4"))
    assert found.sqnr_db == pytest.approx(sqnr(heavy, *map(float, best), QSpec("int4")), abs=0.3)
    gain = found.sqnr_db - sqnr(heavy, -60, 60, QSpec("int4"))
    assert found.gain_db == pytest.approx(gain, abs=0.3) and gain > 1

    channels = even * 2.0 ** -np.arange(8)
    found, state, range = suggestion(channels)
    assert found.what == "per channel"
    one = [rounded(c, c.min(), c.max(), QSpec("int8")) for c in channels.T]
    exact = 10 * np.log10(np.sum(channels**2.0) / np.sum((channels.T - np.stack(one)) ** 2))
    assert found.sqnr_db == pytest.approx(exact, abs=0.3)
    assert suggest(state, range, QSpec("int8"), min_gain_db=100.0) is None
    other = suggest(state, range, QSpec("int8"), channels=np.full(8, np.abs(channels).max()))
    assert other is None or other.what != "per channel"


SIZE_2D = (2500, 8)


def test_profile_is_minmax_with_channels():
    x = data("student").reshape(4, -1, 5)
    state = one_pass(profile(), jnp.asarray(x))
    np.testing.assert_array_equal(np.asarray(state["channels"]), np.abs(x).max((0, 1)))
    found = profile().finish(state, QSpec("int8"))
    plain = minmax().finish(one_pass(minmax(), jnp.asarray(x)), QSpec("int8"))
    assert (float(found.low), float(found.high)) == (float(plain.low), float(plain.high))
    with pytest.raises(ValueError, match="per tensor"):
        type(profile())(axis=-1)
