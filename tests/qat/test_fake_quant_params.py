"""`fake_quant_params`: weights rounded, as part of any loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import PerChannel, PerTensor, QSpec, ste
from tests import reference
from tests.arrays import normal
from tests.qat.programs import (
    LEVELS,
    weights,
)

PARAMS = {
    "dense": weights(0, 16, 6, fan=16),
    "bias": normal(1, 6),
    "heads": weights(2, 4, 4, 6, fan=16),
}


def dense_and_heads(p: Any, x: Any) -> Any:
    y = x @ p["dense"] + p["bias"][None]
    return y + jnp.einsum("bhk,hkd->bd", x.reshape(-1, 4, 4), p["heads"])


@pytest.mark.parametrize("named", [False, True], ids=["sites", "axes"])
def test_fake_quant_params(named: bool) -> None:
    x, g = normal(3, 5, 16), normal(4, 5, 6)
    spec = QSpec("int4", PerChannel(-1) if named else PerChannel(), range="qmax")
    recipe = jq.Recipe([jq.Rule("bias", skip=True), jq.Rule("**", weights=spec)])
    sites = None if named else jq.trace(dense_and_heads, PARAMS, x)

    def total(params: Any, x: Any) -> Any:
        rounded = jq.qat.fake_quant_params(params, recipe, sites=sites)
        return (dense_and_heads(rounded, x) * g).sum(), rounded

    (dparams, dx), rounded = jax.jit(jax.grad(total, (0, 1), has_aux=True))(PARAMS, x)
    np.testing.assert_array_equal(rounded["bias"], PARAMS["bias"])
    for name in ("dense", "heads"):
        w = np.asarray(PARAMS[name], np.float64)
        scale, _ = reference.scales(w, spec.at(tuple(range(w.ndim - 1)), w.ndim))
        want = scale * np.clip(np.round(w / scale), -8, 7)
        np.testing.assert_allclose(rounded[name], want, rtol=0, atol=1e-6)
    want = jax.grad(lambda p, x: (dense_and_heads(p, x) * g).sum(), (0, 1))(rounded, x)
    for got, exact in zip(jax.tree.leaves((dparams, dx)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)


def test_fake_quant_params_with_a_state() -> None:
    """Learned steps and codebooks: weights as training computes with them."""
    learns = {"weights": jq.int4(), "weight_estimator": ste.lsq()}
    recipe = jq.Recipe(
        [
            jq.Rule("bias", skip=True),
            jq.Rule("dense", **learns),
            jq.Rule("heads", weights=QSpec(LEVELS, PerTensor()), weight_estimator=ste.kmeans()),
        ]
    )
    x, g = normal(3, 5, 16), normal(4, 5, 6)
    state = jq.init_quant_state(dense_and_heads, PARAMS, recipe, x)
    sites = jq.trace(dense_and_heads, PARAMS, x)

    def by_params(params: Any, learned: Any) -> Any:
        now = dataclasses.replace(state, learned=learned)
        rounded = jq.qat.fake_quant_params(params, recipe, sites=sites, quant_state=now)
        return dense_and_heads(rounded, x)

    def by_fn(params: Any, learned: Any) -> Any:
        now = dataclasses.replace(state, learned=learned)
        return jq.fake_quantized(dense_and_heads, recipe)(params, x, quant_state=now)[0]

    @jax.jit
    def both(*args: Any) -> Any:
        found = [jax.vjp(call, *args) for call in (by_params, by_fn)]
        return [(y, pull(g)) for y, pull in found]

    (y, grads), (near, same_grads) = both(PARAMS, state.learned)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(same_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    # a contraction with floats may run on two bytes of each
    np.testing.assert_allclose(y, near, rtol=0, atol=1e-4 * np.abs(y).max())
    dparams, dlearned = grads
    assert dlearned["weights"]["dense"]["step"].any() and not dparams["heads"].any()
    assert dlearned["weights"]["heads"]["codebook"].any()
