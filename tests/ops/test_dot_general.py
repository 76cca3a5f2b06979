import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant import PerChannel, PerGroup, PerTensor, QSpec
from jaxquant.ops import dot_general, fake, lowering
from jaxquant.qtensor import ContractionConfig, dequantize, with_contraction
from tests.arrays import normal
from tests.ops.cases import (
    ACTIVATIONS,
    EXACT,
    LIMBS,
    MATRIX,
    WEIGHTS,
    K,
    N,
    assert_near,
    matmul,
    quantized,
    rounded,
    weights,
)


def products(specs):
    """For each spec the contraction and the rounded rows; and the dequantized weight."""

    def call(x, q):
        ours = [dot_general(x, q, MATRIX, activations=s) for s in specs]
        return ours, [rounded(x, s, (1,)) for s in specs], dequantize(q)

    return call


# Every spec against a weight of each kind, and the common ones against every weight.
COMMON = ("float", "int8 row", "uint8 asymmetric")
ALL = ("int8 channel", "int4 group", "uint8 asymmetric group", "float8", "nf4")


@pytest.mark.parametrize("name", WEIGHTS)
def test_equals_the_dequantized_contraction(name):
    x = normal(1, 7, K)
    q = weights(name, storage_last_axes=(0,) if len(name) % 2 else ())

    chosen = ACTIVATIONS if name in ALL else COMMON
    ours, rows, w = jax.jit(products([ACTIVATIONS[a][0] for a in chosen]))(x, q)
    for a, y, fx in zip(chosen, ours, rows, strict=True):
        assert_near(y, x, w, matmul(fx, w), ACTIVATIONS[a][1], a)


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


def contraction(a, b, numbers):
    """`lax.dot_general` in float64."""
    ((ac, bc), (ab, bb)), letters = numbers, iter("abcdefgh")
    at, bt = [next(letters) for _ in a.shape], [next(letters) for _ in b.shape]
    for i, j in zip((*ac, *ab), (*bc, *bb), strict=True):
        bt[j] = at[i]
    out = [at[i] for i in ab]
    out += [c for i, c in enumerate(at) if i not in (*ac, *ab)]
    out += [c for i, c in enumerate(bt) if i not in (*bc, *bb)]
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.einsum(f"{''.join(at)},{''.join(bt)}->{''.join(out)}", a, b)


@pytest.mark.parametrize("side", SIDES)
def test_either_side_any_axes(side):
    x_shape, xc, xb, w_shape, wc, wb = SIDES[side]
    x, w = normal(1, *x_shape), normal(2, *w_shape)
    right, left = ((xc, wc), (xb, wb)), ((wc, xc), (wb, xb))
    specs = ((QSpec("int8", symmetric=False), EXACT), (None, LIMBS))
    qs = {}
    for name, granularity in GRANULARITIES.items():
        fmt, storage_last_axes = ("int4", wc) if name == "group" else ("int8", ())
        qs[name] = quantized(
            w, QSpec(fmt, granularity).at(wc, w.ndim), storage_last_axes=storage_last_axes
        )

    @jax.jit
    def every(x, qs):
        def both(q, spec):
            on_the_right = dot_general(x, q, right, activations=spec)
            return on_the_right, dot_general(q, x, left, activations=spec)

        ours = {name: [both(q, spec) for spec, _ in specs] for name, q in qs.items()}
        rows = [rounded(x, spec, xc) for spec, _ in specs]
        return ours, rows, {name: dequantize(q) for name, q in qs.items()}

    ours, rows, values = every(x, qs)
    reach = float(np.abs(x).max() * np.abs(w).max()) * K
    for name, got in ours.items():
        for (y, flipped), fx, (spec, bound) in zip(got, rows, specs, strict=True):
            close = {"rtol": 0, "atol": bound * reach, "err_msg": f"{name}, {spec}"}
            for found, expected in (
                (y, contraction(fx, values[name], right)),
                (flipped, contraction(values[name], fx, left)),
            ):
                assert found.shape == expected.shape, (name, spec)
                np.testing.assert_allclose(found, expected, **close)


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
def test_every_form_of_few_and_many_rows(monkeypatch, request, form, name):
    q, x = weights(name), np.asarray(normal(1, 600, K))
    jax.clear_caches()  # contractions are jitted by their operands: what is patched is not one
    request.addfinalizer(jax.clear_caches)
    monkeypatch.setattr(lowering, "group_form", lambda *sizes: form)
    monkeypatch.setattr(lowering, "fused_wins", lambda *sizes: False)
    call = products((None, QSpec("uint8", symmetric=False)))
    many, rows, w = jax.jit(call)(x, q)
    few, row, _ = jax.jit(call)(x[:1], q)
    for at, ours, given in (("few", few, row), ("many", many, rows)):
        for y, fx, bound in zip(ours, given, (LIMBS, EXACT), strict=True):
            assert_near(y, given[0], w, matmul(fx, w), bound, (at, bound))


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
    q = quantized(w, QSpec("int8", PerChannel(1), not asymmetric, range="qmax"))
    y = jax.jit(lambda x, q: dot_general(x, q, MATRIX, activations=spec))(x, q)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_the_scale_of_a_contracted_axis_goes_to_the_activation():
    """Tied weights: the table is scaled for each row, and rows are summed over."""
    q, x = quantized(normal(0, K, N), QSpec("int8", PerChannel(0))), normal(1, 7, K)
    moved = np.asarray(x) * np.asarray(q.scale).reshape(1, K)

    @jax.jit
    def both(x, q, moved):
        specs = (QSpec("int8"), None)
        ours = [dot_general(x, q, MATRIX, activations=s) for s in specs]
        return ours, [rounded(moved, s, (1,)) for s in specs]

    for y, fx, bound in zip(*both(x, q, moved), (EXACT, LIMBS), strict=True):
        assert_near(y, moved, q.codes, matmul(fx, q.codes), bound, bound)


@pytest.mark.parametrize("x_dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_are_those_of_lax(x_dtype):
    q = quantized(normal(0, K, N, dtype=jnp.bfloat16), QSpec("int8", PerChannel(1)))
    x = normal(1, 5, K, dtype=x_dtype)
    cases = [(p, s) for p in (None, "float32", "bfloat16") for s in (None, QSpec("int8"))]

    @jax.jit
    def both(x, q):
        ours, theirs, w = [], [], dequantize(q)
        for preferred, spec in cases:
            rest = {"dimension_numbers": MATRIX, "preferred_element_type": preferred}
            ours.append(dot_general(x, q, **rest, activations=spec))
            theirs.append(lax.dot_general(rounded(x, spec, (1,)), w, **rest))
        return ours, theirs, w

    ours, theirs, w = both(x, q)
    for case, y, expected in zip(cases, ours, theirs, strict=True):
        assert_near(y, x, w, expected, 2.0**-6, case)


def test_float16_does_not_overflow_inside():
    q = quantized(np.full((K, N), 1e-3, np.float16), QSpec("int8", PerChannel(1)))
    x = np.full((3, K), 1e3, np.float16)
    for y in jax.jit(products((None, QSpec("int8"))))(x, q)[0]:
        assert y.dtype == jnp.float16
        np.testing.assert_allclose(y, 48.0, rtol=0.01)


@pytest.mark.parametrize(
    "name", ["int4", "uint4", pytest.param("float4_e2m1fn", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "storage_last_axes",
    [(0,), pytest.param((1,), marks=pytest.mark.slow)],
    ids=["", "packed along the result"],
)
def test_packed_codes_are_contracted_as_they_lie(name, storage_last_axes):
    """As a CPU does: two products of half the terms, no codes put in order."""
    x, w = normal(1, 5, 192), normal(0, 192, 16)
    for granularity in (PerChannel(1), PerGroup(64, 0)):
        symmetric = name != "uint4"
        q = quantized(
            w, QSpec(name, granularity, symmetric=symmetric), storage_last_axes=storage_last_axes
        )
        specs = {QSpec("int8"): EXACT, QSpec("uint8", symmetric=False): EXACT, None: LIMBS}
        for rows in (np.asarray(x), np.asarray(x)[:1]):
            ours, rounded_rows, values = jax.jit(products(specs))(rows, q)
            for y, fx, (spec, bound) in zip(ours, rounded_rows, specs.items(), strict=True):
                case = (granularity, len(rows), spec)
                assert_near(y, rows, values, matmul(fx, values), bound, case)


@pytest.mark.parametrize("spec", [None, QSpec("int8"), QSpec("uint8", symmetric=False)])
def test_what_is_not_finite_comes_through(spec):
    q, call = (
        weights("int8 channel"),
        jax.jit(lambda x, q: dot_general(x, q, MATRIX, activations=spec)),
    )
    for bad in (np.nan, np.inf, -np.inf):
        x = np.array(normal(1, 4, K))
        x[1, 3], x[2], x[3] = bad, 0.0, 1e-42
        y = np.asarray(call(x, q))
        assert not np.isfinite(y[1]).any(), bad
        assert np.isfinite(y[[0, 2, 3]]).all(), bad
        np.testing.assert_array_equal(y[2], 0.0)


@pytest.mark.parametrize(
    "shapes", [((0, K), (K, N)), ((4, 0), (0, N)), ((4, K), (K, 0)), ((4, 1), (1, 1))]
)
def test_empty_and_single_axes(shapes):
    x, w = normal(1, *shapes[0]), normal(2, *shapes[1])
    for weight in (QSpec("int8", PerChannel(1)), QSpec("int4", PerGroup(16, 0))):
        q = quantized(w, weight)
        ours, rows, values = jax.jit(products((None, QSpec("int8"))))(x, q)
        for y, fx in zip(ours, rows, strict=True):
            assert y.shape == (len(x), w.shape[1])
            np.testing.assert_allclose(y, matmul(fx, values), rtol=1e-4, atol=1e-6)


def test_the_recipe_s_activations_are_the_default():
    spec, x = QSpec("int4"), normal(1, 4, K)
    q = with_contraction(weights("int8 channel"), ContractionConfig(activations=spec))
    by_default = np.asarray(dot_general(x, q, MATRIX))
    np.testing.assert_array_equal(by_default, dot_general(x, q, MATRIX, activations=spec))
    assert np.abs(by_default - dot_general(x, q, MATRIX, activations=None)).max() > 0


def test_two_qtensors():
    a, b = weights("int8 channel", shape=(7, K)), weights("int4 group")
    y = dot_general(a, b, MATRIX, activations=None)
    x, w = dequantize(a), dequantize(b)
    assert_near(y, x, w, matmul(x, w), LIMBS)


def test_jit_vmap_and_loop_agree():
    q = quantized(normal(0, 3, K, N), QSpec("int4", PerGroup(16, 0)), batch_axes=1)
    x = normal(1, 3, 5, K)
    for spec in (None, QSpec("int8")):
        call = functools.partial(dot_general, dimension_numbers=MATRIX, activations=spec)

        @jax.jit
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
    np.testing.assert_allclose(fake(x, QSpec("int8"), (1,)), x, atol=np.abs(x).max() / 250)
