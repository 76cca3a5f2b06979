import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant import PerGroup, PerTensor, QSpec
from jaxquant.ops import dot_general_dynamic, fake
from tests.arrays import normal
from tests.ops.cases import (
    EXACT,
)

SPECS = {
    "int8": (QSpec("int8"), QSpec("int8")),
    "tensor": (QSpec("int8", PerTensor()), QSpec("int8")),
    "softmax": (QSpec("uint8", range="qmax"), QSpec("int8")),
    "asymmetric": (QSpec("uint8", symmetric=False), QSpec("int8", symmetric=False)),
    "int4": (QSpec("int4"), QSpec("int8")),
    "float8": (QSpec("float8_e4m3fn"), QSpec("float8_e4m3fn")),
    "mixed": (QSpec("float8_e4m3fn"), QSpec("int8")),
    "groups": (QSpec("int8", PerGroup(4)), QSpec("int8")),
}
SHAPES = {
    # queries [batch, time, heads, depth] with keys; probabilities with values; plain; one row
    "scores": ((2, 5, 3, 8), (2, 7, 3, 8), (((3,), (3,)), ((0, 2), (0, 2)))),
    "values": ((2, 3, 5, 7), (2, 7, 3, 8), (((3,), (1,)), ((0, 1), (0, 2)))),
    "two axes": ((5, 7, 4), (4, 7, 6), (((1, 2), (1, 0)), ((), ()))),
    "one row": ((2, 1, 3, 8), (2, 7, 3, 8), (((3,), (3,)), ((0, 2), (0, 2)))),
    "empty": ((2, 0), (0, 3), (((1,), (0,)), ((), ()))),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_product_of_the_rounded(shape):
    lhs, rhs, numbers = SHAPES[shape]
    a, b = jnp.abs(normal(1, *lhs)), normal(2, *rhs)

    @jax.jit
    def every(a, b):
        out = {}
        for name in SPECS if shape == "scores" else ("int8", "asymmetric"):
            left, right = SPECS[name]
            y = dot_general_dynamic(a, b, numbers, lhs_spec=left, rhs_spec=right)
            fa, fb = fake(a, left, numbers[0][0]), fake(b, right, numbers[0][1])
            out[name] = y, lax.dot_general(fa, fb, numbers)
        return out

    for name, (y, expected) in every(a, b).items():
        assert y.dtype == expected.dtype, name
        reach = 3.0 * 3.0 * 30
        np.testing.assert_allclose(y, expected, rtol=0, atol=EXACT * reach, err_msg=name)


def test_dtype_and_what_is_not_finite():
    a, b = normal(1, 3, 8, dtype=jnp.bfloat16), normal(2, 8, 4, dtype=jnp.bfloat16)
    spec = QSpec("int8")

    def product(a, b, preferred=None):
        return dot_general_dynamic(
            a, b, (((1,), (0,)), ((), ())), None, preferred, lhs_spec=spec, rhs_spec=spec
        )

    assert product(a, b).dtype == jnp.bfloat16
    assert product(a, b, jnp.float32).dtype == jnp.float32
    y = product(a.at[1, 0].set(jnp.nan), b.at[0, 2].set(jnp.inf), jnp.float32)
    assert np.isnan(y[1]).all()
    assert np.isnan(y[:, 2]).all()
    assert np.isfinite(np.asarray(y)[np.ix_([0, 2], [0, 1, 3])]).all()
