"""One row in one loop: sums stay exact where they are many, large or uneven."""

import functools

import jax
import numpy as np
import pytest

from jaxquant import PerChannel, PerGroup, QSpec, dequantize, quantize
from jaxquant.ops import dot_general
from tests.arrays import normal
from tests.compiled import optimised
from tests.ops.cases import (
    EXACT,
    LIMBS,
    MATRIX,
    assert_near,
    matmul,
    quantized,
    rounded,
)

pytestmark = pytest.mark.usefixtures("fused_sums")


def served(x, qs, specs):
    """For each spec the rounded rows and the products with each weight; and what weights hold."""
    ours = {
        spec: (
            rounded(x, spec, (1,)),
            {name: dot_general(x, q, MATRIX, activations=spec) for name, q in qs.items()},
        )
        for spec in specs
    }
    return list(ours.values()), {name: dequantize(q) for name, q in qs.items()}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("int8", 2304), ("uint8", 2304), ("uint4", 2304), ("float4_e2m1fn", 2304),
        ("int8", 40960), ("int8", 65536), ("uint8", 40960),
        ("uint4", 16384), ("uint4", 8192), ("float4_e2m1fn", 16384), ("int4", 16384),
    ],
)  # fmt: skip
def test_the_largest_sums_do_not_overflow(name, size):
    w, x = np.ones((size, 2), np.float32), np.ones((1, size), np.float32)
    w[0] = 0.0
    symmetric = not name.startswith("u")
    q = quantized(w, QSpec(name, PerChannel(1), symmetric=symmetric), storage_last_axes=(0,))
    specs = (None, QSpec("int8")), (QSpec("int8", symmetric=False),)
    for these in specs if size == 2304 else [specs[0] + specs[1]]:
        lowered = optimised(functools.partial(served, specs=these)).lower(x, {name: q})
        if these == specs[0]:  # the longest sums of this form
            assert "dot_general" not in lowered.as_text()
        ours, values = lowered.compile()(x, {name: q})
        for (fx, ys), spec in zip(ours, these, strict=True):
            expected = matmul(fx, values[name])
            np.testing.assert_allclose(ys[name], expected, rtol=1e-4, err_msg=str(spec))


@pytest.mark.parametrize("size", [16, 32, 96, 100, 256, 384, 576, 1056])
@pytest.mark.parametrize("group", [None, 32, 64])
def test_uneven_sizes_equal_numpy(size, group):
    by = PerChannel(1) if group is None else PerGroup(group, 0)
    formats = ("int8", "uint8", "int4", "uint4", "float4_e2m1fn")
    specs = [QSpec(name, by, symmetric=not name.startswith("u")) for name in formats]
    w, x, activations = normal(0, size, 6), normal(1, 1, size), {None: LIMBS, QSpec("int8"): EXACT}
    make = jax.jit(lambda w: [quantize(w, spec, storage_last_axes=(0,)) for spec in specs])
    qs = dict(zip(formats, make(w), strict=True))
    ours, values = jax.jit(functools.partial(served, specs=activations))(x, qs)
    for (fx, ys), (spec, bound) in zip(ours, activations.items(), strict=True):
        for name, y in ys.items():
            w = values[name]
            assert_near(y, x, w, matmul(fx, w), bound, (name, spec))


def test_rows_that_are_not_finite():
    q = quantized(normal(0, 64, 4), QSpec("int8", PerChannel(1)), storage_last_axes=(0,))
    specs = (None, QSpec("int8"))
    call = jax.jit(lambda x, q: [dot_general(x, q, MATRIX, activations=spec) for spec in specs])
    for bad in (np.inf, np.nan):
        x = np.ones((1, 64), np.float32)
        x[0, 3] = bad
        for y, spec in zip(call(x, q), specs, strict=True):
            assert np.isnan(y).all(), (bad, spec)
