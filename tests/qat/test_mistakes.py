"""What training refuses, and in what words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import PerChannel, PerTensor, QSpec, Rule, Schedule, ste
from jaxquant.qtensor import Gradients
from tests.arrays import normal
from tests.qat.programs import (
    LSQ,
    rule,
    tensor,
    weights,
)

GRID = tensor("int8")
SIXTEEN = QSpec(jq.numerics.codebook_format(range(-8, 8), name="sixteen"), PerTensor())
PARAMS = {"a": weights(0, 16, 8, fan=16), "b": weights(1, 8, 4, fan=8)}
X = normal(2, 5, 16)


def fn(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["a"]) @ p["b"]


LEARNS = jq.Recipe([Rule("**", weights=jq.int4(), activations=tensor("int4"), **LSQ)])
STATIC = jq.Recipe([rule("moving average")])


@pytest.fixture(scope="module")
def state() -> jq.qat.QuantState:
    return jq.init_quant_state(fn, PARAMS, LEARNS, X)


def raises(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


UNTRAINABLE: dict[str, tuple[Any, str]] = {
    "requantize": (jq.w8a8_integer(), r"integer results have no gradient; train without requant"),
    "histograms": (
        jq.w8a8_static(jq.observers.mse()),
        r"mse.* cannot follow activations under jit; use jq\.observers\.moving_average\(\)",
    ),
    "a scale for each channel": (
        jq.w8a8_static(per_channel=True),
        r"a scale for each channel of an activation is not trained; use .*axis=None",
    ),
    "static attention": (
        jq.w8a8_static(jq.observers.minmax(), attention=True),
        r"attention is trained with ranges found at run time; leave the observer out",
    ),
    "not a recipe": (jq.w8a8, r"expected a Recipe"),
}


@pytest.mark.parametrize("name", UNTRAINABLE)
def test_recipes_that_cannot_be_trained(name: str) -> None:
    recipe, message = UNTRAINABLE[name]
    raises(rf"^fake_quantized: .*{message}", lambda: jq.fake_quantized(fn, recipe))
    raises(rf"^init_quant_state: .*{message}", lambda: jq.init_quant_state(fn, PARAMS, recipe, X))


def test_before_the_call(state: jq.qat.QuantState) -> None:
    raises(r"expected a function of params first, got dict", lambda: jq.fake_quantized({}, LEARNS))
    raises(
        r"schedule: expected a jq\.Schedule, got 100",
        lambda: jq.fake_quantized(fn, LEARNS, schedule=100),
    )
    raises(
        r"freezes BatchNorm at step 4; pass frozen=",
        lambda: jq.fake_quantized(fn, LEARNS, schedule=Schedule(freeze_batchnorm=4)),
    )
    raises(
        r"bits end at 8, and the recipe has 4: .* add \(1, 4\) or later",
        lambda: jq.fake_quantized(fn, LEARNS, schedule=Schedule(bits=((0, 8),))),
    )


STATEFUL = {
    "weights": (Rule("**", weights=jq.int4(), weight_estimator=ste.lsq()), r"a: LSQ\(\) learns;"),
    "activations": (
        Rule("**", weights=jq.int8(), activations=GRID, activation_estimator=ste.pact()),
        r"a: PACT\(\) learns;",
    ),
    "observer": (rule("minmax"), r"a: its rule has an observer;"),
    "gradients": (rule("int8 gradients"), r"a: gradients are rounded at random, by a key;"),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_state_is_missing(name: str) -> None:
    recipe, why = STATEFUL[name]
    message = rf"^fake_quantized: {why}.* jaxquant\.init_quant_state\(fn, params, recipe, \*args\)"
    raises(message, lambda: jq.fake_quantized(fn, recipe)(PARAMS, X))


def test_what_needs_none() -> None:
    scheduled = jq.fake_quantized(fn, jq.w8a8(), schedule=Schedule(start=3))
    raises(r"a schedule counts steps; make a state", lambda: scheduled(PARAMS, X))
    raises(
        r"^fake_quant_params: a: .*LSQ.* learns; pass quant_state=",
        lambda: jq.qat.fake_quant_params(PARAMS, LEARNS, sites=jq.trace(fn, PARAMS, X)),
    )
    nearest = jq.int8_training(Gradients(stochastic=False))
    assert jax.eval_shape(jq.fake_quantized(fn, nearest), PARAMS, X).shape == (5, 4)


def test_a_state_of_something_else(state: jq.qat.QuantState) -> None:
    other = jq.Recipe([Rule("**", weights=jq.int8(), activations=tensor("int4"), **LSQ)])
    both = r"the state was made for another recipe: got Rule\(.*int8.* instead of Rule\(.*int4.*"
    more = jq.Recipe([*LEARNS, Rule("c", skip=True)])
    calls: list[tuple[str, Callable[..., Any]]] = [
        ("convert", lambda p, recipe, state: jq.convert(p, state, recipe)),
        (
            "fake_quantized",
            lambda p, recipe, state: jq.fake_quantized(fn, recipe)(p, X, quant_state=state),
        ),
    ]
    for where, call in calls:
        raises(rf"^{where}: {both}served by another", lambda call=call: call(PARAMS, other, state))
        raises(
            rf"^{where}: quant_state: expected what jaxquant\.init_quant_state returns, got dict",
            lambda call=call: call(PARAMS, LEARNS, {}),
        )
        wide = {"a": weights(0, 16, 12, fan=16), "b": weights(1, 12, 4, fan=8)}
        raises(
            rf"^{where}: the state was made for other params: a: expected float32\[16, 8\], got "
            r"float32\[16, 12\]; b: ",
            lambda call=call, wide=wide: call(wide, LEARNS, state),
        )
        half = {**PARAMS, "b": PARAMS["b"].astype(jnp.bfloat16)}
        raises(
            rf"{where}: .*b: expected float32\[8, 4\], got bfloat16\[8, 4\]$",
            lambda call=call, half=half: call(half, LEARNS, state),
        )
        raises(
            rf"{where}: .*c is unknown",
            lambda call=call: call({**PARAMS, "c": jnp.ones(3)}, LEARNS, state),
        )
    raises(r"b is missing", lambda: jq.convert({"a": PARAMS["a"]}, state, LEARNS))
    counts = r"got 2 rules instead of 1"
    raises(counts, lambda: jq.convert({**PARAMS, "c": jnp.ones(3)}, state, more))
    y, after = jax.eval_shape(jq.fake_quantized(fn, LEARNS), PARAMS, X, quant_state=state)
    assert y.shape == (5, 4) and after.layout == state.layout


def test_a_site_that_the_example_did_not_have() -> None:
    state = jq.init_quant_state(
        lambda p, x: x @ p["a"] + p["b"].sum(),
        PARAMS,
        jq.Recipe(
            [rule("moving average", "a"), Rule("b", weights=jq.int8(granularity=PerTensor()))]
        ),
        X,
    )
    assert len(state.ranges) == 1
    seen = jq.Recipe([rule("moving average")])
    first = jq.init_quant_state(fn, PARAMS, seen, X)
    again = jq.fake_quantized(lambda p, x: fn(p, x) @ p["b"].T, seen)
    raises(
        r"the call observes .*b.*, for which the state has no range; make the state with an exam",
        lambda: again(PARAMS, X, quant_state=first),
    )


def test_params_that_are_quantized(state: jq.qat.QuantState) -> None:
    qparams = {**PARAMS, "a": jq.quantize(PARAMS["a"], QSpec("int8", PerChannel(1)))}
    message = r"a: expected float params, got <?QTensor"
    raises(rf"^convert: {message}", lambda: jq.convert(qparams, state, LEARNS))
    raises(rf"^init_quant_state: {message}", lambda: jq.init_quant_state(fn, qparams, LEARNS, X))
    raises(rf"^fake_quantized: {message}", lambda: jq.fake_quantized(fn, jq.w8a8())(qparams, X))


def with_step(state: jq.qat.QuantState, what: str, path: str, change: Any) -> jq.qat.QuantState:
    learned = jax.tree.map(lambda a: a, state.learned)
    learned[what][path]["step"] = change(learned[what][path]["step"])
    return dataclasses.replace(state, learned=learned)


def test_what_is_not_finite(state: jq.qat.QuantState) -> None:
    params = {**PARAMS, "b": PARAMS["b"].at[1, 2].set(np.nan).at[0, 0].set(np.inf)}
    weights_bad = r"expected finite weights, got NaN or infinity in b \(2 of 32 values\)"
    raises(weights_bad, lambda: jq.init_quant_state(fn, params, LEARNS, X))
    raises(weights_bad, lambda: jq.convert(params, state, LEARNS))
    raises(
        r"^init_quant_state: 'a.*': the example gives values that are not finite",
        lambda: jq.init_quant_state(fn, PARAMS, LEARNS, X.at[0, 0].set(np.nan)),
    )
    raises(
        r"^init_quant_state: 'a:lhs': the example gives values that are not finite",
        lambda: jq.init_quant_state(fn, PARAMS, STATIC, X.at[0, 0].set(np.inf)),
    )
    for what, path in (("weights", "b"), ("activations", "a")):
        broken = with_step(state, what, path, lambda s: s * np.nan)
        raises(
            rf"^convert: {what}/{path}/step: the learned array is not finite; take the state of an",
            lambda broken=broken: jq.convert(PARAMS, broken, LEARNS),
        )


def test_estimators_that_do_not_fit_a_leaf() -> None:
    bad = Rule("**", weights=jq.int4(), weight_estimator=ste.kmeans())
    raises(
        r"^init_quant_state: a: kmeans takes PerTensor\(\) and a codebook format",
        lambda: jq.init_quant_state(fn, PARAMS, bad, X),
    )
    codebook = Rule("**", weights=SIXTEEN, weight_estimator=ste.kmeans())
    sites = jq.trace(fn, PARAMS, X)
    raises(
        r"^fake_quant_params: a: KMeans\(.*\) learns; pass quant_state=",
        lambda: jq.qat.fake_quant_params(PARAMS, codebook, sites=sites),
    )


def test_frozen_of_another_result(state: jq.qat.QuantState) -> None:
    schedule = Schedule(freeze_batchnorm=1)
    for other in (lambda p, x: fn(p, x)[:2], lambda p, x: (fn(p, x), None)):
        fake = jq.fake_quantized(fn, LEARNS, schedule=schedule, frozen=other)
        raises(
            r"^fake_quantized: frozen: expected a result like fn's",
            lambda fake=fake: fake(PARAMS, X, quant_state=state),
        )
