"""A transformer with all that models are made of: on integers everywhere, float left alone."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import linen
from tests.linen.models import Transformer, contractions, error, intercepted, same

MODEL, RECIPE = Transformer(), jq.w8a8()
TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)

# Of a scanned layer: query, key, value, out, scores, values, gate, up, down. Then last and attend.
CONTRACTIONS = 9 + 2


@pytest.fixture(scope="module")
def variables() -> Any:
    return jax.jit(MODEL.init)(jax.random.key(0), TOKENS)


@pytest.fixture(scope="module")
def qvariables(variables: Any) -> Any:
    return jq.ptq(MODEL.apply, variables, RECIPE, TOKENS)[0]


@pytest.fixture(scope="module")
def exact(variables: Any) -> Any:
    return jax.jit(MODEL.apply)(variables, TOKENS)


DOORS = {
    "function": jq.quantized(MODEL.apply),
    "model": linen.quantized(MODEL).apply,
    "interceptor": intercepted(MODEL),
}


@pytest.mark.parametrize("platforms", [("cpu",), ("cuda",), ("tpu",), ("cpu", "cuda", "tpu")])
@pytest.mark.parametrize("door", DOORS)
def test_every_contraction_is_on_integers(
    qvariables: Any, door: str, platforms: tuple[str, ...]
) -> None:
    exported = jax.export.export(jax.jit(DOORS[door]), platforms=platforms)(qvariables, TOKENS)
    kinds = contractions(exported.mlir_module())
    assert set(kinds) == {("i8", "i8")}
    # what differs by platform is there more than once in a program for several
    assert len(kinds) == CONTRACTIONS or len(platforms) > 1 <= CONTRACTIONS < len(kinds)


@pytest.mark.parametrize("recipe", [jq.w8a16(), jq.w4a16(group=24), jq.w4a8(group=24), jq.nf4()])
def test_every_weight_is_stored_quantized(variables: Any, exact: Any, recipe: jq.Recipe) -> None:
    qvariables, report = jq.ptq(MODEL.apply, variables, recipe, TOKENS)
    stored = {leaf.path.removeprefix("params/") for leaf in report.leaves if leaf.quantized}
    attention = {
        f"layers/MultiHeadDotProductAttention_0/{name}/kernel"
        for name in ("query", "key", "value", "out")
    }
    own = {"layers/gate", "layers/up", "layers/down/kernel", "last", "embed/embedding"}
    assert stored == own | attention
    assert not [event for event in report.events if event.kind == "dequantized"]
    y = jax.jit(jq.quantized(MODEL.apply))(qvariables, TOKENS)
    assert error(y, exact) < (0.02 if recipe.name == "w8a16" else 0.35)


@pytest.mark.parametrize("first", ["float", "quantized"])
def test_float_results_do_not_change(variables: Any, qvariables: Any, first: str) -> None:
    """`project` is a jitted helper: its cache must not carry one call's way into the other's."""
    jax.clear_caches()
    doors = iter([*DOORS.values(), intercepted(MODEL, RECIPE)])

    def run(kind: str) -> Any:
        if kind == "float":
            return jax.jit(lambda v, t: MODEL.apply(v, t))(variables, TOKENS)
        door = next(doors)
        return jax.jit(lambda v, t: door(v, t))(qvariables, TOKENS)

    runs: dict[str, list[Any]] = {"float": [], "quantized": []}
    order = ["float", "quantized", "quantized", "float", "quantized"]
    for kind in order if first == "float" else order[1:]:
        runs[kind].append(run(kind))
    for results in runs.values():
        assert all(same(y, results[0]) for y in results)
    assert 0 < error(runs["quantized"][0], runs["float"][0]) < 0.05
