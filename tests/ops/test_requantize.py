import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxquant.ops.integer.requantize import fixed_point, rescaled
from tests.ops import integer_reference as ref

MOST, LEAST = 2**31 - 1, -(2**31)
ENDS = [0, 1, -1, 2, -2, 3, -3, 7, -7, MOST, MOST - 1, LEAST, LEAST + 1, 2**30, -(2**30), 2**24 + 1]
totals = st.lists(
    st.integers(LEAST, MOST) | st.integers(-5000, 5000) | st.sampled_from(ENDS),
    min_size=16,
    max_size=16,
)
mantissas = st.integers(2**23, 2**24 - 1) | st.sampled_from([2**23, 3 * 2**22, 2**24 - 1])
scales = st.builds(
    lambda m, e, sign: sign * m * 2.0**e,
    mantissas,
    st.integers(-55, 6),  # from the least that is not lost to the greatest shift to the left
    st.sampled_from([1.0, -1.0]),
)


@jax.jit
def _both(total, scale):
    multiplier, shift = fixed_point(scale)
    return rescaled(total, scale), rescaled(total, multiplier, shift), multiplier, shift


@given(totals, st.lists(scales, min_size=16, max_size=16))
def test_is_the_equation(total, scale):
    total, scale = np.array(total, np.int32), np.array(scale, np.float32)
    by_float, by_integers, multiplier, shift = map(np.asarray, _both(total, scale))
    np.testing.assert_array_equal(by_float, np.round(total.astype(np.float32) * scale))
    assert by_integers.dtype == np.int32
    np.testing.assert_array_equal(by_integers, ref.rescaled(total, scale, "fixed_point"))
    # nothing of a scale is lost
    np.testing.assert_array_equal(multiplier * 2.0 ** (-31.0 - shift), scale.astype(np.float64))
    assert (np.abs(multiplier.astype(np.int64)) >= 2**30).all()
    # two roundings: at most one unit off, where nothing saturates
    exact = total.astype(np.float64) * scale
    held = np.abs(total.astype(np.float64)) * 2.0 ** np.maximum(-shift, 0) < 2**31
    assert (np.abs(by_integers - exact)[held] <= 1.0).all()


@given(totals, totals)
def test_any_multiplier(total, multiplier):
    total = np.array(total, np.int32)
    multiplier = np.maximum(np.array(multiplier, np.int64), LEAST + 1).astype(np.int32)
    for shift in (0, 1, 30, 31, -1, -31):
        shifts = np.full(16, shift, np.int32)
        expected = [
            ref.multiply_by(int(t), int(m), shift) for t, m in zip(total, multiplier, strict=True)
        ]
        np.testing.assert_array_equal(_rescaled(total, multiplier, shifts), expected)


_rescaled = jax.jit(rescaled)


def test_halves():
    # in float to even; else first upwards and then away from zero
    total = jnp.arange(-5, 6, dtype=jnp.int32)
    assert rescaled(total, jnp.float32(0.5)).tolist() == [-2, -2, -2, -1, 0, 0, 0, 1, 2, 2, 2]
    shifted = rescaled(total, *fixed_point(jnp.float32(0.25)))
    assert shifted.tolist() == [-1, -1, -1, -1, 0, 0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("scale", [0.0, 2.0**-33, -(2.0**-33), 1e-38])
def test_what_moves_no_sum_is_zero(scale):
    assert [int(x) for x in fixed_point(jnp.float32(scale))] == [0, 0]
    assert rescaled(jnp.int32(MOST), *fixed_point(jnp.float32(scale))) == 0


def test_beyond_32_bits_saturates():
    total = jnp.array([1, -1, 2**20, -(2**20), 0], jnp.int32)
    for scale in (2.0**31, 3e38):
        found = rescaled(total, *fixed_point(jnp.float32(scale)))
        assert (jnp.abs(found[:4].astype(jnp.float32)) >= 2.0**30 - 2).all()
        assert (jnp.sign(found) == jnp.sign(total)).all()
