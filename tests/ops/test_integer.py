"""Activations that stay integers: what is done to sums and codes, against NumPy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import PerTensor, QSpec
from jaxquant.ops.integer.values import Accumulator, Activation, added, is_integers
from jaxquant.qtensor import Folded, QuantParams
from tests.ops import integer_reference as ref

MODES = ("float32", "fixed_point")
SPECS = {
    "int8": (QSpec("int8", PerTensor()), None),
    "int8 asymmetric": (QSpec("int8", PerTensor(), symmetric=False), 37),
    "uint8": (QSpec("uint8", PerTensor(), symmetric=False), -128),
    "int4": (QSpec("int4", PerTensor()), None),
}
UNIT = np.array([0.003, 0.0007, 0.011, 0.00002], np.float32)
STEP = np.float32(0.043)


def totals(seed, reach=40000):
    return np.random.default_rng(seed).integers(-reach, reach, (50, 4)).astype(np.int32)


def grids(name):
    """The grid as jaxquant has it, and as numbers."""
    spec, zero = SPECS[name]
    held = QuantParams(jnp.float32(STEP), None if zero is None else jnp.int32(zero), spec, name)
    return held, ref.grid(held, spec)


def sums(total, name, mode, key="w", **what):
    values = dict.fromkeys(("offset", "gain", "bias", "folded"))
    values |= {"scale": jnp.asarray(UNIT)[None], "output": grids(name)[0], "channels": (1,)}
    values |= {"key": key, "requantize": mode}
    return Accumulator(**{"total": jnp.asarray(total), "dtype": "float32", **values, **what})


def equations(total, name, mode):
    """`ref.Sums` on the same grid."""
    to = grids(name)[1]
    at = ref.Layer(np.zeros(0), np.zeros(0), to, to, mode)
    return ref.Sums(total.astype(np.int64), UNIT[None], at)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SPECS)
def test_codes_and_floats(name, mode):
    total, to = totals(1), grids(name)[1]
    acc = sums(total, name, mode)
    assert is_integers(acc)
    expected = equations(total, name, mode)
    x = acc.activation()
    assert x.codes.dtype == jnp.int8
    np.testing.assert_array_equal(x.codes, expected.codes())
    np.testing.assert_array_equal(acc.floats(), expected.floats())
    np.testing.assert_array_equal(x.floats(), to.floats(expected.codes()))
    for low, high in ((0.0, None), (0.0, 6.0), (-0.1, 0.2), (None, -1.0), (-jnp.inf, jnp.inf)):
        codes = expected.codes()
        codes = codes if low is None else np.maximum(codes, to.code(low))
        codes = codes if high is None else np.minimum(codes, to.code(high))
        np.testing.assert_array_equal(x.clamped(low, high).codes, codes)
    # far beyond the grid, where int32 has no room left
    ends = np.array([[2**31 - 1] * 4, [-(2**31)] * 4], np.int32)
    np.testing.assert_array_equal(
        sums(ends, name, mode).activation().codes, equations(ends, name, mode).codes()
    )


@pytest.mark.parametrize("mode", MODES)
def test_vectors_over_channels(mode):
    total, name = totals(2), "int8 asymmetric"
    offset = np.array([[5, -7, 100, 0]], np.int32)
    gain, bias = jnp.array([[0.5, -1.25, 3.0, 1.0]]), jnp.array([[0.2, -0.1, 0.0, 1.5]])
    acc = sums(total, name, mode, offset=jnp.asarray(offset))
    done = acc.shifted(bias, "add b").scaled(gain, "mul g").shifted(-bias, "sub b")
    at = equations(total, name, mode).layer
    unit = UNIT[None] * np.asarray(gain)
    term = np.asarray(bias) * np.asarray(gain) - np.asarray(bias)
    whole = total.astype(np.int64) + offset + np.round(term / unit).astype(np.int64)
    expected = ref.Sums(whole, unit, at)
    np.testing.assert_array_equal(done.activation().codes, expected.codes())
    np.testing.assert_array_equal(done.floats(), expected.floats())
    # what was worked out beforehand is used where the same was done, and nowhere else
    by = done.fold()
    assert by.chain == ("add b", "mul g", "sub b")
    other = Folded(by.bias + 1000, by.multiplier, by.shift, by.chain)
    again = dataclasses.replace(done, folded=other)
    shifted = dataclasses.replace(expected, total=whole + 1000)
    np.testing.assert_array_equal(again.activation().codes, shifted.codes())
    again = dataclasses.replace(done, folded=dataclasses.replace(other, chain=("add b",)))
    np.testing.assert_array_equal(again.activation().codes, expected.codes())


@pytest.mark.parametrize("mode", MODES)
def test_a_bias_alone(mode):
    """Without a gain, or with sums far below the bias, the bias is all there is."""
    total, name = totals(3), "int8 asymmetric"
    to = grids(name)[1]
    bias = jnp.array([[0.5, 0.0, -0.75, 1.0]])
    none = sums(total, name, mode).scaled(jnp.zeros((1, 4)), "mul").shifted(bias, "add")
    np.testing.assert_allclose(none.floats(), np.broadcast_to(bias, (50, 4)), rtol=1e-6)
    codes = np.broadcast_to(to.code(bias), (50, 4))
    np.testing.assert_array_equal(none.activation().codes, codes)
    tiny = sums(total, name, mode, scale=jnp.full((1, 4), 1e-14)).shifted(bias, "add")
    np.testing.assert_allclose(tiny.floats(), np.broadcast_to(bias, (50, 4)), atol=1e-9)
    np.testing.assert_array_equal(tiny.activation().codes, codes)
    assert not sums(total, name, mode).scaled(jnp.float32(0.0), "mul").floats().any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["int8 asymmetric", "uint8"])
def test_sums_of_two(name, mode):
    a, b = totals(4), totals(5)
    to = grids(name)[1]
    first, second = equations(a, name, mode), equations(b, name, mode)
    both = added(sums(a, name, mode, "a"), sums(b, name, mode, "b"))
    np.testing.assert_array_equal(both.codes, first.plus(second.fine()))
    assert both.source == ("a", "b")
    # an activation on a grid of its own, on either side
    step, codes = np.float32(0.021), np.arange(-128, 72, dtype=np.int8).reshape(50, 4)
    own = QuantParams(jnp.float32(step), jnp.int32(-9), QSpec("int8"), "x")
    x = Activation(jnp.asarray(codes), own, "float32", ("x",))
    term = ref.fine(codes.astype(np.int64) + 9, step / STEP, mode)
    for total in (added(sums(a, name, mode, "a"), x), added(x, sums(a, name, mode, "a"))):
        np.testing.assert_array_equal(total.codes, first.plus(term))
        assert (total.source, total.added, total.grid.source) == (("a",), ("x",), name)
    # sums that are requantized to another grid go through that one
    another = "uint8" if name != "uint8" else "int8 asymmetric"
    other, here = sums(b, another, mode, "b"), grids(another)[1]
    term = ref.fine(here.whole(equations(b, another, mode).codes()), STEP / STEP, mode)
    np.testing.assert_array_equal(added(sums(a, name, mode, "a"), other).codes, first.plus(term))
    assert added(x, x) is None
    assert added(sums(a, name, mode, output=None), x) is None
    # one rounding instead of three: within half a step and what 12 bits leave
    exact = (a + b.astype(np.float64)) * UNIT / STEP
    held = np.abs(exact) < 100 - abs(to.zero)
    assert (np.abs(to.whole(np.asarray(both.codes).astype(np.int64)) - exact)[held] < 0.501).all()
