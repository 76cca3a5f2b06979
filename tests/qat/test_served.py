"""What is trained is what is served: `quantized` with what `convert` makes gives the same."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.interpret._compat import inner_jaxprs, opened
from tests.qat.programs import PROGRAMS, Many, mlp, on_integers

pytestmark = pytest.mark.usefixtures("uncontracted")


def moved(state: jq.qat.QuantState) -> jq.qat.QuantState:
    """A state some steps on: what is learned is another, some of it beyond zero."""
    rng = np.random.default_rng(5)

    def move(a: jax.Array) -> jax.Array:
        factor = rng.uniform(0.8, 1.2, a.shape) * rng.choice([1, 1, 1, -1], a.shape)
        return a * jnp.asarray(factor, a.dtype)

    return dataclasses.replace(state, learned=jax.tree.map(move, state.learned))


# Of programs that take long to compile under all their rules, the rules that are always tried.
QUICK = {
    "mlp": ("w8a8", "lsq 4", "w4a16"),
    "bfloat16": ("w8a8",),
    "layers": ("lsq 4",),
    "convolutions": ("w8a8",),
}


@functools.cache
def results(
    name: str, kinds: tuple[str, ...] | None = None
) -> tuple[Many, jq.qat.QuantState, Any, Any]:
    """A program, its state, what it gives in training, and what is served."""
    many = Many(PROGRAMS[name], kinds)
    state = moved(many.state())
    fake = jax.jit(jq.fake_quantized(many.fn, many.recipe))
    if state.ranges:
        _, state = fake(many.params, *(2 * x for x in many.args), quant_state=state)
    trained, _ = fake(many.params, *many.args, quant_state=state)
    served = jax.jit(jq.quantized(many.fn))(many.served(state), *many.args)
    return many, state, trained, served


QUICKLY = [(n, kind, QUICK.get(n)) for n, p in PROGRAMS.items() for kind in QUICK.get(n, p.kinds)]
THOROUGHLY = [
    pytest.param(name, kind, None, marks=pytest.mark.slow)
    for name in QUICK
    for kind in PROGRAMS[name].kinds
]


@pytest.mark.parametrize(("name", "kind", "kinds"), [*QUICKLY, *THOROUGHLY])
def test_served_equals_trained(name: str, kind: str, kinds: tuple[str, ...] | None) -> None:
    trained, served = (np.asarray(r[kind], np.float32) for r in results(name, kinds)[2:])
    assert np.isfinite(trained).all() and np.ptp(trained) > 0.1
    if on_integers(kind):
        np.testing.assert_array_equal(served, trained)
    else:
        assert np.abs(served - trained).max() <= 1e-5 * np.abs(trained).max()


@pytest.mark.slow
def test_convert_outside_of_a_program() -> None:
    many, state, *_ = results("decode")
    one, other = jq.convert(many.params, state, many.recipe), many.served(state)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(isinstance(one[kind]["w"], jq.QTensor) for kind in many.kinds)


def test_a_recipe_without_a_state_serves_as_ptq() -> None:
    many = Many(PROGRAMS["mlp"], ("w8a8", "w4a16"))
    trained = jax.jit(jq.fake_quantized(many.fn, many.recipe))(many.params, *many.args)
    sites = jq.trace(many.fn, many.params, *many.args)
    qparams = jax.jit(lambda p: jq.quantize_params(p, many.recipe, sites=sites)[0])(many.params)
    served = jax.jit(jq.quantized(many.fn))(qparams, *many.args)
    np.testing.assert_array_equal(served["w8a8"], trained["w8a8"])
    np.testing.assert_allclose(served["w4a16"], trained["w4a16"], rtol=0, atol=1e-5)
    exact = mlp(many.params["w8a8"], *many.args)
    error = np.linalg.norm(exact - trained["w8a8"]) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.03


@pytest.mark.parametrize("name", PROGRAMS)
def test_contractions_are_the_same(name: str) -> None:
    """In the same order, of the same types; only how a weight lies may differ."""
    many = Many(PROGRAMS[name])
    state = jax.eval_shape(many.state)
    fake = jq.fake_quantized(many.fn, many.recipe)
    trained = jax.make_jaxpr(fake)(many.params, *many.args, quant_state=state)
    qparams = jax.eval_shape(many.served, state)
    served = jax.make_jaxpr(jq.quantized(many.fn))(qparams, *many.args)
    assert contractions(served) == contractions(trained) != []


def contractions(jaxpr: Any) -> list[str]:
    """All products and convolutions of a program: types, and how many terms a sum has."""
    found = []
    for eqn in opened(jaxpr)[0].eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            left, right = (v.aval for v in eqn.invars)
            terms = ""
            if eqn.primitive.name == "dot_general":
                summed = eqn.params["dimension_numbers"][0][0]
                terms = f" over {math.prod(left.shape[a] for a in summed)}"
            types = f"{left.dtype}, {right.dtype} -> {eqn.outvars[0].aval}"
            found.append(f"{eqn.primitive}: {types}{terms}")
        for inner in inner_jaxprs(eqn):
            found += contractions(inner)
    return found


def test_params_that_a_program_closes_over() -> None:
    many = Many(PROGRAMS["decode"], ("lsq 4",))
    y, served = jax.jit(lambda: _trained_and_served(many))()
    np.testing.assert_array_equal(served["lsq 4"], y["lsq 4"])


def _trained_and_served(many: Many) -> tuple[Any, Any]:
    state = jq.init_quant_state(many.fn, many.params, many.recipe, *many.args)
    y, _ = jq.fake_quantized(many.fn, many.recipe)(many.params, *many.args, quant_state=state)
    qparams = jq.convert(many.params, state, many.recipe)
    return y, jq.quantized(many.fn)(qparams, *many.args)
