"""Served and trained as users compile them: apart by what one rounding less makes of a sum.

A CPU may contract a product and a sum, as of a scale and a bias, to one operation that rounds once.
XLA lets it in some programs and not in others; a program that returns a state beside its result is
another than one that does not. All else is the same bit for bit: see test_served.py.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from tests.qat.programs import KINDS, Many, Program, normal, on_integers, weights

D, N = 64, 24
ROUNDINGS = 2.0**-22  # four of float32: of the scales, of the bias, of a sum of groups


def dense(p: Any, x: Any) -> Any:
    return x @ p["w"] + p["bias"][None]


def params(n: int) -> Any:
    return {"w": weights(2 * n, D, N, fan=D), "bias": weights(2 * n + 1, N, fan=2)}


@pytest.mark.parametrize("rows", [1, 6, 70])
def test_served_equals_trained_up_to_roundings(rows: int) -> None:
    kinds = tuple(k for k in KINDS if on_integers(k))
    many = Many(Program(dense, params, (normal(9, rows, D),)), kinds)
    state = many.state()
    fake = jax.jit(jq.fake_quantized(many.fn, many.recipe))
    trained, _ = fake(many.params, *many.args, quant_state=state)
    qparams = many.served(state)
    served = jax.jit(jq.quantized(many.fn))(qparams, *many.args)
    for kind in kinds:
        w, bias = jq.dequantize(qparams[kind]["w"]), many.params[kind]["bias"]
        reach = jnp.abs(many.args[0]) @ jnp.abs(w) + jnp.abs(bias)[None]
        apart = np.abs(np.asarray(served[kind]) - np.asarray(trained[kind]))
        assert (apart <= ROUNDINGS * np.asarray(reach)).all(), kind
