"""What tests of static activations share: specs, grids and dense layers by their equation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.interpret import _compat
from tests.ops import integer_reference as ref

F32 = np.float32
TENSOR = jq.PerTensor()
INT8 = jq.int8(granularity=TENSOR)
ASYM = jq.int8(symmetric=False, granularity=TENSOR)
UINT8 = jq.uint8(symmetric=False, granularity=TENSOR)
POSITIVE = jq.uint8(symmetric=True, granularity=TENSOR)
INT4 = jq.int4(symmetric=False, granularity=TENSOR)
FLOAT8 = jq.QSpec("float8_e4m3fn", TENSOR)
W8, W8A, W4 = jq.int8(), jq.int8(symmetric=False), jq.int4()


def expected_grid(spec: jq.QSpec, batches: list[Any]) -> tuple[np.float32, int, int, int]:
    """Scale, zero point, least and greatest code (as int8) of the ends of what was seen."""
    bits, signed = spec.format.bits, spec.format.signed
    low = min(0.0, *(float(np.min(b)) for b in batches))
    high = max(0.0, *(float(np.max(b)) for b in batches))
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    shift = 128 if most > 127 else 0
    if spec.symmetric:
        scale = F32(F32(max(-low, high)) / F32(most + 0.5))
        return scale, -shift, least - shift, most - shift
    scale = F32((F32(high) - F32(low)) / F32(2**bits - 1))
    zero = int(np.clip(least - np.round(F32(low) / scale), least, most))
    return scale, zero - shift, least - shift, most - shift


def rounded(q: jq.QTensor, x: Any) -> np.ndarray:
    """A dense layer of one QTensor, by its equation."""
    at = ref.layer(q)
    codes = at.x.whole(at.x.code(x))
    return (codes @ at.w).astype(F32) * (at.scale[:1] * at.x.scale)


def equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in _compat.inner_jaxprs(eqn):
            yield from equations(inner)


def mlp(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["a"]) @ p["b"]
