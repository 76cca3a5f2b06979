"""Codebooks looked up in tiles: the same product, and never all values as floats."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant import PerChannel, PerGroup, QSpec, dequantize, kmeans, palette, quantize
from jaxquant.ops import dot_general
from tests.ops.cases import LIMBS, normal

OVER = (((1,), (0,)), ((), ()))


pytestmark = pytest.mark.usefixtures("fused_sums")


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("channels", [None, 256])
@pytest.mark.parametrize("rows", [1, 5])
def test_tiles_equal_the_whole_and_hold_no_float_of_its_size(bits, channels, rows):
    shape = (512, 1024)
    spec = palette(bits, channels=channels).at((0,), 2)
    q, _ = kmeans("linear", iterations=2)(normal(0, *shape), spec, minor=(0,))
    x = normal(1, rows, 512)

    def fn(x, q):
        return dot_general(x, q, OVER)

    compiled = jax.jit(fn).lower(x, q).compile()
    found = re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    sizes = {int(np.prod([int(n) for n in shape.split(",")])) for shape in found}
    assert max(sizes) <= shape[0] * shape[1] // 2
    expected = lax.dot_general(x, dequantize(q), OVER, precision="highest")
    np.testing.assert_allclose(compiled(x, q), expected, rtol=2e-4, atol=2e-4)


def test_bfloat16_and_a_codebook_on_the_left():
    q, _ = kmeans("linear", iterations=2)(normal(0, 512, 1024), palette(4), minor=(0,))
    x = normal(1, 3, 512)
    flipped = (((0,), (1,)), ((), ()))
    got = dot_general(q, x, flipped)
    np.testing.assert_allclose(got, (x @ dequantize(q)).T, rtol=2e-4, atol=2e-4)
    half = dot_general(x.astype(jnp.bfloat16), q, OVER, preferred_element_type=jnp.float32)
    exact = x.astype(jnp.bfloat16).astype(jnp.float32) @ dequantize(q)
    assert float(jnp.abs(half - exact).max()) < 0.01 * float(jnp.abs(exact).max())


@pytest.mark.parametrize("name", ["nf4", "int4", "int3", "uint2"])
@pytest.mark.parametrize("minor", [(0,), (1,)], ids=["", "packed along the result"])
@pytest.mark.parametrize("granularity", [PerChannel(1), PerChannel(0), PerGroup(128, 0)], ids=str)
def test_formats_in_tiles(name, minor, granularity):
    w, x = normal(0, 640, 1024), normal(1, 3, 640)
    q = quantize(w, QSpec(name, granularity, symmetric=name != "uint2"), minor=minor)
    got = jax.jit(lambda x, q: dot_general(x, q, OVER, activations=None))(x, q)
    expected = lax.dot_general(x, dequantize(q), OVER, precision="highest")
    reach = float(jnp.abs(x).max() * jnp.abs(dequantize(q)).sum(0).max())
    np.testing.assert_allclose(got, expected, rtol=0, atol=LIMBS * reach)
