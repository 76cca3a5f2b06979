"""Served and trained as users compile them: apart by what one rounding less makes of a sum.

A CPU may contract a product and a sum, as of a scale and a bias, to one operation that rounds once.
XLA lets it in some programs and not in others; a program that returns a state beside its result is
another than one that does not. All else is the same bit for bit: see test_served.py.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import jaxquant as jq
from tests.arrays import normal
from tests.compiled import optimised
from tests.qat.programs import (
    KINDS,
    Many,
    Program,
    on_integers,
    rule,
    weights,
)

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
    fake = optimised(jq.fake_quantized(many.fn, many.recipe))
    trained, _ = fake(many.params, *many.args, quant_state=state)
    qparams = many.served(state)
    served = optimised(jq.quantized(many.fn))(qparams, *many.args)
    for kind in kinds:
        w, bias = jq.dequantize(qparams[kind]["w"]), many.params[kind]["bias"]
        reach = jnp.abs(many.args[0]) @ jnp.abs(w) + jnp.abs(bias)[None]
        apart = np.abs(np.asarray(served[kind]) - np.asarray(trained[kind]))
        assert (apart <= ROUNDINGS * np.asarray(reach)).all(), kind


def test_weights_are_the_same_bit_for_bit() -> None:
    many = Many(Program(dense, params, (normal(9, 6, D),)), tuple(KINDS))
    state, sites = many.state(), jq.trace(many.fn, many.params, *many.args)

    @optimised
    def fake(params: Any, state: Any) -> Any:
        return jq.qat.fake_quant_params(params, many.recipe, sites=sites, quant_state=state)

    trained, qparams = fake(many.params, state), many.served(state)
    for kind in KINDS:
        served = optimised(jq.dequantize)(qparams[kind]["w"])
        np.testing.assert_array_equal(trained[kind]["w"], served, err_msg=kind)


def test_doors_up_to_roundings() -> None:
    """Linen from a frozen tree, a state given by itself, and NNX."""
    x, recipe = normal(9, 6, D), jq.Recipe([rule("lsq 4")])
    model = nn.Dense(N)
    fmodel = jq.linen.fake_quantized(model, recipe)
    variables = optimised(fmodel.init)(jax.random.key(0), x)
    float_params = {"params": variables["params"]}
    fake = optimised(jq.fake_quantized(model.apply, recipe))
    qvariables = jq.linen.convert(fmodel, variables, x)
    float_model = nnx.Linear(D, N, rngs=nnx.Rngs(0))
    trained = jq.nnx.fake_quantized(float_model, recipe, x)
    served = jq.nnx.convert(trained)[0]

    def forward(model: nnx.Module, x: Any) -> Any:
        graph, state = nnx.split(model)
        return optimised(lambda state, x: nnx.merge(graph, state)(x))(state, x)

    kernel = jq.dequantize(qvariables["params"]["kernel"])
    for one, other, w in (
        (
            optimised(fmodel.apply)(freeze(variables), x),
            fake(float_params, x, quant_state=fmodel.state(variables, x))[0],
            kernel,
        ),
        (
            optimised(fmodel.apply)(variables, x),
            optimised(jq.quantized(model.apply))(qvariables, x),
            kernel,
        ),
        (forward(trained, x), forward(served, x), float_model.kernel[...]),
    ):
        reach = np.abs(np.asarray(x)) @ np.abs(np.asarray(w))
        assert (np.abs(np.asarray(one) - np.asarray(other)) <= ROUNDINGS * reach).all()
