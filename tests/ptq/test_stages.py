"""The stages of `ptq`, each called by itself."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import pytest

import jaxquant as jq
from jaxquant.interpret.calls import trace_call
from jaxquant.interpret.record import sites_of
from jaxquant.params import make_plans
from jaxquant.ptq import stages
from jaxquant.ptq.state import PTQOptions, State
from tests.arrays import normal

PARAMS = {"up": normal(0, 8, 16), "down": normal(1, 16, 4)}
BATCHES = [normal(2, 16, 8), normal(3, 16, 8)]


def fn(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


def start(recipe):
    call = trace_call(fn, PARAMS, (BATCHES[0],), None)
    sites = sites_of(call)
    planned = make_plans(sorted(PARAMS.items()), recipe, sites)
    options, platforms = PTQOptions(progress=False), ("cpu",)
    return State(fn, PARAMS, recipe, call, sites, planned, BATCHES, None, options, platforms)


def changed(before, after):
    """The fields that a stage wrote."""
    names = [field.name for field in dataclasses.fields(State)]
    return {name for name in names if getattr(before, name) is not getattr(after, name)}


def written(recipe):
    """What each stage writes for a recipe, and the state after the last."""
    state, fields = start(recipe), {}
    for stage in stages.STAGES:
        new = stage(state)
        fields[stage.__name__] = changed(state, new)
        state = new
    return fields, state


def test_dynamic_activations_are_encoded_and_described() -> None:
    fields, state = written(jq.w8a8())
    assert {name: kinds for name, kinds in fields.items() if kinds} == {
        "encode": {"qparams", "report"},
        "describe": {"report"},
    }
    assert state.params is PARAMS
    assert all(isinstance(q, jq.QTensor) for q in state.qparams.values())


def test_static_activations_are_observed_before_and_calibrated_after_encoding() -> None:
    fields, state = written(jq.w8a8_integer())
    assert fields["gather"] == set()
    assert "stats" in fields["observe"]
    assert fields["encode"] == {"qparams", "report"}
    assert fields["calibrate"] >= {"qparams", "report"}
    assert fields["fuse"] == {"qparams", "report"}
    assert state.qparams["up"].calibration is not None


def test_what_looks_at_inputs_is_gathered_first() -> None:
    rule = jq.Rule("**", weights=jq.int4(), encoder=jq.gptq())
    fields, state = written(jq.Recipe((rule,)))
    assert fields["gather"] == {"encoded", "params", "absorbed"}
    assert set(state.encoded) == {"up", "down"}
    assert fields["observe"] == fields["calibrate"] == fields["fuse"] == set()
    codes = state.encoded["up"].q.codes
    assert state.qparams["up"].codes is codes


def test_ptq_is_its_stages() -> None:
    recipe = jq.w8a8_static()
    qparams, report = jq.ptq(fn, PARAMS, recipe, batches=BATCHES, progress=False)
    _, state = written(recipe)
    assert str(state.report) == str(report)
    chex.assert_trees_all_equal(state.qparams, qparams)


@pytest.mark.parametrize(("times", "where"), [(1, ""), (2, " at 2 sites")])
def test_what_is_quantized_beforehand_says_by_which_sites(times, where):
    def tied(p, x):
        for _ in range(times):
            x = jnp.tanh(x @ p["w"])
        return x

    def looped(p, x):
        return jax.lax.fori_loop(0, 2, lambda _, x: tied(p, x), x)

    params, batches = {"w": normal(4, 8, 8)}, [normal(5, 16, 8)]
    rule = jq.Rule("**", weights=jq.int4(), encoder=jq.gptq())
    _, report = jq.ptq(looped, params, rule, batches=batches, progress=False)
    assert f"calibrated on inputs of the float function{where}" in report["w"].notes
