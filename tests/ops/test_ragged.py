import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant import PerChannel, PerGroup, PerTensor, QSpec, quantize
from jaxquant.ops import fake, ragged_dot_general
from jaxquant.qtensor import dequantize
from tests.ops.cases import jit, normal

NUMBERS = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
SPECS = {
    "channel": QSpec("int8", PerChannel((0, 2))),
    "column": QSpec("int8", PerChannel(2)),
    "tensor": QSpec("int4", PerTensor()),
    "mxfp": QSpec("float4_e2m1fn", PerChannel((0, 2))),
    "group": QSpec("int4", PerGroup(8, 1)),
    "asymmetric": QSpec("uint8", PerChannel((0, 2)), symmetric=False),
    "nf4": QSpec("nf4", PerChannel((0, 2))),
}


@pytest.mark.parametrize("name", SPECS)
def test_equals_the_dequantized(name):
    x, w, sizes = normal(1, 9, 16), normal(2, 3, 16, 5), jnp.array([4, 0, 5])
    for minor in ((), (1,)):
        q = quantize(w, SPECS[name], minor=minor)
        for spec in (None, QSpec("int8"), QSpec("int8", PerTensor()), QSpec("uint8")):

            @jit
            def both(x, q, sizes, spec=spec):
                ours = ragged_dot_general(x, q, sizes, NUMBERS, activations=spec)
                fx = x if spec is None else fake(x, spec, (1,))
                return ours, lax.ragged_dot_general(fx, dequantize(q), sizes, NUMBERS)

            ours, expected = both(x, q, sizes)
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)


def test_experts_may_be_a_stack():
    w = normal(2, 3, 16, 5)
    q = quantize(w, QSpec("int8", PerChannel(1)), batch_axes=1)
    x, sizes = normal(1, 9, 16), jnp.array([4, 2, 3])
    ours = ragged_dot_general(x, q, sizes, NUMBERS, activations=None)
    expected = lax.ragged_dot_general(x, dequantize(q), sizes, NUMBERS)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_gradient_and_rows_of_no_expert():
    q = quantize(normal(2, 3, 16, 5), SPECS["channel"])
    x, sizes = normal(1, 9, 16), jnp.array([4, 0, 3])

    def ours(x):
        return ragged_dot_general(x, q, sizes, NUMBERS, activations=QSpec("int8"))

    def theirs(x):
        return lax.ragged_dot_general(x, dequantize(q), sizes, NUMBERS)

    np.testing.assert_array_equal(ours(x)[7:], 0.0)
    g = normal(3, 9, 5)
    np.testing.assert_array_equal(jax.vjp(ours, x)[1](g)[0], jax.vjp(theirs, x)[1](g)[0])


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_operands_are_int8(platform):
    q = quantize(normal(2, 3, 16, 5), SPECS["channel"])
    call = jax.jit(lambda x, q, s: ragged_dot_general(x, q, s, NUMBERS, activations=QSpec("int8")))
    text = call.trace(normal(1, 9, 16), q, jnp.array([4, 0, 5])).lower(
        lowering_platforms=(platform,)
    )
    assert "xi8>, tensor<3x16x5xi8>" in text.as_text()
