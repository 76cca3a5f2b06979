"""Observers to test, batches to feed them, and a pass over batches compiled once for each."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.observers import (
    absmax,
    entropy,
    histogram,
    minmax,
    moving_average,
    mse,
    percentile,
    profile,
)

OBSERVERS = {
    "absmax": absmax,
    "minmax": minmax,
    "moving_average": functools.partial(moving_average, decay=0.7),
    "histogram": functools.partial(histogram, bins=64),
    "percentile": functools.partial(percentile, q=99.0, bins=64),
    "mse": functools.partial(mse, bins=64),
    "entropy": functools.partial(entropy, bins=64),
}
SHAPE = (3, 5, 4)


@functools.partial(jax.jit, static_argnums=0)
def one_pass(observer, batches, wanted=None):
    """The state after those batches `[n, ...]` that are wanted, by `cond` within `scan`."""
    wanted = jnp.ones(len(batches), bool) if wanted is None else wanted

    def step(state, given):
        x, want = given
        return lax.cond(want, observer.update, lambda s, _: s, state, x), None

    return lax.scan(step, observer.init(batches[0]), (batches, wanted))[0]


@functools.partial(jax.jit, static_argnums=0)
def merged(observer, a, b):
    return observer.merge(a, b)


def same(a, b, rtol=0.0):
    """Asserts that two states are alike: bit for bit, or floats to `rtol`."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        value, other = np.asarray(value), np.asarray(b[name])
        assert value.dtype == other.dtype and value.shape == other.shape, name
        if rtol and value.dtype == np.float32:
            np.testing.assert_allclose(value, other, rtol=rtol, err_msg=name)
        else:
            np.testing.assert_array_equal(value, other, err_msg=name)


def counts(state):
    """The counts of a histogram as int64 `[..., bins + 1]`."""
    low, high = (np.asarray(state[name]).astype(np.int64) for name in ("counts", "carry"))
    return low + (high << 32)


__all__ = ["OBSERVERS", "SHAPE", "counts", "merged", "one_pass", "profile", "same"]
