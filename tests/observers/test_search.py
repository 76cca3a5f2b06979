"""Ranges chosen from histograms, against NumPy on the data themselves."""

import functools
import time

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import QSpec
from jaxquant.observers import entropy, minmax, mse, percentile, range_to_scale
from jaxquant.observers.noise import bars
from tests.observers.cases import one_pass

SIZE = 20_000


@functools.cache
def data(name):
    rng = np.random.default_rng(5)
    x = {
        "normal": rng.normal(size=SIZE),
        "laplace": rng.laplace(size=SIZE),
        "student": rng.standard_t(3, size=SIZE),
        "relu": np.maximum(rng.normal(size=SIZE), 0),
        "shifted": rng.normal(size=SIZE) * 0.2 + 3,
        "negative": -np.abs(rng.laplace(size=SIZE)),
        "outliers": np.where(np.arange(SIZE) % 5000, rng.normal(size=SIZE), 60.0),
    }[name]
    return x.astype(np.float32)


DATA = ["normal", "laplace", "student", "relu", "shifted", "negative", "outliers"]
SPECS = [
    QSpec("int8"),
    QSpec("int8", range="qmax"),
    QSpec("int4"),
    QSpec("int4", range="signed"),
    QSpec("uint8", symmetric=False),
    QSpec("int4", symmetric=False),
]


def chosen(observer, x, spec):
    found = observer.finish(one_pass(observer, jnp.asarray(x)[None]), spec)
    return float(found.low), float(found.high)


def rounded(x, low, high, spec):
    """`x` quantized with that range, by the equations of the spec in float64."""
    fmt = spec.format
    scale, zero = range_to_scale(minmax_range(low, high), spec)
    scale, zero = float(scale), 0 if zero is None else int(zero)
    codes = np.clip(np.round(x.astype(np.float64) / scale) + zero, fmt.qmin, fmt.qmax)
    return scale * (codes - zero)


def minmax_range(low, high):
    return minmax().finish(
        {
            "min": jnp.float32(low),
            "max": jnp.float32(high),
            "updates": np.int32(1),
            "bad": np.int32(0),
        },
        QSpec("int8"),
    )


def error(x, low, high, spec):
    return np.mean((x - rounded(x, low, high, spec)) ** 2)


@pytest.mark.parametrize("name", DATA)
def test_percentiles_are_within_a_bin(name):
    x = data(name)
    for bins, q in ((2048, 99.99), (2048, 99.0), (64, 90.0), (256, 100.0), (64, 30.0)):
        bound = 4 * np.abs(x).max() / bins
        low, high = chosen(percentile(q, bins), x, QSpec("int8"))
        exact = np.quantile(np.abs(x), q / 100, method="inverted_cdf")
        assert high == -low and exact <= high <= exact + bound
        assert np.mean(np.abs(x) > high) <= (100 - q) / 100 + 1e-9
        low, high = chosen(percentile(q, bins), x, QSpec("int8", symmetric=False))
        tail = (100 - q) / 200
        exact_low = min(-np.quantile(-x, 1 - tail, method="inverted_cdf"), 0)
        exact_high = max(np.quantile(x, 1 - tail, method="inverted_cdf"), 0)
        assert exact_low - bound <= low <= exact_low
        assert exact_high <= high <= exact_high + bound
        assert np.mean((x > high) | (x < low)) <= (100 - q) / 100 + 1e-9


@pytest.mark.parametrize("name", DATA)
def test_mse_is_close_to_a_brute_force_search(name):
    x = data(name)
    low, high = min(x.min(), 0), max(x.max(), 0)
    state = one_pass(mse(), jnp.asarray(x)[None])
    factors = np.linspace(1, 80, 80) / 80
    for spec in SPECS:
        found = mse().finish(state, spec)
        ours = error(x, float(found.low), float(found.high), spec)
        assert ours <= error(x, low, high, spec) * 1.01
        if spec.symmetric:
            best = min(error(x, f * low, f * high, spec) for f in factors)
        else:
            few = factors[::-8]
            best = min(error(x, f * low, g * high, spec) for f in few for g in few)
        assert ours <= best * 1.02, (spec, found, ours, best)


def test_mse_of_other_formats():
    x = data("outliers")
    state = one_pass(mse(), jnp.asarray(x)[None])
    ends = {
        name: float(mse().finish(state, QSpec(name)).high)
        for name in ("nf4", "float8_e4m3fn", "int16", "bfloat16")
    }
    assert ends["nf4"] < 20 and ends["float8_e4m3fn"] > 50
    assert ends["int16"] == ends["bfloat16"] == 60.0


def kl_reference(counts, levels):
    """The documented search written plainly: bin by bin, level by level."""
    last = np.flatnonzero(counts)[-1] + 1
    best, best_i = np.inf, last
    for i in range(levels, last + 1):
        reference = counts[:i].copy()
        reference[-1] += counts[i:].sum()
        candidate = np.zeros(i)
        level = np.arange(i) * levels // i
        for g in range(levels):
            members = np.flatnonzero((level == g) & (counts[:i] > 0))
            if members.size:
                candidate[members] = counts[members].sum() / members.size
        p, q = reference / counts.sum(), candidate / counts.sum()
        held = p > 0
        if (q[held] == 0).any():
            continue
        divergence = np.sum(p[held] * np.log(p[held] / q[held]))
        if divergence <= best + 1e-12:
            best, best_i = divergence, i
    return best_i


@pytest.mark.parametrize("name", DATA)
def test_entropy_is_the_plain_search(name):
    x = data(name)
    state = one_pass(entropy(bins=256), jnp.asarray(x)[None])
    seen = bars(state)
    up, down = seen.counts[128:], seen.counts[:128][::-1]

    def end(counts, levels, limit):
        return min(kl_reference(counts, levels) * seen.width, limit) if counts.any() else 0.0

    amax = max(-seen.low, seen.high)
    for fmt, levels in (("int4", 8), ("uint5", 32), ("int8", 128)):
        found = entropy(bins=256).finish(state, QSpec(fmt))
        assert float(found.high) == pytest.approx(end(up + down, levels, amax), rel=1e-6)
        assert float(found.low) == -float(found.high)
    found = entropy(bins=256).finish(state, QSpec("int5", symmetric=False))
    levels = 32 if min(-seen.low, seen.high) == 0 else 16
    assert float(found.high) == pytest.approx(end(up, levels, seen.high), rel=1e-6)
    assert float(found.low) == pytest.approx(-end(down, levels, -seen.low), rel=1e-6)


def test_entropy_cuts_outliers_and_keeps_what_is_even():
    assert chosen(entropy(), data("outliers"), QSpec("int8"))[1] < 10
    even = np.random.default_rng(0).uniform(-1, 1, size=SIZE).astype(np.float32)
    assert chosen(entropy(), even, QSpec("int8"))[1] > 0.95


@pytest.mark.parametrize("shift", [5.0, -10.0, 50.0])
def test_entropy_keeps_data_far_from_zero(shift):
    x = (np.random.default_rng(1).normal(size=SIZE) + shift).astype(np.float32)
    for spec in (QSpec("int8"), QSpec("int8", symmetric=False)):
        low, high = chosen(entropy(), x, spec)
        assert np.mean((x < low) | (x > high)) < 0.01


def test_a_fraction_for_percent_is_refused():
    with pytest.raises(ValueError, match=r"q is in percent, such as 99\.9.* did you mean 99\.9\?"):
        percentile(0.999)


@pytest.mark.parametrize("observer", [percentile(), mse(), entropy()])
@pytest.mark.parametrize("value", [0.0, 1e-42, -3.4e38, 1.5])
def test_a_constant(observer, value):
    """Zero, subnormal, huge and common: the range holds the value, and nothing overflows."""
    x = np.full(50, value, np.float32)
    for spec in (QSpec("int8"), QSpec("int8", symmetric=False)):
        low, high = chosen(observer, x, spec)
        size = np.abs(x[0]) if abs(value) > 1e-38 else 0.0
        assert low <= 0 <= high and max(-low, high) <= size
        if size:
            np.testing.assert_allclose(rounded(x, low, high, spec), x, rtol=0.01)


def test_a_choice_takes_milliseconds():
    for observer in (percentile(), mse(), entropy()):
        for spec in (QSpec("int8"), QSpec("int8", symmetric=False)):
            state = one_pass(observer, jnp.asarray(data("laplace"))[None])
            observer.finish(state, spec)
            start = time.perf_counter()
            observer.finish(state, spec)
            assert time.perf_counter() - start < 0.5  # about 10 ms on an idle core
