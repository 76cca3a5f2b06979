import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant import PerChannel, PerGroup, PerTensor, QSpec
from jaxquant.ops import conv_general_dilated, fake
from jaxquant.qtensor import dequantize
from tests.arrays import normal
from tests.ops.cases import (
    quantized,
)

NHWC = ("NHWC", "HWIO", "NHWC")
CASES = {
    "same": ((2, 9, 8, 4), (3, 2, 4, 8), {"window_strides": (1, 1), "padding": "SAME"}),
    "strided": ((2, 9, 8, 4), (3, 2, 4, 8), {"window_strides": (2, 3), "padding": "VALID"}),
    "dilated": (
        (2, 9, 8, 4),
        (3, 2, 4, 8),
        {"window_strides": (1, 2), "padding": "SAME", "rhs_dilation": (2, 3)},
    ),
    "transposed": (
        (2, 5, 4, 4),
        (3, 2, 4, 8),
        {"window_strides": (1, 1), "padding": ((2, 2), (0, 1)), "lhs_dilation": (2, 2)},
    ),
    "grouped": (
        (2, 9, 8, 4),
        (3, 2, 2, 6),
        {"window_strides": (2, 1), "padding": ((1, 2), (0, 0)), "feature_group_count": 2},
    ),
    "depthwise": (
        (2, 9, 8, 4),
        (3, 2, 1, 8),
        {
            "window_strides": (2, 1),
            "padding": ((1, 2), (0, 3)),
            "feature_group_count": 4,
            "rhs_dilation": (1, 2),
            "lhs_dilation": (2, 1),
        },
    ),
    "cropped": (
        (1, 9, 8, 4),
        (3, 2, 4, 8),
        {"window_strides": (1, 1), "padding": ((-1, 0), (0, -2))},
    ),
    "point": ((2, 5, 5, 4), (1, 1, 4, 8), {"window_strides": (1, 1), "padding": "VALID"}),
    "empty": ((0, 5, 5, 4), (3, 3, 4, 8), {"window_strides": (1, 1), "padding": "SAME"}),
}
ACTIVATIONS = [
    None, QSpec("int8"), QSpec("uint8", PerTensor(), range="qmax"), QSpec("int8", symmetric=False),
]  # fmt: skip
WEIGHTS = {
    "channel": QSpec("int8", PerChannel(3)),
    "int4 tensor": QSpec("int4", PerTensor()),
    "asymmetric": QSpec("uint8", PerChannel(3), symmetric=False),
    "mxfp": QSpec("float4_e2m1fn", PerChannel(3)),
    "group": QSpec("int4", PerGroup(4, (0, 1, 2))),
    "nf4": QSpec("nf4", PerChannel(3)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_dequantized_convolution(case):
    x_shape, w_shape, conv = CASES[case]
    x, w = normal(1, *x_shape), normal(2, *w_shape)
    chosen = WEIGHTS if case in ("same", "depthwise") else ("channel", "asymmetric")
    for i, name in enumerate(chosen):
        specs = ACTIVATIONS if name in ("channel", "asymmetric") else ACTIVATIONS[:2]
        q = quantized(w, WEIGHTS[name], storage_last_axes=(0, 1, 2) if i % 2 else ())

        @jax.jit
        def every(x, q, specs=specs):
            rest = {**conv, "dimension_numbers": NHWC}
            rows = [x if spec is None else fake(x, spec, (1, 2, 3)) for spec in specs]
            expected = lax.conv_general_dilated(jnp.concatenate(rows), dequantize(q), **rest)
            ours = [conv_general_dilated(x, q, **rest, activations=spec) for spec in specs]
            return ours, jnp.split(expected, len(specs))

        reach = 4.0 * 3.0 * np.asarray(w)[..., 0].size
        for y, expected, spec in zip(*every(x, q), specs, strict=True):
            assert y.shape == expected.shape, (name, spec)
            close = {"rtol": 0, "atol": 2e-7 * reach}
            np.testing.assert_allclose(y, expected, **close, err_msg=f"{name}, {spec}")


@pytest.mark.parametrize(
    "layout", [("NCH", "OIH", "NCH"), ("NHC", "HIO", "NHC"), ("HNC", "IHO", "CNH")]
)
def test_other_layouts_and_dtypes(layout):
    sizes = {"N": 2, "C": 4, "H": 9}
    x = normal(1, *(sizes[c] for c in layout[0]), dtype=jnp.bfloat16)
    kernel = {"O": 6, "I": 4, "H": 3}
    w = normal(2, *(kernel[c] for c in layout[1]), dtype=jnp.bfloat16)
    q = quantized(w, QSpec("int8", PerChannel(layout[1].index("O"))))
    window = [a for a in range(3) if layout[0][a] != "N"]
    cases = [*itertools.product((None, QSpec("int8")), (None, jnp.float32))]

    @jax.jit
    def every(x, q):
        ours, theirs = [], []
        for spec, preferred in cases:
            rest = {"dimension_numbers": layout, "preferred_element_type": preferred}
            fx = x if spec is None else fake(x, spec, window)
            ours.append(conv_general_dilated(x, q, (2,), "SAME", **rest, activations=spec))
            theirs.append(lax.conv_general_dilated(fx, dequantize(q), (2,), "SAME", **rest))
        return ours, theirs

    for y, expected, case in zip(*every(x, q), cases, strict=True):
        assert y.dtype == expected.dtype, case
        y, expected = np.asarray(y, np.float32), np.asarray(expected, np.float32)
        np.testing.assert_allclose(y, expected, rtol=0.02, atol=0.1, err_msg=str(case))


def test_kernels_on_the_left_and_batch_groups():
    x, w = normal(1, 4, 3, 8), normal(2, 4, 3, 3)
    q = quantized(w, QSpec("int8", PerChannel(0)))
    y = conv_general_dilated(q, x, (1,), "SAME", activations=None)
    np.testing.assert_array_equal(y, lax.conv_general_dilated(dequantize(q), x, (1,), "SAME"))
    rest = {"window_strides": (1,), "padding": "SAME", "batch_group_count": 2}
    y = conv_general_dilated(x, q, **rest, activations=None)
    np.testing.assert_allclose(
        y, lax.conv_general_dilated(x, dequantize(q), **rest), rtol=1e-5, atol=1e-5
    )


def test_what_is_not_finite_comes_through():
    x = np.array(normal(1, 2, 8, 4))
    x[0, 1, 1] = np.nan
    q = quantized(normal(2, 3, 4, 6), QSpec("int8", PerChannel(2)))
    rest = {"dimension_numbers": ("NHC", "HIO", "NHC"), "activations": QSpec("int8")}
    y = np.asarray(jax.jit(lambda x, q: conv_general_dilated(x, q, (1,), "SAME", **rest))(x, q))
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()
