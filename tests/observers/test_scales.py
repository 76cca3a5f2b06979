"""From ranges to scales: what `quantize` itself would choose for the same data."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import PerChannel, PerTensor, QSpec
from jaxquant.observers import Range, minmax, range_to_scale
from tests.observers.cases import one_pass

RULES = [
    QSpec("int8"),
    QSpec("int4", range="qmax"),
    QSpec("int8", range="signed"),
    QSpec("uint8"),
    QSpec("int8", symmetric=False),
    QSpec("uint4", symmetric=False),
    QSpec("float8_e4m3fn"),
    QSpec("nf4"),
    QSpec("int8", scale_dtype="bfloat16"),
    QSpec("int8", scale_dtype="float8_e8m0fnu"),
]


@pytest.mark.parametrize("spec", RULES, ids=repr)
def test_ranges_give_the_scales_of_quantize(spec):
    x = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    x *= np.array([1.0, 1e-30, 1e30, -2.0, 0.0, 1e-42], np.float32)
    x[:, 3] = -np.abs(x[:, 3])
    spec = QSpec(spec.format, PerChannel(1), spec.symmetric, spec.range, spec.scale_dtype)
    q = jq.quantize(x, spec)
    observer = minmax(axis=-1)
    range = observer.finish(one_pass(observer, x[None]), spec)
    scale, zero = range_to_scale(range, spec)
    assert scale.shape == (6,) and scale.dtype == jnp.float32
    stored = np.asarray(q.scale, np.float32).reshape(-1)
    if spec.format.is_codebook:
        stored = np.where(
            stored == 0, 1, stored
        )  # a channel of zeros has no magnitude, and needs none
    np.testing.assert_array_equal(np.asarray(scale), stored)
    if spec.symmetric:
        assert zero is None
    else:
        assert zero.dtype == jnp.int32
        np.testing.assert_array_equal(np.asarray(zero), np.asarray(q.zero_point).reshape(-1))


def test_a_global_scale_is_part_of_the_scale():
    spec = QSpec("float4_e2m1fn", PerTensor(), scale_dtype="float8_e4m3fn", global_scale=True)
    scale, zero = range_to_scale(Range(jnp.float32(-3.0), jnp.float32(1.0)), spec)
    q = jq.quantize(jnp.array([-3.0, 1.0]), spec)
    assert zero is None
    assert float(scale) == float(q.scale.astype(jnp.float32).reshape(()) * q.global_scale)
