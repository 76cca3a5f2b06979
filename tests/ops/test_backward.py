import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant import PerChannel, PerGroup, QSpec
from jaxquant.ops import conv_general_dilated, dot_general, dot_general_dynamic, fake, gather
from jaxquant.qtensor import dequantize
from tests.arrays import normal
from tests.ops.cases import (
    MATRIX,
    K,
    N,
    quantized,
    weights,
)


@pytest.mark.parametrize(
    "name", ["int8 channel", "int4 group", "uint8", "float8", "nf4", "int8 each"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_is_that_of_the_dequantized_contraction(name, dtype):
    q, x, g = weights(name), normal(1, 5, K, dtype=dtype), normal(2, 5, N, dtype=dtype)
    specs = (None, QSpec("int8"), QSpec("uint8", symmetric=False))
    flipped = (((0,), (1,)), ((), ()))

    @jax.jit
    def every(x, q, g):
        def pulled(product, g):
            return jax.vjp(product, x)[1](g)[0]

        def ours(x, spec):
            return dot_general(x, q, MATRIX, None, dtype, activations=spec)

        def left(x, spec):
            return dot_general(q, x, flipped, None, dtype, activations=spec)

        def theirs(x):
            return lax.dot_general(x, dequantize(q), MATRIX, preferred_element_type=dtype)

        return (
            [pulled(functools.partial(ours, spec=spec), g) for spec in specs],
            [pulled(functools.partial(left, spec=spec), g.T) for spec in specs],
            pulled(theirs, g),
        )

    *found, expected = every(x, q, g)
    tolerance = 1e-5 if dtype == "float32" else 0.05
    for spec, ours, left in zip(specs, *found, strict=True):
        assert ours.dtype == x.dtype, spec
        np.testing.assert_array_equal(ours, expected, err_msg=str(spec))
        left, near = np.asarray(left, np.float32), np.asarray(expected, np.float32)
        np.testing.assert_allclose(left, near, rtol=0, atol=tolerance, err_msg=str(spec))


@pytest.mark.parametrize(
    "spec", [QSpec("int8"), QSpec("float8_e4m3fn"), QSpec("int8", PerGroup(8))]
)
def test_gradients_of_two_activations_see_the_other_rounded(spec):
    a, b, g = normal(1, 2, 5, K), normal(2, 2, K, 6), normal(3, 2, 5, 6)
    numbers = (((2,), (1,)), ((0,), (0,)))

    @jax.jit
    def both(a, b, g):
        ours = jax.vjp(
            lambda a, b: dot_general_dynamic(a, b, numbers, lhs_spec=spec, rhs_spec=spec), a, b
        )[1](g)
        fa, fb = fake(a, spec, (2,)), fake(b, spec, (1,))
        return ours, jax.vjp(lambda a, b: lax.dot_general(a, b, numbers), fa, fb)[1](g)

    ours, expected = both(a, b, g)
    for got, want in zip(ours, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_gradient_of_a_convolution():
    x, w = normal(1, 2, 7, 6, 4), normal(2, 3, 3, 2, 8)
    q = quantized(w, QSpec("int8", PerChannel(3)))
    conv = {
        "window_strides": (2, 1), "padding": "SAME", "rhs_dilation": (1, 2),
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 2,
    }  # fmt: skip

    @jax.jit
    def both(x, q):
        def ours(x):
            return conv_general_dilated(x, q, **conv, activations=QSpec("int8"))

        def theirs(x):
            return lax.conv_general_dilated(x, dequantize(q), **conv)

        g = jnp.cos(theirs(x))
        return jax.vjp(ours, x)[1](g), jax.vjp(theirs, x)[1](g)

    ours, expected = both(x, q)
    np.testing.assert_array_equal(ours, expected)


def test_under_remat_scan_and_vmap():
    w = np.asarray(normal(0, 3, K, K)) / K
    q = quantized(w, QSpec("int8", PerChannel(1)), batch_axes=1)
    x = normal(1, 4, K)

    def chain(x, product, layers):
        step = jax.checkpoint(lambda x, q: (jnp.tanh(product(x, q)), None))
        return lax.scan(step, x, layers)[0].sum()

    def ours(x, q):
        return dot_general(x, q, MATRIX, activations=None)

    def theirs(x, w):
        return x @ w

    expected = jax.jit(jax.grad(functools.partial(chain, product=theirs)))(x, layers=dequantize(q))
    got = jax.jit(jax.grad(functools.partial(chain, product=ours)))(x, layers=q)
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3)
    one = jax.grad(lambda row: chain(row[None], ours, q))
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(x), got, rtol=2e-3, atol=2e-3)


def test_a_qtensor_is_not_differentiable():
    q, x = weights("int8 channel"), normal(1, 4, K)
    rows = lax.GatherDimensionNumbers((1,), (0,), (0,))
    table = quantized(normal(0, 9, 4), QSpec("int8", PerChannel(0)))
    calls = [
        (lambda q: dot_general(x, q, MATRIX, activations=None).sum(), q),
        (lambda q: dot_general(x, q, MATRIX, activations=QSpec("int8")).sum(), q),
        (
            lambda q: gather(
                q, jnp.array([[1]]), dimension_numbers=rows, slice_sizes=(1, 4)
            ).sum(),
            table,
        ),
    ]  # fmt: skip
    for call, leaf in calls:
        with pytest.raises(TypeError, match="partition"):
            jax.grad(call, allow_int=True)(leaf)
        with pytest.raises(TypeError, match="partition"):
            jax.jit(jax.grad(call, allow_int=True))(leaf)


def test_what_is_kept_for_the_backward_pass_is_codes():
    q, x = weights("int4 group"), normal(1, 4, K)
    _, pullback = jax.vjp(lambda x: dot_general(x, q, MATRIX, activations=QSpec("int8")), x)
    floats = [a for a in jax.tree.leaves(pullback) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert sum(a.size for a in floats) <= q.scale.size
