"""What `capture` finds equals the ranges of a forward pass written out by hand."""

from __future__ import annotations

from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.capture import capture
from jaxquant.observers import minmax, percentile
from tests.capture.programs import PROGRAMS, L, Program, dense, normal


def by_hand(program: Program) -> dict[tuple[str, str], dict[tuple[int, ...], list[np.ndarray]]]:
    found: dict = defaultdict(lambda: defaultdict(list))
    for batch in program.batches:
        for key, operand, layer, array in program.seen(program.params, batch):
            found[key, operand][layer].append(np.asarray(array, np.float32))
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_ranges_updates_and_sharing_are_those_of_a_forward_pass_by_hand(name: str) -> None:
    program = PROGRAMS[name]
    stats = capture(program.fn, program.params, minmax(), batches=iter(program.batches))
    expected = by_hand(program)
    assert {(key, operand) for key in stats for operand in stats[key]} == set(expected)
    assert stats.batches == len(program.batches)
    tolerance = 2e-2 if name == "bfloat16" else 1e-5  # what is jitted rounds less often
    for (key, operand), layers in expected.items():
        seen = stats[key][operand]
        low, high = stats.finish(key, operand, jq.int8())
        lead = tuple(1 + max(axis) for axis in zip(*layers, strict=True))
        assert low.shape == high.shape == seen.lead == lead
        for layer, arrays in layers.items():
            values = np.concatenate([a.reshape(-1) for a in arrays])
            np.testing.assert_allclose(low[layer], min(values.min(), 0), rtol=tolerance)
            np.testing.assert_allclose(high[layer], max(values.max(), 0), rtol=tolerance)
            assert seen.shape == arrays[0].shape and seen.dtype == str(
                "bfloat16" if name == "bfloat16" else "float32"
            )
            assert np.asarray(seen.state["updates"])[layer] == len(arrays)
    for first, *others in program.shared:
        assert all(stats[key]["lhs"] is stats[first]["lhs"] for key in others)
    spared = sum(len(group) - 1 for group in program.shared)
    assert len(stats.entries) == len(expected) - spared


def test_each_rule_has_its_observer_and_other_sites_have_none() -> None:
    params = PROGRAMS["layers"].params
    spec, static = jq.int8(), jq.int8(granularity=jq.PerTensor())
    channels = jq.int8(granularity=jq.PerChannel(-1))
    recipe = jq.Recipe(
        [
            jq.Rule("layers/in", weights=spec, activations=channels, observer=minmax(axis=-1)),
            jq.Rule("layers", attention=static, observer=percentile(99.0)),
            jq.Rule("**", weights=spec, activations=spec, attention=spec),
        ]
    )
    stats = capture(PROGRAMS["layers"].fn, params, recipe, batches=PROGRAMS["layers"].batches)
    both = ["lhs", "rhs"]
    assert {k: list(stats[k]) for k in stats} == {
        "layers/in": ["lhs"],
        "layers": both,
        "layers#1": both,
    }
    assert stats.finish("layers/in", "lhs", spec).high.shape == (L, 8)
    assert stats["layers"]["lhs"].observer == percentile(99.0)


def test_where_params_are_quantized_the_inputs_that_arrive_are_seen() -> None:
    params = {"a": normal(0, 8, 8) + 1, "b": normal(1, 8, 8)}
    x = normal(2, 4, 8)
    recipe = jq.w4a16(group=8)
    qparams, _ = jq.ptq(dense, params, recipe, x)
    stats = capture(dense, qparams, minmax(), batches=[x])
    hidden = jax.jit(jq.quantized(lambda p, x: jnp.maximum(x @ p["a"], 0)))(qparams, x)
    np.testing.assert_allclose(stats.finish("b", "lhs", jq.int8()).high, hidden.max(), rtol=1e-6)
    assert abs(hidden.max() - jnp.maximum(x @ params["a"], 0).max()) > 1e-3


def test_what_comes_after_the_last_site_is_not_computed_and_a_helper_is_traced_once() -> None:
    traced = []

    def fn(p, x):
        traced.append(None)
        return dense(p, x)

    program = PROGRAMS["dense"]
    given = iter(program.batches)
    capture(fn, program.params, minmax(), batches=((batch,) for batch in given))
    assert len(traced) == 1 and next(given, None) is None
