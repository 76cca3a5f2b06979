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


ROWS = [1, 8, 40]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_a_quantized_program_is_that_of_32_bits(recipe):
    rng = np.random.default_rng(1)
    w = rng.normal(size=(64, 16)).astype(np.float32)
    xs = [rng.normal(size=(rows, 64)).astype(np.float32) for rows in ROWS]
    params, xs, negative = jax.device_put(
        ({"first": np.tile(w, 4), "second": w}, xs, [-x for x in xs])
    )

    def fn(params, x):
        return jnp.tanh(x @ params["first"]) @ params["second"]

    def made(x, negative):
        if recipe in CALIBRATED:
            return jq.ptq(fn, params, recipe, batches=[x, negative], progress=False)[0]
        return jq.ptq(fn, params, recipe, x)[0]

    def results():
        qs = [made(*pair) for pair in zip(xs, negative, strict=True)]
        served = lambda qs, xs: [jq.quantized(fn)(q, x) for q, x in zip(qs, xs, strict=True)]
        return jax.jit(served)(qs, xs)

    ys = results()
    with jax.enable_x64(False):
        expected = results()
    for rows, y, want in zip(ROWS, ys, expected, strict=True):
        assert y.dtype == jnp.float32 and y.shape == (rows, 16)
        most = 1e-5 * np.abs(want).max()
        np.testing.assert_allclose(y, want, rtol=0, atol=most, err_msg=f"{rows} rows")


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
    w = jax.device_put(w)
    q = jq.quantize(w, spec)
    with jax.enable_x64(False):
        narrow = jq.quantize(w, spec)
    assert jq.dequantize(q).dtype == jnp.float32
    for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(narrow), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
