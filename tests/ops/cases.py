"""Tables of what is multiplied with what, and references that know nothing of `jaxquant.ops`."""

import functools

import jax
import numpy as np

from jaxquant import PerBlock, PerChannel, PerGroup, PerTensor, QSpec, quantize
from jaxquant.ops import fake
from jaxquant.qtensor import QTensor

K, N = 48, 20

MATRIX = (((1,), (0,)), ((), ()))

# Activation specs, and the bound on |y - reference| / (max |x| sum |w|). Only float activations
# are contracted less exactly than float32 does: as two int8 numbers, on a CPU.
EXACT, LIMBS = 4e-7, 2.0**-15
ACTIVATIONS = {
    "float": (None, LIMBS),
    "int8 row": (QSpec("int8"), EXACT),
    "int8 tensor": (QSpec("int8", PerTensor(), range="qmax"), EXACT),
    "int8 asymmetric": (QSpec("int8", symmetric=False), EXACT),
    "uint8": (QSpec("uint8"), EXACT),
    "uint8 asymmetric": (QSpec("uint8", symmetric=False), EXACT),
    "int4": (QSpec("int4"), EXACT),
    "int8 group": (QSpec("int8", PerGroup(16)), LIMBS),
    "int16": (QSpec("int16"), LIMBS),
    "float8": (QSpec("float8_e4m3fn"), LIMBS),
}

WEIGHTS = {
    "int8 channel": QSpec("int8", PerChannel(1)),
    "int8 tensor": QSpec("int8", PerTensor()),
    "int8 each": QSpec("int8", PerChannel((0, 1))),
    "int8 group": QSpec("int8", PerGroup(16, 0)),
    "int8 uneven group": QSpec("int8", PerGroup(20, 0)),
    "int8 kept group": QSpec("int8", PerGroup(5, 1)),
    "int8 block": QSpec("int8", PerBlock(16, 8)),
    "int8 asymmetric": QSpec("int8", PerChannel(1), symmetric=False),
    "int8 asymmetric group": QSpec("int8", PerGroup(16, 0), symmetric=False),
    "uint8": QSpec("uint8", PerChannel(1)),
    "uint8 asymmetric group": QSpec("uint8", PerGroup(20, 0), symmetric=False),
    "int4 group": QSpec("int4", PerGroup(16, 0), range="signed"),
    "uint4 asymmetric group": QSpec("uint4", PerGroup(16, 0), symmetric=False),
    "int3": QSpec("int3", PerChannel(1)),
    "int16": QSpec("int16", PerChannel(1)),
    "float8": QSpec("float8_e4m3fn", PerChannel(1)),
    "mxfp8": QSpec("mxfp8", PerGroup(16, 0)),
    "mxfp4": QSpec("mxfp4", PerGroup(16, 0)),
    "float6": QSpec("float6_e2m3fn", PerChannel(1)),
    "nvfp4": QSpec("nvfp4", PerGroup(16, 0)),
    "nf4": QSpec("nf4", PerGroup(16, 0)),
}


def quantized(w: np.ndarray | jax.Array, spec: QSpec, **rest) -> QTensor:
    """As `quantize`, in one program."""
    return jax.jit(lambda w: quantize(w, spec, **rest))(w)


@functools.cache
def weights(
    name: str, seed: int = 0, shape: tuple[int, ...] = (K, N), storage_last_axes=()
) -> QTensor:
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return quantized(
        np.abs(w) if name == "uint8" else w, WEIGHTS[name], storage_last_axes=storage_last_axes
    )


def rounded(x: jax.Array, spec: QSpec | None, contracted: tuple[int, ...]) -> jax.Array:
    return x if spec is None else fake(x, spec, contracted)


def matmul(x, w) -> np.ndarray:
    """`x` `[m, k]` times `w` `[k, n]`, summed in float64 and rounded to float32."""
    return (np.asarray(x, np.float64) @ np.asarray(w, np.float64)).astype(np.float32)


def assert_near(y, x, w, expected, bound: float, case: object = "") -> None:
    """Equal up to `bound` of what a result could reach at most; `w` is `[k, n]`."""
    assert y.dtype == expected.dtype, case
    assert y.shape == expected.shape, case
    reach = np.abs(np.asarray(x, np.float64)).max() * np.abs(np.asarray(w, np.float64)).sum(0).max()
    error = np.abs(np.asarray(y, np.float64) - np.asarray(expected, np.float64)).max()
    assert error <= bound * reach, (case, error / reach)
