"""What holds for every observer: shards that are merged are one pass, at any granularity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import QSpec, observers
from jaxquant.observers import (
    Histogram,
    Observer,
    absmax,
    finish_stacked,
    minmax,
    moving_average,
    profile,
)
from tests.observers.cases import OBSERVERS, SHAPE, merged, one_pass, same

AXES = [None, -1, (2, 0)]
SEARCHES = ["percentile", "mse", "entropy"]
CASES = [(name, axis) for name in OBSERVERS if name not in SEARCHES for axis in AXES]


def made(name, axis):
    return OBSERVERS[name](axis=axis)


@pytest.fixture(scope="module")
def batches():
    """Magnitudes over 60 decades, so that histograms grow, and batches of zeros among them."""
    x = np.random.default_rng(0).normal(size=(8, *SHAPE))
    x *= np.array([1e-20, 0.0, 1e-22, 3e-3, 1.0, 0.0, 1e30, 2.0]).reshape(8, 1, 1, 1)
    return jnp.asarray(x, jnp.float32)


def both(name, axis):
    return profile(bins=64) if name == "profile" else made(name, axis)


@pytest.mark.parametrize(("name", "axis"), [*CASES, ("profile", None)])
def test_merged_shards_are_one_pass(name, axis, batches):
    observer = both(name, axis)
    rtol = 1e-6 if name == "moving_average" else 0.0
    whole = one_pass(observer, batches, np.ones(8, bool))
    empty = observer.init(batches[0])
    same(merged(observer, empty, whole), whole)
    same(merged(observer, whole, empty), whole)
    rng = np.random.default_rng(1)
    for _ in range(3):
        first, second = np.sort(rng.integers(0, 9, size=2))
        shards = [
            one_pass(observer, batches, (np.arange(8) >= start) & (np.arange(8) < stop))
            for start, stop in ((0, first), (first, second), (second, 8))
        ]
        left = merged(observer, merged(observer, *shards[:2]), shards[2])
        right = merged(observer, shards[0], merged(observer, *shards[1:]))
        same(left, whole, rtol)
        same(right, whole, rtol)
    if name != "moving_average":  # the one in which order counts
        odd = np.arange(8) % 2 == 1
        parts = one_pass(observer, batches, odd), one_pass(observer, batches, ~odd)
        same(merged(observer, *parts), whole)


@pytest.mark.parametrize("name", [*OBSERVERS, "profile"])
def test_it_is_a_value_and_its_state_is_fixed(name):
    observer = both(name, None)
    assert isinstance(observer, Observer)
    assert observer == both(name, None) and hash(observer) == hash(both(name, None))
    aval = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)
    state = jax.eval_shape(observer.init, aval)
    assert jax.eval_shape(observer.update, state, aval) == state
    assert jax.eval_shape(observer.merge, state, state) == state
    assert all(state[counter].dtype == jnp.int32 for counter in ("updates", "bad"))


@pytest.mark.parametrize("name", SEARCHES)
def test_searches_keep_a_histogram(name):
    """So what holds for `histogram` holds for them."""
    for method in ("init", "update", "merge"):
        assert getattr(type(made(name, None)), method) is getattr(Histogram, method)


@pytest.mark.parametrize("name", sorted({*OBSERVERS, "profile"} - {*SEARCHES}))
def test_what_is_not_finite_is_counted_and_nothing_else(name, batches):
    observer = both(name, None)
    clean = one_pass(observer, batches, np.ones(8, bool))
    x = np.array(batches)
    spoiled = np.insert(x, [2, 5, 8], x[3:4], axis=0)
    spoiled[2, 0, 0, 0], spoiled[6, 1, 2, 3], spoiled[10, 2, 0, 1] = np.nan, np.inf, -np.inf
    state = one_pass(observer, jnp.asarray(spoiled), np.ones(11, bool))
    assert int(state["updates"]) == 11 and int(state["bad"]) == 3
    same({**state, "updates": clean["updates"], "bad": clean["bad"]}, clean)
    with pytest.raises(ValueError, match="non-finite values in 3 of 11 batches"):
        observer.finish(state, QSpec("int8"))
    with pytest.raises(ValueError, match="no batches seen"):
        observer.finish(observer.init(x[0]), QSpec("int8"))


@pytest.mark.parametrize("name", ["moving_average", "histogram", "mse"])
def test_stacked_states_are_a_loop(name):
    """Layers of a scan: states stacked in front are merged as they are and finished one by one."""
    observer = both(name, None if name == "mse" else -1)
    x = np.random.default_rng(2).normal(size=(3, 2, *SHAPE)).astype(np.float32)
    x *= np.array([1e-3, 1.0, 50.0], np.float32).reshape(3, 1, 1, 1, 1)
    spec = QSpec("int4", symmetric=False)
    over_layers = jax.jit(jax.vmap(lambda v: one_pass(observer, v)))
    state = merged(observer, over_layers(x[:, :1]), over_layers(x[:, 1:]))
    state = {name: np.asarray(value) for name, value in state.items()}
    found = finish_stacked(observer, state, spec, 1)
    for layer in range(3):
        one = one_pass(observer, x[layer])
        same({k: v[layer] for k, v in state.items()}, one, 1e-6)
        expected = observer.finish(one, spec)
        for end, other in zip(found, expected, strict=True):
            assert end.dtype == jnp.float32 and end.shape == (3, *other.shape)
            np.testing.assert_allclose(np.asarray(end)[layer], np.asarray(other), rtol=1e-6)
        assert (np.asarray(expected.low) <= 0).all() and (np.asarray(expected.high) >= 0).all()
    same(found._asdict(), finish_stacked(observer, state, spec, 1)._asdict())
    twice = {name: np.stack([value, value]) for name, value in state.items()}
    assert finish_stacked(observer, twice, spec, 2).low.shape == (2, *found.low.shape)
    with pytest.raises(ValueError, match="use finish_stacked"):
        observer.finish(state, spec)
    unseen = {**state, "updates": np.array([2, 0, 2])}
    with pytest.raises(ValueError, match="layer 1: no batches seen"):
        finish_stacked(observer, unseen, spec, 1)


def test_fewer_bins_per_channel():
    for name, bins in (("histogram", 2048), ("percentile", 2048), ("mse", 2048), ("entropy", 4096)):
        make = getattr(observers, name)
        assert make().bins == bins and make(axis=-1).bins == bins // 8


def test_ranges_of_channels(batches):
    x = np.asarray(batches[2:5], np.float64)
    for axis, kept in ((None, ()), ((2, 0), (1, 3))):
        shared = tuple(a for a in range(4) if a not in kept)
        low, high = np.minimum(x.min(shared), 0), np.maximum(x.max(shared), 0)
        for observer in (minmax(axis), OBSERVERS["histogram"](axis=axis)):
            found = observer.finish(one_pass(observer, batches[2:5]), QSpec("int8"))
            np.testing.assert_array_equal(np.asarray(found.low), low.astype(np.float32))
            np.testing.assert_array_equal(np.asarray(found.high), high.astype(np.float32))
        found = absmax(axis).finish(one_pass(absmax(axis), batches[2:5]), QSpec("int8"))
        amax = np.maximum(-low, high).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(found.high), amax)
        np.testing.assert_array_equal(np.asarray(found.low), -amax)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_moving_average(decay):
    x = np.random.default_rng(3).normal(size=(7, 6)).astype(np.float32)
    found = moving_average(decay).finish(one_pass(moving_average(decay), x), QSpec("int8"))
    weights = float(decay) ** np.arange(6, -1, -1)
    expected = np.average(x.max(1).astype(np.float64), weights=weights)
    assert float(found.high) == pytest.approx(expected, rel=1e-5)
    expected = np.average(x.min(1).astype(np.float64), weights=weights)
    assert float(found.low) == pytest.approx(expected, rel=1e-5)
    huge = one_pass(moving_average(decay), np.full((3, 2), 3e38, np.float32))
    assert float(moving_average(decay).finish(huge, QSpec("int8")).high) == pytest.approx(3e38)


def test_mistakes():
    for bad in (-0.1, 1.0, 2):
        with pytest.raises(ValueError, match="decay"):
            moving_average(bad)
    for bad in (0, -1, 100.5):
        with pytest.raises(ValueError, match="0 < q <= 100"):
            OBSERVERS["percentile"](q=bad)
    for bad in (8, 100, 2**17, 64.0):
        with pytest.raises(ValueError, match="power of two"):
            OBSERVERS["histogram"](bins=bad)
    with pytest.raises(ValueError, match=r"axis 2 of an array of shape \[4, 3\]"):
        minmax(2).init(jnp.zeros((4, 3)))
    with pytest.raises(ValueError, match="named twice"):
        minmax((0, -2)).init(jnp.zeros((4, 3)))
    with pytest.raises(ValueError, match="an int or a tuple"):
        minmax([0])
    with pytest.raises(dataclasses.FrozenInstanceError):
        minmax().axis = 1
