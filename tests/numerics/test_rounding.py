"""Rounding: nearest against NumPy, stochastic by its distribution and its determinism."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.numerics import (
    FORMATS,
    Format,
    codebook_format,
    decode,
    encode,
    get,
    nearest_even,
    stochastic,
    to_codebook,
)

PLAIN = [f for f in FORMATS.values() if isinstance(f, Format) and f.name != "float32"]
PLAIN += [codebook_format(np.linspace(-3.0, 4.0, 100), name="wide")]
DRAWS = 4096
# Draws are independent, so the mean of n of them has deviation sqrt(p (1 - p) / n). Six of those
# are passed by chance once in 5e8 cases; keys are fixed, so that a run can be repeated.
SIGMAS = 6.0


def each(formats):
    return pytest.mark.parametrize("f", formats, ids=lambda f: f.name)


def grid(f):
    """The finite values of a format, ascending, as float64."""
    if f.is_integer:
        return np.arange(f.qmin, f.qmax + 1, dtype=np.float64)
    if f.is_codebook:
        return np.asarray(f.codebook, np.float64)
    patterns = np.arange(2**f.bits, dtype=np.uint8 if f.bits <= 8 else np.uint16)
    codes = patterns if f.storage == "uint8" else patterns.view(jnp.dtype(f.storage))
    values = np.asarray(decode(codes, f))
    return np.unique(values[np.isfinite(values)].astype(np.float64))


def rounded(x, f, key):
    """`x` through the codes and back, eagerly: one shape for all formats compiles its ops once."""
    return np.asarray(decode(encode(x, f, key=key), f)).astype(np.float64)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_nearest_even_is_that_of_numpy(dtype):
    x = np.concatenate([np.arange(-20, 20) / 4, [1e4, -0.0, np.inf, -np.inf, np.nan]]).astype(dtype)
    got = nearest_even(x)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, np.round(x))
    np.testing.assert_array_equal(np.signbit(got), np.signbit(np.round(x)))


@each(PLAIN)
def test_stochastic_codes_are_neighbours_without_bias(f, key):
    values = np.unique(grid(f))  # a codebook may hold a value twice
    # Gaps all over the range: the ends, those around zero (subnormals), and some between.
    at = np.linspace(0, len(values) - 2, 9).astype(int)
    zero = np.searchsorted(values, 0.0)
    at = np.append(at, np.clip(np.arange(zero - 2, zero + 2), 0, len(values) - 2))
    fraction = np.array([[0.1], [0.5], [0.85]])
    low, high = np.broadcast_arrays(values[at], values[at + 1], fraction)[:2]
    x = (low + fraction * (high - low)).astype(np.float32)
    p = (x.astype(np.float64) - low) / (high - low)  # what rounding to float32 left of it
    draws = np.broadcast_to(x, (DRAWS, *x.shape))
    got = rounded(draws, f, key)
    assert ((got == low) | (got == high)).all()
    bound = SIGMAS * np.sqrt(p * (1 - p) / DRAWS)
    np.testing.assert_array_less(np.abs((got == high).mean(0) - p), bound)


@each(PLAIN)
def test_stochastic_leaves_exact_values_and_saturates(f, key):
    values = grid(f)
    values = values[np.linspace(0, len(values) - 1, 60).astype(int)].astype(np.float32)
    with np.errstate(over="ignore"):
        outside = np.float32([f.max * 1.01, f.min * 1.01 - (f.min == 0), np.inf, -np.inf])
    if f.min > 0:
        outside[1] = -1.0
    got = rounded(np.concatenate([values, outside]), f, key)
    want = np.concatenate([values, np.float32([f.max, f.min, f.max, f.min])])
    np.testing.assert_array_equal(got, want)


@each([get(n) for n in ("int4", "float8_e4m3fn", "float8_e8m0fnu", "nf4")])
def test_a_key_gives_the_same_codes_however_it_is_run(f, key):
    x = np.random.default_rng(0).lognormal(size=(8, 16)).astype(np.float32)

    def run(x):
        return encode(x, f, key=key)

    eager = np.asarray(run(x))
    np.testing.assert_array_equal(np.asarray(jax.jit(run)(x)), eager)
    assert (np.asarray(encode(x, f, key=jax.random.fold_in(key, 1))) != eager).any()


def test_stochastic_rounding_of_tiny_and_special_values(key):
    # `x - floor(x)` is 1.0 in float32 for a tiny negative x: it must not always round to -1.
    x = np.float32([-1e-9, 1e-9, -0.0, 2.0**30, np.inf, -np.inf, np.nan])
    got = stochastic(x, key)
    np.testing.assert_array_equal(got, np.float32([0, 0, 0, 2.0**30, np.inf, -np.inf, np.nan]))
    np.testing.assert_array_equal(np.signbit(got[:3]), [True, False, True])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_stochastic_keeps_the_dtype_and_the_mean(dtype, key):
    x = jnp.full(DRAWS, -2.25, dtype)
    got = stochastic(x, key)
    assert got.dtype == dtype
    mean = np.asarray(got, np.float64).mean()
    assert abs(mean + 2.25) < SIGMAS * np.sqrt(0.25 * 0.75 / DRAWS)


@pytest.mark.parametrize("n", [1, 2, 16, 17, 100, 256])
def test_to_codebook_is_the_nearest_and_ties_go_down(n):
    rng = np.random.default_rng(n)
    values = np.unique(rng.integers(-1000, 1000, 4 * n))
    values = np.sort(rng.choice(values, n, replace=False)).astype(np.float32)
    middle = (values[1:] + values[:-1]) / 2  # exact: integers and halves
    beside = [np.nextafter(middle, np.float32(s)) for s in (-np.inf, np.inf)]
    x = np.concatenate([values, middle, *beside, np.float32([-2e3, 2e3, -0.0])])
    distance = np.abs(x[:, None].astype(np.float64) - values.astype(np.float64)[None, :])
    want = distance.argmin(1)  # the first of equals: the lower value
    np.testing.assert_array_equal(to_codebook(x, values), want)
    np.testing.assert_array_equal(jax.jit(to_codebook)(x, values), want)


@pytest.mark.parametrize("n", [2, 16, 100])
def test_to_codebook_takes_signed_zeros_for_one_value(n, key):
    values = np.arange(n, dtype=np.float32) - n // 2
    for k in (None, key):
        zeros = to_codebook(np.float32([0.0, -0.0]), values, k)
        np.testing.assert_array_equal(zeros, [n // 2, n // 2])


def test_to_codebook_with_repeated_values(key):
    values = np.float32([-1.0, 0.0, 0.0, 0.0, 2.0])
    x = np.float32([-1.0, 0.0, 0.3, 2.0, -9.0, 9.0])
    for k in (None, key):
        got = values[np.asarray(to_codebook(x, values, k))]
        assert got[[0, 1, 3, 4, 5]].tolist() == [-1.0, 0.0, 2.0, -1.0, 2.0]
        assert got[2] in (0.0, 2.0)


def test_to_codebook_batches_through_vmap():
    rng = np.random.default_rng(0)
    values = np.sort(rng.normal(size=(3, 16)).astype(np.float32))
    x = rng.normal(size=(3, 4, 5)).astype(np.float32)
    loop = np.stack([to_codebook(a, v) for a, v in zip(x, values, strict=True)])
    np.testing.assert_array_equal(jax.vmap(to_codebook)(x, values), loop)


@pytest.mark.parametrize("values", [np.zeros(0), np.zeros((2, 2)), 1.0])
def test_to_codebook_refuses_other_shapes(values):
    with pytest.raises(ValueError, match="codebook values"):
        to_codebook(np.zeros(3, np.float32), values)
