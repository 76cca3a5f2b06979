"""Mistakes, each told before long work or with what was gathered until then."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from jaxquant.capture import CaptureError, Statistics, capture
from jaxquant.observers import absmax, minmax
from tests.capture.programs import PROGRAMS, batches, branches, dense, loop, normal

PARAMS = PROGRAMS["dense"].params
X = jnp.ones((4, 8))
STATIC = jq.int8(granularity=jq.PerTensor())


def rule(pattern: str, **kwargs: Any) -> jq.Rule:
    return jq.Rule(pattern, weights=jq.int8(), activations=STATIC, **kwargs)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no batches"),
        (iter(()), "no batches"),
        (X, "expected an iterable of batches.*got ArrayImpl"),
        ({"x": X}, "expected an iterable of batches.*got dict"),
        ([X, (X,), X[:2]], r"batch 2: argument 0: expected float32\[4, 8\] as in batch 0, got .*2"),
        ([X, X.astype(jnp.bfloat16)], r"batch 1: argument 0: expected float32.*got bfloat16"),
        ([X, {"x": X}], r"batch 1: argument 0: .*got nothing"),
        ([(X, 1.0), (X, 2.0)], r"batch 1: argument 1: expected 1.0 as in batch 0, got 2.0"),
        ([({"a": X},), ({"b": X},)], r"batch 1: argument 0/a: expected.*got nothing"),
    ],
)
def test_batches_are_alike(given: Any, message: str) -> None:
    def fn(p: Any, x: Any, scale: float = 1.0) -> Any:
        return dense(p, x["a"] if isinstance(x, dict) else x) * scale

    with pytest.raises(ValueError, match=f"(?s)^capture: .*{message}"):
        capture(fn, PARAMS, absmax(), batches=given)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (jq.w8a8(), "no rule of <Recipe w8a8: 1 rule> has an observer"),
        (absmax, r"got the function absmax; call it: jq\.observers\.absmax\(\)"),
        (None, "expected a Recipe.*got None"),
        (
            [rule("c", observer=absmax()), rule("**", observer=absmax())],
            "rule 'c' has an observer and matches no site; there are: a, b",
        ),
        (
            [rule("**"), rule("a", observer=absmax())],
            "rule 'a' has an observer and decides no site",
        ),
        (
            [rule("*", observer=absmax()), jq.Rule("a", attention=STATIC, observer=absmax())],
            "rule 'a' has an observer and decides no contraction of two activations",
        ),
    ],
)
def test_rules_have_observers_and_match(recipe: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        capture(dense, PARAMS, recipe, batches=[X])


def test_a_function_that_contracts_nothing() -> None:
    with pytest.raises(ValueError, match="capture: the function contracts no activations"):
        capture(lambda p, x: x + p["a"].sum(), PARAMS, absmax(), batches=[X])
    with pytest.raises(ValueError, match="capture: expected a function of params first, got dict"):
        capture(PARAMS, dense, absmax(), batches=[X])


def test_what_is_not_finite_names_site_and_batch_and_loses_nothing(tmp_path: Any) -> None:
    given = [*batches(4, 8), X.at[1, 2].set(jnp.nan)]
    path = tmp_path / "stats.npz"
    with pytest.raises(CaptureError, match=r"batch 3: NaN or inf.* of 'a' \(lhs\)") as caught:
        capture(dense, PARAMS, minmax(), batches=given, save=path)
    expected = capture(dense, PARAMS, minmax(), batches=given[:3])
    for kept in (caught.value.statistics, Statistics.load(path)):
        assert kept.batches == 3
        chex.assert_trees_all_equal(kept, expected)
    inner = {"a": PARAMS["a"], "b": PARAMS["b"].at[0, 0].set(jnp.inf)}
    with pytest.raises(CaptureError, match=r"batch 0: NaN or inf.* of 'b#1' \(lhs\); the"):
        capture(
            lambda p, x: dense(p, x) @ p["b"], inner, rule("b", observer=minmax()), batches=given
        )


def test_a_site_that_no_batch_reaches_is_named_with_its_layer() -> None:
    program = PROGRAMS["branches"]
    with pytest.raises(CaptureError, match=r"no batch reaches no \(lhs\); add samples") as caught:
        capture(branches, program.params, minmax(), batches=[jnp.abs(program.batches[0])])
    assert caught.value.statistics["out"]["lhs"].state["updates"] == 1

    def some_layers(p: Any, x: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            kernel, used = w
            return lax.cond(used, lambda: jnp.tanh(x @ kernel), lambda: x), None

        return lax.scan(layer, x, (p["w"], jnp.array([True, False, True])))[0]

    with pytest.raises(CaptureError, match=r"no batch reaches w \(lhs\)"):
        capture(some_layers, {"w": normal(0, 3, 8, 8)}, minmax(), batches=[X])


def test_resume_wants_statistics_of_the_same_sites() -> None:
    stats = capture(dense, PARAMS, minmax(), batches=[X])
    other = {"a": PARAMS["a"], "c": PARAMS["b"]}

    def fn(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["a"]) @ p["c"]

    cases = [
        (fn, other, [X], minmax(), "of other sites: 'c' is missing; 'b' is unknown"),
        (
            dense,
            PARAMS,
            [X],
            absmax(),
            r"by another observer: 'a' lhs: expected observer absmax\(\), got minmax\(\)",
        ),
        (
            dense,
            PARAMS,
            [X[:2]],
            minmax(),
            r"of other arrays: 'a' lhs: expected shape \(2, 8\), got \(4, 8\)",
        ),
    ]
    for call, params, given, observer, message in cases:
        with pytest.raises(ValueError, match=f"capture: resume: these are statistics {message}"):
            capture(call, params, observer, batches=given, resume=stats)
    longer = dataclasses.replace(stats, batches=3)
    with pytest.raises(
        ValueError, match="resume holds statistics of 3 batches, and there is only 1"
    ):
        capture(dense, PARAMS, minmax(), batches=[X], resume=longer)
    with pytest.raises(ValueError, match="resume: expected Statistics, got dict"):
        capture(dense, PARAMS, minmax(), batches=[X], resume={})


def test_sites_out_of_which_nothing_can_be_carried() -> None:
    mesh = jax.make_mesh((1,), ("b",), (jax.sharding.AxisType.Auto,))
    split = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("b"), P()), out_specs=P("b"))
    with pytest.raises(ValueError, match="'a' is inside a shard_map, out of which statistics"):
        capture(lambda p, x: split(x, p["a"]), PARAMS, absmax(), batches=[X])
    outside = rule("b", observer=absmax())
    stats = capture(lambda p, x: split(x, p["a"]) @ p["b"], PARAMS, outside, batches=[X])
    assert list(stats) == ["b"]

    def condition(p: Any, x: Any) -> Any:
        return lax.while_loop(lambda x: (x @ p["a"]).sum() > 1e3, lambda x: x / 2 @ p["b"], x)

    with pytest.raises(ValueError, match="'a' is inside the condition of a while loop"):
        capture(condition, PARAMS, absmax(), batches=[X])


def test_a_loop_that_may_take_no_step() -> None:
    params = PROGRAMS["loop"].params
    stats = capture(loop, params, minmax(), batches=[X])
    assert stats["w"]["lhs"].state["updates"] == 5
