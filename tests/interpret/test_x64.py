"""With 64-bit types allowed, models of 32-bit floats stay what they are."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq

CALIBRATED = [jq.w8a8_static(), jq.w8a8_integer()]
RECIPES = [
    jq.w8a8(),
    jq.w8a16(),
    jq.w4a8(group=16),
    jq.w4a16(group=16),
    jq.nf4(group=16),
    *CALIBRATED,
]


@pytest.fixture(autouse=True)
def _wide() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_a_quantized_program_is_that_of_32_bits(recipe, rows):
    x, w = (
        jnp.asarray(np.random.default_rng(n).normal(size=shape), jnp.float32)
        for n, shape in enumerate([(rows, 64), (64, 16)])
    )

    def fn(params, x):
        return jnp.tanh(x @ params["first"]) @ params["second"]

    params = {"first": jnp.tile(w, 4), "second": w}
    given = {"batches": [x, -x], "progress": False} if recipe in CALIBRATED else {}

    def result():
        qparams, _ = jq.ptq(fn, params, recipe, *(() if given else (x,)), **given)
        return jax.jit(jq.quantized(fn))(qparams, x)

    y = result()
    with jax.enable_x64(False):
        expected = result()
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "spec",
    [
        jq.QSpec("int8", jq.PerChannel(1)),
        jq.QSpec("uint8", jq.PerGroup(16, 0), symmetric=False),
        jq.QSpec("int4", jq.PerGroup(16, 0), range="signed"),
        jq.QSpec("float8_e4m3fn", jq.PerChannel(1)),
        jq.QSpec("mxfp4").at((0,), 2),
        jq.QSpec("nf4", jq.PerGroup(16, 0), double=True),
    ],
    ids=str,
)
def test_codes_are_those_of_32_bits(spec):
    w = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    q = jq.quantize(jnp.asarray(w), spec)
    with jax.enable_x64(False):
        narrow = jq.quantize(jnp.asarray(w), spec)
    assert jq.dequantize(q).dtype == jnp.float32
    for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(narrow), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
