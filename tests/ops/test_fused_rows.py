"""One row in one loop: sums stay exact where they are many, large or uneven."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import PerChannel, PerGroup, QSpec, dequantize, quantize
from jaxquant.ops import dot_general
from tests.ops.cases import EXACT, LIMBS, MATRIX, assert_near, jit, normal, rounded

pytestmark = pytest.mark.usefixtures("fused_sums")


def served(x, q, spec):
    return jit(lambda x, q: dot_general(x, q, MATRIX, activations=spec))(x, q)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("int8", 2304), ("uint8", 2304), ("uint4", 2304), ("float4_e2m1fn", 2304),
        ("int8", 40960), ("int8", 65536), ("uint8", 40960),
        ("uint4", 16384), ("uint4", 8192), ("float4_e2m1fn", 16384), ("int4", 16384),
    ],
)  # fmt: skip
def test_the_largest_sums_do_not_overflow(name, size):
    w, x = jnp.ones((size, 2)).at[0].set(0.0), jnp.ones((1, size))
    symmetric = not name.startswith("u")
    q = quantize(w, QSpec(name, PerChannel(1), symmetric=symmetric), minor=(0,))
    for spec in (None, QSpec("int8"), QSpec("int8", symmetric=False)):
        y = served(x, q, spec)
        if size == 2304 and (spec is None or spec.symmetric):  # the longest sums of this form
            text = jax.jit(lambda x, q, s=spec: dot_general(x, q, MATRIX, activations=s))
            text = text.lower(x, q).as_text()
            assert "dot_general" not in text
        np.testing.assert_allclose(y, rounded(x, spec, (1,)) @ dequantize(q), rtol=1e-4)


@pytest.mark.parametrize("size", [16, 32, 96, 100, 256, 384, 576, 1056])
@pytest.mark.parametrize("name", ["int8", "uint8", "int4", "uint4", "float4_e2m1fn"])
@pytest.mark.parametrize("group", [None, 32, 64])
def test_uneven_sizes_equal_numpy(size, name, group):
    by = PerChannel(1) if group is None else PerGroup(group, 0)
    symmetric = not name.startswith("u")
    w, x = normal(0, size, 6), normal(1, 1, size)
    q = quantize(w, QSpec(name, by, symmetric=symmetric), minor=(0,))
    for spec, bound in ((None, LIMBS), (QSpec("int8"), EXACT)):
        expected = rounded(x, spec, (1,)) @ dequantize(q)
        assert_near(served(x, q, spec), x, dequantize(q), expected, bound)


def test_rows_that_are_not_finite():
    q = quantize(normal(0, 64, 4), QSpec("int8", PerChannel(1)), minor=(0,))
    for bad in (np.inf, np.nan):
        x = jnp.ones((1, 64)).at[0, 3].set(bad)
        for spec in (None, QSpec("int8")):
            assert bool(jnp.isnan(served(x, q, spec)).all())
