"""The dynamic 8-bit map against its definition and against an exhaustive search."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.numerics.dynamic_map import decode_dynamic, dynamic_map, encode_dynamic

SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def reference(signed: bool) -> np.ndarray:
    """As the paper builds it: interval means of `linspace(0.1, 1)` in each of seven decades."""
    values = [0.0, 1.0]
    for i in range(7):
        bounds = np.linspace(0.1, 1, (2**i if signed else 2 ** (i + 1)) + 1)
        means = (bounds[1:] + bounds[:-1]) / 2 * 10.0 ** (i - 6)
        values += [*means, *(-means if signed else [])]
    return np.sort(values)


def nearest(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Index of the nearest value in float64; a tie goes to the smaller magnitude."""
    values = values.astype(np.float64)
    distance = np.abs(x.astype(np.float64)[:, None] - values[None])
    tied = distance == distance.min(axis=1, keepdims=True)
    return np.argmin(np.where(tied, np.abs(values)[None], np.inf), axis=1)


def samples(values: np.ndarray) -> np.ndarray:
    """Values, bounds between them with their neighbours in float32, and numbers of every size."""
    rng = np.random.default_rng(0)
    middle = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(middle, np.float32(end)) for end in (-2, 2)]
    sizes = (10.0 ** rng.uniform(-9, 0.3, 3000) * rng.choice([-1, 1], 3000)).astype(np.float32)
    return np.concatenate([values, middle, *beside, sizes, np.float32([0, -0.0, 1, -1])])


@SIGNED
def test_values(signed: bool) -> None:
    values = np.asarray(dynamic_map(signed), np.float32)
    assert values.shape == (256,) and np.all(np.diff(values) > 0)
    np.testing.assert_allclose(values, reference(signed), rtol=1e-7)
    np.testing.assert_array_equal(decode_dynamic(jnp.arange(256, dtype=jnp.uint8), signed), values)
    assert values[-1] == 1 and 0 in values and (values[0] > -1)


@SIGNED
def test_codes_are_nearest(signed: bool) -> None:
    values = np.asarray(dynamic_map(signed), np.float32)
    x = samples(values)
    want = nearest(x, values)
    for encode in (encode_dynamic, jax.jit(encode_dynamic, static_argnums=1)):
        got = encode(jnp.asarray(x), signed)
        assert got.dtype == jnp.uint8
        np.testing.assert_array_equal(got, want)


@SIGNED
def test_beyond_the_ends(signed: bool) -> None:
    x = jnp.array([np.inf, 3e38, 1e-45, -np.inf, -3e38], jnp.float32)
    zero = dynamic_map(signed).index(0.0)
    assert encode_dynamic(x, signed).tolist() == [255, 255, zero, 0, 0]
    assert int(encode_dynamic(jnp.array(np.nan), signed)) in (0, 255)


@SIGNED
def test_codes_come_back(signed: bool) -> None:
    codes = jnp.arange(256, dtype=jnp.uint8).reshape(2, 8, 16)
    np.testing.assert_array_equal(encode_dynamic(decode_dynamic(codes, signed), signed), codes)
