import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant import PerChannel, PerGroup, PerTensor, QSpec, quantize
from jaxquant.ops import fake, ragged_dot_general
from jaxquant.qtensor import dequantize
from tests.arrays import normal
from tests.ops.cases import (
    quantized,
)

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


def by_expert(x, w, sizes):
    """Rows `[m, k]` times the `[k, n]` of their expert, in float64; 0 where there is none."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    y = np.zeros((len(x), w.shape[2]))
    for expert, (end, size) in enumerate(zip(np.cumsum(sizes), sizes, strict=True)):
        y[end - size : end] = x[end - size : end] @ w[expert]
    return y


@pytest.mark.parametrize("name", SPECS)
def test_equals_the_dequantized(name):
    x, w, sizes = normal(1, 9, 16), normal(2, 3, 16, 5), np.array([4, 0, 5], np.int32)
    specs = (None, QSpec("int8"), QSpec("int8", PerTensor()), QSpec("uint8"))
    qs = {
        storage_last_axes: quantized(w, SPECS[name], storage_last_axes=storage_last_axes)
        for storage_last_axes in ((), (1,))
    }

    @jax.jit
    def every(x, qs, sizes):
        ours = [
            [ragged_dot_general(x, q, sizes, NUMBERS, activations=s) for s in specs]
            for q in qs.values()
        ]
        rows = [x if s is None else fake(x, s, (1,)) for s in specs]
        return ours, rows, [dequantize(q) for q in qs.values()]

    ours, rows, values = every(x, qs, sizes)
    for storage_last_axes, found, held in zip(qs, ours, values, strict=True):
        for spec, y, fx in zip(specs, found, rows, strict=True):
            close = {"rtol": 1e-5, "atol": 1e-4, "err_msg": f"{storage_last_axes}, {spec}"}
            np.testing.assert_allclose(y, by_expert(fx, held, sizes), **close)


def test_experts_may_be_a_stack():
    w = normal(2, 3, 16, 5)
    q = quantized(w, QSpec("int8", PerChannel(1)), batch_axes=1)
    x, sizes = normal(1, 9, 16), np.array([4, 2, 3], np.int32)
    ours = ragged_dot_general(x, q, sizes, NUMBERS, activations=None)
    expected = by_expert(x, dequantize(q), sizes)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_gradient_and_rows_of_no_expert():
    q = quantized(normal(2, 3, 16, 5), SPECS["channel"])
    x, sizes = normal(1, 9, 16), jnp.array([4, 0, 3])

    def ours(x):
        return ragged_dot_general(x, q, sizes, NUMBERS, activations=QSpec("int8"))

    def theirs(x):
        return lax.ragged_dot_general(x, dequantize(q), sizes, NUMBERS)

    @jax.jit
    def every(x, g):
        y, pullback = jax.vjp(ours, x)
        return y, pullback(g)[0], jax.vjp(theirs, x)[1](g)[0]

    y, got, expected = every(x, normal(3, 9, 5))
    np.testing.assert_array_equal(np.asarray(y)[7:], 0.0)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_operands_are_int8(platform):
    q = jax.eval_shape(lambda w: quantize(w, SPECS["channel"]), normal(2, 3, 16, 5))
    call = jax.jit(lambda x, q, s: ragged_dot_general(x, q, s, NUMBERS, activations=QSpec("int8")))
    text = call.trace(normal(1, 9, 16), q, jnp.array([4, 0, 5])).lower(
        lowering_platforms=(platform,)
    )
    assert "xi8>, tensor<3x16x5xi8>" in text.as_text()
