import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant import PerChannel, PerGroup, PerTensor, QSpec, quantize
from jaxquant.ops import dot_general, fake, lowering
from jaxquant.qtensor import Use, dequantize, with_use
from tests.ops.cases import (
    ACTIVATIONS,
    EXACT,
    LIMBS,
    MATRIX,
    WEIGHTS,
    K,
    N,
    assert_near,
    jit,
    normal,
    rounded,
    weights,
)


def reference(x, q, numbers=MATRIX, spec=None, preferred=None):
    x = rounded(x, spec, numbers[0][0])
    return lax.dot_general(x, dequantize(q), numbers, preferred_element_type=preferred)


# Every spec against a weight of each kind, and the common ones against every weight.
COMMON = ("float", "int8 row", "uint8 asymmetric")
ALL = ("int8 channel", "int4 group", "uint8 asymmetric group", "float8", "nf4")


@pytest.mark.parametrize("name", WEIGHTS)
def test_equals_the_dequantized_contraction(name):
    x = normal(1, 7, K)
    q = weights(name, minor=(0,) if len(name) % 2 else ())

    @jit
    def every(x, q):
        specs = {a: ACTIVATIONS[a][0] for a in (ACTIVATIONS if name in ALL else COMMON)}
        return {
            a: (dot_general(x, q, MATRIX, activations=spec), reference(x, q, spec=spec))
            for a, spec in specs.items()
        }

    for a, (y, expected) in every(x, q).items():
        assert_near(y, x, dequantize(q), expected, ACTIVATIONS[a][1])


SIDES = {
    # x shape, x numbers, q shape, granularity
    "transposed": ((7, K), (1,), (), (N, K), (1,), ()),
    "first axis": ((K, 7), (0,), (), (K, N), (0,), ()),
    "rank 3": ((2, 3, K), (2,), (), (K, N), (0,), ()),
    "two axes": ((5, 6, 8), (1, 2), (), (6, 8, N), (0, 1), ()),
    "two axes swapped": ((5, 6, 8), (2, 1), (), (8, N, 6), (0, 2), ()),
    "heads out": ((7, K), (1,), (), (K, 4, 5), (0,), ()),
    "batch": ((3, 7, K), (2,), (0,), (3, K, N), (1,), (0,)),
    "batch inside": ((7, 3, K), (2,), (1,), (K, 3, N), (0,), (1,)),
    "two batches": ((3, 2, 7, K), (3,), (1, 0), (2, K, 3, N), (1,), (0, 2)),
    "no free axis": ((K,), (0,), (), (K,), (0,), ()),
    "vector": ((K,), (0,), (), (K, N), (0,), ()),
}
GRANULARITIES = {"channel": PerChannel(), "tensor": PerTensor(), "group": PerGroup(16)}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_either_side_any_axes(side, granularity):
    x_shape, xc, xb, w_shape, wc, wb = SIDES[side]
    x, w = normal(1, *x_shape), normal(2, *w_shape)
    fmt, minor = ("int4", wc) if granularity == "group" else ("int8", ())
    q = quantize(w, QSpec(fmt, GRANULARITIES[granularity]).at(wc, w.ndim), minor=minor)
    right, left = ((xc, wc), (xb, wb)), ((wc, xc), (wb, xb))

    @jit
    def both(x, q):
        out = []
        for spec, bound in ((QSpec("int8", symmetric=False), EXACT), (None, LIMBS)):
            fx, fq = rounded(x, spec, xc), dequantize(q)
            y = dot_general(x, q, right, activations=spec)
            out.append((y, lax.dot_general(fx, fq, right), bound))
            y = dot_general(q, x, left, activations=spec)
            out.append((y, lax.dot_general(fq, fx, left), bound))
        return out

    reach = float(jnp.abs(x).max() * jnp.abs(w).max()) * K
    for y, expected, bound in both(x, q):
        assert y.shape == expected.shape
        np.testing.assert_allclose(y, expected, rtol=0, atol=float(bound) * reach)


@pytest.mark.parametrize("rows", [1, 600])
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("int8 channel", "batch"),
        ("uint8 asymmetric group", "batch"),
        ("uint8 asymmetric group", "loop"),
        ("uint8 asymmetric group", "float"),
        ("int4 group", "loop"),
    ],
)
def test_every_form_of_few_and_many_rows(monkeypatch, request, rows, form, name):
    jax.clear_caches()  # contractions are jitted by their operands: what is patched is not one
    request.addfinalizer(jax.clear_caches)
    monkeypatch.setattr(lowering, "group_form", lambda *sizes: form)
    q, x = weights(name), normal(1, rows, K)
    for spec in (None, QSpec("uint8", symmetric=False)):
        y = jit(lambda x, q, s=spec: dot_general(x, q, MATRIX, activations=s))(x, q)
        bound = EXACT if spec is not None else LIMBS
        assert_near(y, x, dequantize(q), reference(x, q, spec=spec), bound)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_integers_are_those_of_numpy(asymmetric):
    """int64 sums of codes computed apart from the library, zero points by definition."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, K)).astype(np.float32)
    w = rng.normal(size=(K, N)).astype(np.float32) + asymmetric

    def codes(a, axis):
        low = np.minimum(a.min(axis, keepdims=True), 0) if asymmetric else None
        high = np.maximum(a.max(axis, keepdims=True), 0)
        if asymmetric:
            scale = (high / np.float32(255) - low / np.float32(255)).astype(np.float32)
            zero = np.clip(-128 - np.round(low / scale), -128, 127)
        else:
            scale = (np.abs(a).max(axis, keepdims=True) / np.float32(127)).astype(np.float32)
            zero = np.zeros_like(scale)
        return np.clip(np.round(a / scale + zero), -128, 127).astype(np.int64), scale, zero

    qx, sx, zx = codes(x, 1)
    qw, sw, zw = codes(w, 0)
    sums = (qx - zx.astype(np.int64)) @ (qw - zw.astype(np.int64))
    expected = sums * sx.astype(np.float64) * sw.astype(np.float64)
    spec = QSpec("int8", symmetric=not asymmetric, range="qmax")
    q = quantize(jnp.asarray(w), QSpec("int8", PerChannel(1), not asymmetric, range="qmax"))
    y = jit(lambda x, q: dot_general(x, q, MATRIX, activations=spec))(x, q)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_the_scale_of_a_contracted_axis_goes_to_the_activation():
    """Tied weights: the table is scaled for each row, and rows are summed over."""
    q, x = quantize(normal(0, K, N), QSpec("int8", PerChannel(0))), normal(1, 7, K)
    for spec in (QSpec("int8"), None):
        y = jit(lambda x, q, s=spec: dot_general(x, q, MATRIX, activations=s))(x, q)
        moved = x * q.scale.reshape(1, K)
        expected = rounded(moved, spec, (1,)) @ q.codes.astype(jnp.float32)
        assert_near(y, moved, q.codes, expected, EXACT if spec else LIMBS)


@pytest.mark.parametrize("x_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("preferred", [None, "float32", "bfloat16"])
def test_dtypes_are_those_of_lax(x_dtype, preferred):
    q = quantize(normal(0, K, N, dtype=jnp.bfloat16), QSpec("int8", PerChannel(1)))
    x = normal(1, 5, K, dtype=x_dtype)
    for spec in (None, QSpec("int8")):
        call = functools.partial(dot_general, preferred_element_type=preferred, activations=spec)
        y = jit(lambda x, q, c=call: c(x, q, MATRIX))(x, q)
        expected = reference(x, q, spec=spec, preferred=preferred)
        assert_near(y, x, dequantize(q), expected, 2.0**-6)


def test_float16_does_not_overflow_inside():
    q = quantize(jnp.full((K, N), 1e-3, jnp.float16), QSpec("int8", PerChannel(1)))
    x = jnp.full((3, K), 1e3, jnp.float16)
    for spec in (None, QSpec("int8")):
        y = jit(lambda x, q, s=spec: dot_general(x, q, MATRIX, activations=s))(x, q)
        np.testing.assert_allclose(y, 48.0, rtol=0.01)


@pytest.mark.parametrize(
    "name", ["int4", "uint4", pytest.param("float4_e2m1fn", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "minor", [(0,), pytest.param((1,), marks=pytest.mark.slow)], ids=["", "packed along the result"]
)
def test_packed_codes_are_contracted_as_they_lie(name, minor):
    """As a CPU does: two products of half the terms, no codes put in order."""
    x, w = normal(1, 5, 192), normal(0, 192, 16)
    for granularity in (PerChannel(1), PerGroup(64, 0)):
        symmetric = name != "uint4"
        q = quantize(w, QSpec(name, granularity, symmetric=symmetric), minor=minor)
        for rows in (x, x[:1]):

            @jit
            def every(x, q):
                return [
                    (dot_general(x, q, MATRIX, activations=s), reference(x, q, spec=s), bound)
                    for s, bound in (
                        (QSpec("int8"), EXACT),
                        (QSpec("uint8", symmetric=False), EXACT),
                        (None, LIMBS),
                    )
                ]

            for y, expected, bound in every(rows, q):
                assert_near(y, rows, dequantize(q), expected, bound)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("spec", [None, QSpec("int8"), QSpec("uint8", symmetric=False)])
def test_what_is_not_finite_comes_through(bad, spec):
    x = normal(1, 4, K).at[1, 3].set(bad).at[2].set(0.0).at[3].set(1e-42)
    q = weights("int8 channel")
    y = jit(lambda x, q: dot_general(x, q, MATRIX, activations=spec))(x, q)
    assert not np.isfinite(y[1]).any()
    assert np.isfinite(np.asarray(y)[[0, 2, 3]]).all()
    np.testing.assert_array_equal(y[2], 0.0)


@pytest.mark.parametrize(
    "shapes", [((0, K), (K, N)), ((4, 0), (0, N)), ((4, K), (K, 0)), ((4, 1), (1, 1))]
)
def test_empty_and_single_axes(shapes):
    x, w = normal(1, *shapes[0]), normal(2, *shapes[1])
    for weight in (QSpec("int8", PerChannel(1)), QSpec("int4", PerGroup(16, 0))):
        for spec in (None, QSpec("int8")):
            q = quantize(w, weight)
            y = jit(lambda x, q, s=spec: dot_general(x, q, MATRIX, activations=s))(x, q)
            np.testing.assert_allclose(y, reference(x, q, spec=spec), rtol=1e-4, atol=1e-6)


def test_the_recipe_s_activations_are_the_default():
    spec, x = QSpec("int4"), normal(1, 4, K)
    q = with_use(weights("int8 channel"), Use(activations=spec))
    np.testing.assert_array_equal(
        dot_general(x, q, MATRIX), dot_general(x, q, MATRIX, activations=spec)
    )
    assert (
        jnp.abs(dot_general(x, q, MATRIX) - dot_general(x, q, MATRIX, activations=None)).max() > 0
    )


def test_two_qtensors():
    a, b = weights("int8 channel", shape=(7, K)), weights("int4 group")
    y = dot_general(a, b, MATRIX, activations=None)
    assert_near(y, dequantize(a), dequantize(b), dequantize(a) @ dequantize(b), LIMBS)


def test_jit_vmap_and_loop_agree():
    q = quantize(normal(0, 3, K, N), QSpec("int4", PerGroup(16, 0)), batch_axes=1)
    x = normal(1, 3, 5, K)
    for spec in (None, QSpec("int8")):
        call = functools.partial(dot_general, dimension_numbers=MATRIX, activations=spec)

        @jit
        def ways(x, q, call=call):
            one = jax.tree.map(lambda a: a[0], q)
            return (
                jnp.stack([call(x[i], jax.tree.map(lambda a, i=i: a[i], q)) for i in range(3)]),
                jax.vmap(call)(x, q),
                jax.lax.scan(lambda c, xq: (c, call(*xq)), 0, (x, q))[1],
                call(x, q, dimension_numbers=(((2,), (1,)), ((0,), (0,)))),
                jax.vmap(call, in_axes=(0, None))(x, one)[:1],
            )

        loop, *others = ways(x, q)
        for other in others:
            np.testing.assert_allclose(loop[: len(other)], other, rtol=1e-5, atol=1e-5)


def test_a_fake_quantized_activation_is_what_the_contraction_sees():
    x = normal(1, 4, K)
    np.testing.assert_allclose(fake(x, QSpec("int8"), (1,)), x, atol=float(jnp.abs(x).max()) / 250)
