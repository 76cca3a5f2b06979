"""Rounding: nearest against NumPy, stochastic by its distribution and its determinism."""

from functools import partial

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


@partial(jax.jit, static_argnums=1)
def rounded(arrays, formats, key):
    """Each array through the codes of its format and back, in one program."""
    pairs = zip(arrays, formats, strict=True)
    return [decode(encode(x, f, key=key), f) for x, f in pairs]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_nearest_even_is_that_of_numpy(dtype):
    x = np.concatenate([np.arange(-20, 20) / 4, [1e4, -0.0, np.inf, -np.inf, np.nan]]).astype(dtype)
    got = nearest_even(x)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, np.round(x))
    np.testing.assert_array_equal(np.signbit(got), np.signbit(np.round(x)))


def between(f):
    """What lies between neighbours, the neighbours, and how far it is from one to the other."""
    values = np.unique(grid(f))  # a codebook may hold a value twice
    # Gaps all over the range: the ends, those around zero (subnormals), and some between.
    at = np.linspace(0, len(values) - 2, 9).astype(int)
    zero = np.searchsorted(values, 0.0)
    at = np.append(at, np.clip(np.arange(zero - 2, zero + 2), 0, len(values) - 2))
    fraction = np.array([[0.1], [0.5], [0.85]])
    low, high = np.broadcast_arrays(values[at], values[at + 1], fraction)[:2]
    x = (low + fraction * (high - low)).astype(np.float32)
    p = (x.astype(np.float64) - low) / (high - low)  # what rounding to float32 left of it
    return x, low, high, p


def test_stochastic_codes_are_neighbours_without_bias(key):
    cases = [between(f) for f in PLAIN]
    draws = [np.broadcast_to(x, (DRAWS, *x.shape)) for x, *_ in cases]
    drawn = rounded(draws, tuple(PLAIN), key)
    for f, (_, low, high, p), values in zip(PLAIN, cases, drawn, strict=True):
        got = np.asarray(values).astype(np.float64)
        assert ((got == low) | (got == high)).all(), f
        bound = SIGMAS * np.sqrt(p * (1 - p) / DRAWS)
        off = np.abs((got == high).mean(0) - p)
        np.testing.assert_array_less(off, bound, err_msg=f.name)


def test_stochastic_leaves_exact_values_and_saturates(key):
    given, wants = [], []
    for f in PLAIN:
        values = grid(f)
        values = values[np.linspace(0, len(values) - 1, 60).astype(int)].astype(np.float32)
        with np.errstate(over="ignore"):
            outside = np.float32([f.max * 1.01, f.min * 1.01 - (f.min == 0), np.inf, -np.inf])
        if f.min > 0:
            outside[1] = -1.0
        given.append(np.concatenate([values, outside]))
        wants.append(np.concatenate([values, np.float32([f.max, f.min, f.max, f.min])]))
    got = rounded(given, tuple(PLAIN), key)
    for f, values, want in zip(PLAIN, got, wants, strict=True):
        np.testing.assert_array_equal(values, want, err_msg=f.name)


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
    got = np.asarray(stochastic(x, key))
    np.testing.assert_array_equal(got, np.float32([0, 0, 0, 2.0**30, np.inf, -np.inf, np.nan]))
    np.testing.assert_array_equal(np.signbit(got[:3]), [True, False, True])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_stochastic_keeps_the_dtype_and_the_mean(dtype, key):
    x = np.full(DRAWS, -2.25, jnp.dtype(dtype))
    got = stochastic(x, key)
    assert got.dtype == dtype
    mean = np.asarray(got, np.float64).mean()
    assert abs(mean + 2.25) < SIGMAS * np.sqrt(0.25 * 0.75 / DRAWS)


def codebook_cases(n):
    """Values of a codebook; what decides between them; the indices of the nearest."""
    rng = np.random.default_rng(n)
    values = np.unique(rng.integers(-1000, 1000, 4 * n))
    values = np.sort(rng.choice(values, n, replace=False)).astype(np.float32)
    middle = (values[1:] + values[:-1]) / 2  # exact: integers and halves
    beside = [np.nextafter(middle, np.float32(s)) for s in (-np.inf, np.inf)]
    x = np.concatenate([values, middle, *beside, np.float32([-2e3, 2e3, -0.0])])
    distance = np.abs(x[:, None].astype(np.float64) - values.astype(np.float64)[None, :])
    return values, x, distance.argmin(1)  # the first of equals: the lower value


@jax.jit
def to_codebooks(arrays, codebooks, key=None):
    return [to_codebook(x, values, key) for x, values in zip(arrays, codebooks, strict=True)]


def test_to_codebook_is_the_nearest_and_ties_go_down():
    sizes = (1, 2, 16, 17, 100, 256)
    books, arrays, wants = zip(*map(codebook_cases, sizes), strict=True)
    for n, got, want in zip(sizes, to_codebooks(arrays, books), wants, strict=True):
        np.testing.assert_array_equal(got, want, err_msg=f"{n} values")


@pytest.mark.parametrize("n", [1, 2, 16, 256])
def test_to_codebook_is_the_nearest_eagerly(n):
    values, x, want = codebook_cases(n)
    np.testing.assert_array_equal(to_codebook(x, values), want)


def test_to_codebook_takes_signed_zeros_for_one_value(key):
    sizes = (2, 16, 100)
    books = [np.arange(n, dtype=np.float32) - n // 2 for n in sizes]
    for k in (None, key):
        every = to_codebooks([np.float32([0.0, -0.0])] * 3, books, k)
        for n, zeros in zip(sizes, every, strict=True):
            np.testing.assert_array_equal(zeros, [n // 2, n // 2], err_msg=f"{n} values, {k}")


def test_to_codebook_with_repeated_values(key):
    values = np.float32([-1.0, 0.0, 0.0, 0.0, 2.0])
    x = np.float32([-1.0, 0.0, 0.3, 2.0, -9.0, 9.0])
    for k in (None, key):
        got = values[np.asarray(to_codebooks([x], [values], k)[0])]
        assert got[[0, 1, 3, 4, 5]].tolist() == [-1.0, 0.0, 2.0, -1.0, 2.0]
        assert got[2] in (0.0, 2.0)


def test_to_codebook_batches_through_vmap():
    rng = np.random.default_rng(0)
    values = np.sort(rng.normal(size=(3, 16)).astype(np.float32))
    x = rng.normal(size=(3, 4, 5)).astype(np.float32)
    loop = np.stack(to_codebooks(list(x), list(values)))
    np.testing.assert_array_equal(jax.jit(jax.vmap(to_codebook))(x, values), loop)


@pytest.mark.parametrize("values", [np.zeros(0), np.zeros((2, 2)), 1.0])
def test_to_codebook_refuses_other_shapes(values):
    with pytest.raises(ValueError, match="codebook values"):
        to_codebook(np.zeros(3, np.float32), values)
