"""The streaming histogram: its counts are those of NumPy at any range, and none is lost."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.observers import histogram
from jaxquant.observers.noise import bars
from tests.observers.cases import counts, merged, one_pass, same

TINY = float(np.finfo(np.float32).tiny)


def expected(x, bins):
    """Counts and exponent of all values `x` at once, in float64."""
    x = np.asarray(x, np.float64).ravel()
    x = np.where(np.abs(x) < TINY, 0.0, x)
    amax = np.abs(x).max()
    exponent = max(int(np.frexp(amax)[1]) if amax else -999, int(np.log2(bins)) - 127)
    m = np.floor(np.abs(x) * 2.0 ** (np.log2(bins) - 1 - exponent)).astype(int)
    cell = np.where(x < 0, bins // 2 - 1 - m, bins // 2 + m)
    cell = np.where(x == 0, bins, cell)
    return np.bincount(cell, minlength=bins + 1), exponent


def holds(observer, x):
    state = one_pass(observer, jnp.asarray(x))
    wanted, exponent = expected(x, observer.bins)
    assert int(state["exponent"]) == exponent
    np.testing.assert_array_equal(counts(state), wanted)
    return state


MAGNITUDES = [
    [1.0, 1.0, 1.0, 1.0],
    [1e-30, 1e-3, 5.0, 1e30],
    [3.4e38, 1e-38, 0.0, 1.0],
    [0.0, 0.0, 0.0, 0.0],
    [1e-45, 1e-40, 1e-39, 0.0],
    [1e-45, 1e-37, 2e-38, 1e-36],
    [4.0, 2.0, 1.0, 0.5],
]


@pytest.mark.parametrize("magnitudes", MAGNITUDES)
def test_growing_keeps_every_value_in_its_bin(magnitudes):
    x = np.random.default_rng(0).uniform(-1, 1, size=(4, 100)) * np.array(magnitudes)[:, None]
    x[:, :3] = np.array([1.0, -1.0, 0.5]) * np.array(magnitudes)[:, None]  # edges of bins
    x = x.astype(np.float32)
    state = holds(histogram(64), x)
    assert counts(state).sum() == x.size
    host = bars(state)
    assert host.total == x.size and host.high == max(np.where(x < TINY, 0, x).max(), 0)
    # merged in any order
    one = [one_pass(histogram(64), x[i : i + 1]) for i in (3, 0, 2, 1)]
    total = one[0]
    for other in one[1:]:
        total = merged(histogram(64), total, other)
    same(total, state)


def test_channels_are_histograms_of_their_own():
    x = np.random.default_rng(1).normal(size=(2, 3, 40, 5)) * 10.0 ** np.arange(-2, 3)
    x = x.astype(np.float32)
    state = one_pass(histogram(64, axis=(0, -1)), x)
    assert counts(state).shape == (3, 5, 65)
    for row in range(3):
        for channel in range(5):
            wanted, exponent = expected(x[:, row, :, channel], 64)
            assert int(state["exponent"][row, channel]) == exponent
            np.testing.assert_array_equal(counts(state)[row, channel], wanted)


def test_narrow_floats_are_read_exactly():
    x = np.random.default_rng(2).normal(size=(4, 100)) * 100
    for dtype in (jnp.bfloat16, jnp.float16):
        holds(histogram(64), jnp.asarray(x, dtype))


def test_counts_beyond_one_word():
    """Doubled 34 times by merging with itself, then coarsened: 64-bit arithmetic throughout."""
    x = np.concatenate([np.linspace(-1, 1, 999), np.zeros(26)]).astype(np.float32)
    observer = histogram(64)
    state = one_pass(observer, x[None])
    wanted, _ = expected(x, 64)

    @jax.jit
    def grown(state, far):
        doubled = jax.lax.fori_loop(0, 34, lambda _, s: observer.merge(s, s), state)
        return doubled, observer.update(doubled, far)

    far = jnp.asarray([100.0, -100.0, 0.5])
    doubled, wide = grown(state, far)
    np.testing.assert_array_equal(counts(doubled), wanted << 34)
    wider, exponent = expected(np.concatenate([x, far]), 64)
    once, _ = expected(far, 64)
    assert int(wide["exponent"]) == exponent == 7
    np.testing.assert_array_equal(counts(wide), ((wider - once) << 34) + once)
    assert bars(wide).total == 1025 * 2.0**34 + 3


def test_no_mass_is_lost_where_float32_stops_counting():
    observer = histogram(16)
    state = one_pass(observer, np.ones((1, 1), np.float32))
    full = {**state, "counts": jnp.full_like(state["counts"], 2**32 - 1)}
    after = one_pass(observer, np.ones((1, 1), np.float32))
    total = counts(merged(observer, full, after))
    np.testing.assert_array_equal(total, 2**32 - 1 + counts(after))


@hypothesis.given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=12, max_size=12)
)
@hypothesis.settings(max_examples=50)
def test_any_floats(values):
    holds(histogram(32), np.array(values, np.float32).reshape(3, 4))


def test_it_is_compiled_without_sorting_or_loops_over_values():
    """The only loop is the one that widens the range, over bins."""
    observer = histogram(64)
    state, x = observer.init(jnp.zeros(1)), jnp.zeros((128, 8))
    jaxpr = str(jax.make_jaxpr(observer.update)(state, x))
    assert "sort[" not in jaxpr and "scan[" not in jaxpr
    assert jaxpr.count("while[") == jaxpr.count("scatter-add[") == 1
