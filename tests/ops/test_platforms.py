"""How the kinds of presets contract on accelerators, read from what their compilers are given."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import PerChannel, PerGroup, QSpec, quantize
from jaxquant.ops import dot_general
from tests.ops.cases import MATRIX

ACCELERATORS = ("cuda", "tpu")
ROWS, K, N = 3, 512, 256

INT8, FP8 = QSpec("int8"), QSpec("float8_e4m3fn")
# weights, activations, and the types of the operands and the result of the contraction
INTEGERS = ("i8", "i8", "i32")
NATIVE = {
    "w8a8": (QSpec("int8", PerChannel(1)), INT8, INTEGERS),
    "w8a8 unsigned": (QSpec("int8", PerChannel(1)), QSpec("uint8", symmetric=False), INTEGERS),
    "w8a8 asymmetric": (QSpec("uint8", PerChannel(1), symmetric=False), INT8, INTEGERS),
    "w4a8": (QSpec("int4", PerGroup(128, 0)), INT8, INTEGERS),
    "w4a8 asymmetric": (QSpec("uint4", PerGroup(32, 0), symmetric=False), INT8, INTEGERS),
    "w4a8 channel": (QSpec("int4", PerChannel(1)), INT8, INTEGERS),
    "mxfp4 a8": (QSpec("mxfp4", PerGroup(32, 0)), INT8, INTEGERS),
    "fp8": (QSpec("float8_e4m3fn", PerChannel(1)), FP8, ("f8E4M3FN", "f8E4M3FN", "f32")),
    "fp8 e5m2": (
        QSpec("float8_e5m2", PerChannel(1)),
        QSpec("float8_e5m2"),
        ("f8E5M2", "f8E5M2", "f32"),
    ),
}
WEIGHT_ONLY = {
    "w8a16": QSpec("int8", PerChannel(1)),
    "w8a16 asymmetric": QSpec("uint8", PerChannel(1), symmetric=False),
    "w4a16": QSpec("int4", PerGroup(128, 0)),
    "nf4": QSpec("nf4", PerGroup(64, 0)),
    "fp8 weights": QSpec("float8_e4m3fn", PerChannel(1)),
}
TENSOR = re.compile(r"tensor<((?:\d+x)*)(\w+)>")
WIDE = ("f64", "f32", "bf16", "f16")


def program(call, *args, platform):
    return jax.jit(call).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def tensors(line):
    """The size and type of each array that a line names."""
    found = TENSOR.findall(line)
    return [(int(np.prod([int(n) for n in dims.split("x")[:-1]])), kind) for dims, kind in found]


def contractions(text):
    """The types of the operands and the result of each `dot_general` and `convolution`."""
    lines = [line for line in text.splitlines() if re.search(r"stablehlo\.(dot_g|convol)", line)]
    return [tuple(kind for _, kind in tensors(line)[-3:]) for line in lines]


def wide_lines(text, size):
    """Lines with an array of floats of 16 bits or more that has as many values as the weight."""
    return [
        line.strip()
        for line in text.splitlines()
        if any(n >= size and kind in WIDE for n, kind in tensors(line))
    ]


def matrix(weights, dtype=jnp.bfloat16):
    x = np.random.default_rng(1).normal(size=(ROWS, K)).astype(dtype)
    w = np.random.default_rng(0).normal(size=(K, N)).astype(np.float32)
    return x, jax.jit(lambda w: quantize(w, weights, storage_last_axes=(0,)))(w)


@pytest.mark.parametrize("platform", ACCELERATORS)
@pytest.mark.parametrize("name", NATIVE)
def test_quantized_activations_are_contracted_natively(platform, name):
    weights, activations, kinds = NATIVE[name]
    x, q = matrix(weights)
    text = program(
        lambda x, q: dot_general(x, q, MATRIX, activations=activations), x, q, platform=platform
    )
    assert contractions(text) == [kinds]
    if weights.format.is_float and weights.format.bits < 8:
        return  # values of narrow floats become integers by way of float32
    assert wide_lines(text, K * N) == []


@pytest.mark.parametrize("platform", ACCELERATORS)
@pytest.mark.parametrize("name", WEIGHT_ONLY)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_weight_alone_is_converted_and_its_scale_goes_last(platform, name, dtype):
    """The weight is converted, decoded, less its zero point, never scaled: no multiply of its size.

    Whether a compiler fuses that into the contraction is its own matter. That of a TPU does for 8
    bits, and writes bfloat16 for 4, which are unpacked first; `dot_general_packed` does not.
    """
    x, q = matrix(WEIGHT_ONLY[name], jnp.dtype(dtype))
    text = program(
        lambda x, q: dot_general(x, q, MATRIX, activations=None), x, q, platform=platform
    )
    kind = {"bfloat16": "bf16", "float32": "f32"}[dtype]
    assert contractions(text) == [(kind, kind, "f32")]
    made = [re.search(r"= (?:stablehlo\.)?(\w+)", line) for line in wide_lines(text, K * N)]
    ops = {m.group(1) for m in made if m}
    assert ops <= {"convert", "subtract", "reshape", "dot_general", "call", "select",
                   "broadcast_in_dim"}, ops  # fmt: skip
