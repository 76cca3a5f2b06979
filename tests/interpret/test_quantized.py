"""`quantized(fn)` computes `fn`, for every program, on codes."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.interpret.calls import trace_call
from jaxquant.interpret.serve import serve
from tests.lowered import inlined

from .programs import PROGRAMS, Program, changed_carry, passed_on, sq, x

INT8_DOT = re.compile(
    r"stablehlo\.(?:dot_general|convolution)\b.*: \(tensor<[0-9x]*xi8>, tensor<[0-9x]*xi8>\)"
    r" -> tensor<[0-9x]*xi32>"
)


def run(program: Program, params, recipe):
    qparams, report = jq.ptq(program.fn, params, recipe, *program.args, kwargs=dict(program.kwargs))
    static = dict(program.kwargs)
    call = jax.jit(lambda p, *a: jq.quantized(program.fn)(p, *a, **static))
    return qparams, report, call


def both(program: Program, qparams, dense=None):
    """The results on codes and on `dense` weights, or on the dequantized ones, by one program."""
    static = dict(program.kwargs)

    @jax.jit
    def call(q, dense, *args):
        dense = jq.dequantize_params(q) if dense is None else dense
        return jq.quantized(program.fn)(q, *args, **static), program.fn(dense, *args, **static)

    return call(qparams, dense, *program.args)


def close(got, want, tolerance: float) -> None:
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        assert g.shape == w.shape
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.linalg.norm(g - w) <= tolerance * np.linalg.norm(w) + 1e-12


@pytest.mark.parametrize("name", PROGRAMS)
def test_int8_weights_give_what_the_dequantized_ones_give(name: str) -> None:
    program = PROGRAMS[name]
    qparams, report, _ = run(program, program.params, jq.w8a16())
    # two int8 limbs hold an activation to 2^-15 of its row's largest value
    close(*both(program, qparams), 2e-2 if program.rounds else 5e-4)
    met = {event.primitive for event in report.events if event.kind == "dequantized"}
    assert met <= set(program.dequantized)


@pytest.mark.parametrize("name", PROGRAMS)
def test_w8a8_contracts_on_int8_and_stays_close_to_float(name: str) -> None:
    program = PROGRAMS[name]
    qparams, _, call = run(program, program.params, jq.w8a8())
    text = inlined(call.lower(qparams, *program.args).as_text())
    assert len(INT8_DOT.findall(text)) >= program.dots
    close(*both(program, qparams, program.params), 0.04)


GROUPED = ["mlp", "transposed weight", "tied both ways", "several contracted axes", "batch axis"]
GROUPED += ["scan", "scan over the last axis", "python loop over a stack", "fused and split"]
GROUPED += ["fused and reshaped", "joined", "embedding", "experts", "convolutions", "attention"]


@pytest.mark.parametrize("name", GROUPED)
def test_groups_that_do_not_divide(name: str) -> None:
    program = PROGRAMS[name]
    recipe = jq.Recipe([jq.Rule("**", weights=jq.recipe.int6(group=12))])
    qparams, _, _ = run(program, program.params, recipe)
    close(*both(program, qparams), 2e-2 if program.rounds else 5e-4)


@pytest.mark.parametrize("fn", [changed_carry, passed_on])
def test_what_cannot_stay_quantized_is_dequantized_and_reported(fn) -> None:
    params = {"w": np.asarray(sq), "v": 2 * np.asarray(sq)}
    q = {
        k: jq.quantize(a, jq.int8().at((0,), 2), storage_last_axes=(0,)) for k, a in params.items()
    }
    served = jax.jit(lambda q, x: (jq.quantized(fn)(q, x), fn(jq.dequantize_params(q), x)))
    close(*served(q, x), 1e-6)
    events = serve(trace_call(fn, q, (x,), {}))[1]
    assert {e.kind for e in events} == {"dequantized"}
    assert {e.primitive for e in events} <= {"cond", "while", "scan"}
    assert {e.where for e in events} <= {"w", "v"}


@pytest.mark.parametrize("name", ["mlp", "scan", "tied embedding", "convolutions", "attention"])
def test_eager_agrees_with_jit(name: str) -> None:
    program = PROGRAMS[name]
    qparams, _, call = run(program, program.params, jq.w8a8())
    eager = jq.quantized(program.fn)(qparams, *program.args, **dict(program.kwargs))
    close(eager, call(qparams, *program.args), 1e-3)
