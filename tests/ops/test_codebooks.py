"""Weights of learned codebooks and of other formats that no integer product is made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import PerChannel, PerGroup, QSpec, dequantize, kmeans, palette
from jaxquant.ops import dot_general
from tests.arrays import normal
from tests.ops.cases import (
    LIMBS,
    matmul,
    quantized,
)

OVER = (((1,), (0,)), ((), ()))


@functools.cache
def learned(bits, channels=None):
    """A weight `[512, 128]` of a learned codebook, and its values."""
    spec = palette(bits, channels=channels).at((0,), 2)
    make = jax.jit(lambda w: kmeans()(w, spec, storage_last_axes=(0,))[0])
    q = make(normal(0, 512, 128))
    return q, np.asarray(dequantize(q))


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("channels", [None, 32])
@pytest.mark.parametrize("rows", [1, 5])
def test_learned_codebooks(bits, channels, rows):
    q, values = learned(bits, channels)
    x = normal(1, rows, 512)
    got = jax.jit(lambda x, q: dot_general(x, q, OVER))(x, q)
    np.testing.assert_allclose(got, matmul(x, values), rtol=2e-4, atol=2e-4)


def test_bfloat16_and_a_codebook_on_the_left():
    q, values = learned(4)
    x = normal(1, 3, 512)
    flipped = (((0,), (1,)), ((), ()))
    got = dot_general(q, x, flipped)
    np.testing.assert_allclose(got, matmul(x, values).T, rtol=2e-4, atol=2e-4)
    rows = np.asarray(x).astype(jnp.bfloat16)
    half = dot_general(rows, q, OVER, preferred_element_type=jnp.float32)
    exact = matmul(rows, values)
    assert np.abs(half - exact).max() < 0.01 * np.abs(exact).max()


@pytest.mark.parametrize("name", ["nf4", "int4", "int3", "uint2"])
@pytest.mark.parametrize("storage_last_axes", [(0,), (1,)], ids=["", "packed along the result"])
@pytest.mark.parametrize("granularity", [PerChannel(1), PerChannel(0), PerGroup(128, 0)], ids=str)
def test_formats(name, storage_last_axes, granularity):
    w, x = normal(0, 640, 128), normal(1, 3, 640)
    q = quantized(
        w, QSpec(name, granularity, symmetric=name != "uint2"), storage_last_axes=storage_last_axes
    )
    call = jax.jit(lambda x, q: (dot_general(x, q, OVER, activations=None), dequantize(q)))
    got, values = map(np.asarray, call(x, q))
    reach = float(np.abs(x).max() * np.abs(values).sum(0).max())
    np.testing.assert_allclose(got, matmul(x, values), rtol=0, atol=LIMBS * reach)
