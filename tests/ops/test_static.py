"""Contractions on calibrated grids, against NumPy: every layout of weights, every form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant import PerBlock, PerChannel, PerGroup, PerTensor, QSpec, quantize
from jaxquant.ops.convolve import conv_of
from jaxquant.ops.integer.static import conv_static, dot_static, zero_offset
from jaxquant.qtensor import Calibration, ContractionConfig, QuantParams
from tests.arrays import normal
from tests.ops import integer_reference as ref

GRIDS = {"symmetric": None, "asymmetric": 17, "least": -128}
LAYOUTS = {  # spec of a `[6, 4, 10]` weight, axes to store last, axes to sum over
    "plain": (QSpec("int8", PerChannel((1, 2))), (), (0,)),
    "tensor": (QSpec("int8", PerTensor(), symmetric=False), (0,), (0,)),
    "two summed": (QSpec("int8", PerChannel(2), symmetric=False), (0, 1), (0, 1)),
    "first and last": (QSpec("uint8", PerChannel(1), symmetric=False), (0, 2), (0, 2)),
    "kept groups": (QSpec("int8", PerBlock(4, 5, (1, 2)), symmetric=False), (1,), (1,)),
    "nibbles": (QSpec("int4", PerChannel(2)), (0, 1), (0, 1)),
    "nibbles asymmetric": (QSpec("uint4", PerChannel((0, 2)), symmetric=False), (1,), (1,)),
    "three bits": (QSpec("int3", PerChannel((0, 1))), (2,), (2,)),
    "all summed": (QSpec("int8", PerTensor()), (), (0, 1, 2)),
}
NONE = {
    "groups": (QSpec("int8", PerGroup(2, 0)), (0,)),
    "blocks": (QSpec("int8", PerBlock(3, 5)), (1,)),
    "each": (QSpec("int8", PerChannel((0, 1, 2))), (0,)),
    "codebook": (QSpec("nf4", PerChannel(2)), (0, 1)),
    "float": (QSpec("float8_e4m3fn", PerChannel(2)), (0, 1)),
    "16 bits": (QSpec("int16", PerChannel(2)), (0, 1)),
}


USE = ContractionConfig(activations=QSpec("int8", PerTensor()))


def grid(zero):
    return QuantParams(jnp.float32(0.037), None if zero is None else jnp.int32(zero))


def codes(seed, *shape):
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


def layer(q, zero):
    """The tensor as NumPy arrays."""
    calibration = Calibration(input=grid(zero))
    return ref.layer(dataclasses.replace(q, calibration=calibration, contraction=USE))


def encoded(arrays):
    """Quantizes `(array, spec, storage_last_axes)` of every name, in one program."""
    specs = [how for _, *how in arrays.values()]

    @jax.jit
    def every(arrays):
        return [
            quantize(w, spec, storage_last_axes=m)
            for w, (spec, m) in zip(arrays, specs, strict=True)
        ]

    return dict(zip(arrays, every([w for w, *_ in arrays.values()]), strict=True))


def test_dense():
    w = normal(1, 6, 4, 10) + 0.3
    weights = encoded(
        {
            name: (w, spec, storage_last_axes)
            for name, (spec, storage_last_axes, _) in LAYOUTS.items()
        }
    )
    # each layout with two grids, as the left operand in one
    calls = {
        (name, kind): (n + m) % 2 == 1
        for n, name in enumerate(LAYOUTS)
        for m, kind in enumerate(("symmetric", ("asymmetric", "least")[n % 2]))
    }
    inputs = {
        name: codes(n, 3, *(w.shape[a] for a in over), 2)
        for n, (name, (_, _, over)) in enumerate(LAYOUTS.items())
    }

    @jax.jit
    def every(weights, inputs):
        out = {}
        for (name, kind), flipped in calls.items():
            over = LAYOUTS[name][2]
            axes = tuple(range(1, len(over) + 1)), over
            on = grid(GRIDS[kind])
            out[name, kind] = dot_static(inputs[name], weights[name], on, axes, flipped)
        return out

    for (name, kind), y in every(weights, inputs).items():
        over, zero = LAYOUTS[name][2], GRIDS[kind] or 0
        at, x = layer(weights[name], zero), inputs[name].astype(np.int64)
        axes = "".join("abc"[a] for a in over)
        kept = "".join(c for c in "abc" if c not in axes)
        out = f"{kept}ny" if calls[name, kind] else f"ny{kept}"
        total = ref.dense(x - zero, at.w, f"n{axes}y,abc->{out}")
        scale = at.scale.min(axis=over) * np.float32(0.037)
        scale = scale[..., None, None] if calls[name, kind] else scale[None, None]
        np.testing.assert_array_equal(y, total.astype(np.float32) * scale, f"{name} {kind}")
        if zero:
            offset = -zero * at.w.sum(axis=over)
            np.testing.assert_array_equal(zero_offset(weights[name], over, jnp.int32(zero)), offset)


@pytest.mark.parametrize("name", NONE)
def test_forms_that_have_no_sums(name):
    spec, over = NONE[name]
    q = quantize(normal(1, 6, 4, 10), spec, storage_last_axes=over)
    x = codes(2, 3, *(q.shape[a] for a in over))
    axes = tuple(range(1, x.ndim)), over
    assert dot_static(x, q, grid(None), axes, False) is None
    assert zero_offset(q, over, jnp.int32(1)) is None


def test_sums_beyond_int32_are_not_taken():
    def product(terms):
        q = quantize(jnp.ones((terms, 2)), QSpec("int8", PerChannel(1), symmetric=False))
        found = dot_static(jnp.ones((3, terms), jnp.int8), q, grid(5), ((1,), (0,)), False)
        assert (found is None) == (255 * 255 * terms >= 2**31)
        return q.scale

    for terms in (33025, 33026):
        jax.eval_shape(lambda n=terms: product(n))


# name: image `[2, 5, 6, 4]` with dimension numbers, the kernel's shape, and how
FORMS = {
    "same": ("NHWC", "HWIO", "NHWC", (3, 2, 4, 6), {"strides": (1, 1), "padding": "SAME"}),
    "strided": ("NHWC", "HWIO", "NHWC", (3, 3, 4, 6), {"strides": (2, 3), "padding": "SAME"}),
    "even": ("NHWC", "HWIO", "NHWC", (2, 4, 4, 3), {"strides": (2, 2), "padding": "SAME"}),
    "valid": ("NHWC", "OHWI", "NCHW", (3, 3, 2, 4), {"strides": (1, 2), "padding": "VALID"}),
    "uneven": (
        *("NHWC", "HWIO", "NHWC", (2, 2, 4, 3)),
        {"strides": (1, 2), "padding": ((3, 0), (1, 2)), "rhs_dilation": (2, 3)},
    ),
    "groups": ("NWHC", "HWIO", "NHWC", (3, 3, 2, 6), {"strides": (1, 1), "padding": "SAME"}),
    "depthwise": ("NHWC", "HWIO", "NHWC", (3, 3, 1, 4), {"strides": (2, 1), "padding": "SAME"}),
    "multiplier": (
        *("NHWC", "HWIO", "NHWC", (2, 3, 1, 8)),
        {"strides": (1, 1), "padding": ((1, 2), (0, 0)), "rhs_dilation": (2, 1)},
    ),
    "transposed": (
        *("NHWC", "HWIO", "NHWC", (3, 3, 4, 2)),
        {"strides": (1, 1), "padding": ((1, 2), (2, 2)), "lhs_dilation": (2, 3)},
    ),
    "transposed depthwise": (
        *("NHWC", "HWIO", "NHWC", (2, 3, 1, 4)),
        {"strides": (2, 1), "padding": ((0, 1), (2, 0)), "lhs_dilation": (2, 2)},
    ),
}
KERNELS = {  # for one form after the other
    "int8": QSpec("int8"),
    "int4": QSpec("int4"),
    "int8 asymmetric": QSpec("int8", symmetric=False),
    "uint8 asymmetric": QSpec("uint8", PerTensor(), symmetric=False),
}


def test_convolution():
    x, calls, arrays = codes(3, 2, 5, 6, 4), {}, {}
    for n, (name, (image, kernel, out, shape, how)) in enumerate(FORMS.items()):
        numbers = lax.conv_dimension_numbers(x.shape, shape, (image, kernel, out))
        groups = 4 // shape[kernel.index("I")]
        conv = conv_of(
            *(how["strides"], how["padding"], how.get("lhs_dilation"), how.get("rhs_dilation")),
            *(numbers, groups, 1, None, None),
        )
        over = tuple(a for a, c in enumerate(kernel) if c != "O")
        spec_name = list(KERNELS)[n % 4]
        storage_last_axes = over if n % 3 == 0 else ()
        calls[name, spec_name] = conv, groups
        arrays[name, spec_name] = (
            normal(n, *shape) + 0.2,
            KERNELS[spec_name].at(over, 4),
            storage_last_axes,
        )
    zeros = [list(GRIDS.values())[n % 3] for n in range(len(calls))]

    @jax.jit
    def every(x, weights):
        return [
            conv_static(conv, x, q, grid(zero))
            for (conv, _), q, zero in zip(calls.values(), weights, zeros, strict=True)
        ]

    weights = encoded(arrays)
    found = every(x, list(weights.values()))
    for ((name, spec), q), zero, y in zip(weights.items(), zeros, found, strict=True):
        image, kernel, out, _, how = FORMS[name]
        groups, at = calls[name, spec][1], layer(q, zero)
        whole = x.astype(np.int64) - (zero or 0)
        total = ref.conv(whole, at.w, numbers=(image, kernel, out), groups=groups, **how)
        scale = at.scale.min(axis=tuple(a for a, c in enumerate(kernel) if c != "O"))
        shape = [-1 if c == "C" else 1 for c in out]
        expected = total.astype(np.float32) * (scale * np.float32(0.037)).reshape(shape)
        np.testing.assert_array_equal(y, expected, f"{name} {spec} {zero}")


def test_batch_groups_have_no_sums():
    shape = (3, 3, 4, 2)
    numbers = lax.conv_dimension_numbers((2, 5, 6, 4), shape, ("NHWC", "HWIO", "NHWC"))
    conv = conv_of((1, 1), "SAME", None, None, numbers, 1, 2, None, None)
    q = quantize(normal(1, *shape), QSpec("int8", PerChannel(3)))
    assert conv_static(conv, codes(1, 2, 5, 6, 4), q, grid(3)) is None
