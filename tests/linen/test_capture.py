"""The `quant` collection: statistics as Linen variables."""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import linen
from jaxquant.capture import Statistics, capture
from jaxquant.observers import minmax, moving_average
from tests.linen.models import Scanned

STATIC = jq.int8(granularity=jq.PerTensor())


class Net(nn.Module):
    """Attention, and layers in a scan."""

    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(2, name="attn")(x, x)
        return Scanned(name="body")(x)


class Stateful(nn.Module):
    """Batch statistics and random numbers."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))
        return nn.Dense(4)(nn.Dropout(0.5, deterministic=False)(x))


RECIPE = jq.Recipe(
    [jq.Rule("**", weights=jq.int8(), activations=STATIC, attention=STATIC, observer=minmax())]
)
MODEL = Net()
QMODEL = linen.quantized(MODEL, RECIPE)
GIVEN = [jax.random.normal(jax.random.key(n), (2, 5, 32)) for n in range(3)]


@pytest.fixture(scope="module")
def variables() -> Any:
    return jax.jit(MODEL.init)(jax.random.key(9), GIVEN[0])


def assert_same(a: Statistics, b: Statistics) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), a, b)


def test_apply_records_and_adds_up_as_capture_does(variables: Any) -> None:
    @jax.jit
    def step(variables: Any, x: Any) -> Any:
        return QMODEL.apply(variables, x, mutable=["quant"]), MODEL.apply(variables, x)

    seen: dict = {}
    for x in GIVEN:
        (y, seen), plain = step({**variables, **seen}, x)
        np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-5)
    stats = QMODEL.statistics({**variables, **seen}, GIVEN[0])
    assert_same(stats, capture(MODEL.apply, variables, RECIPE, batches=iter(GIVEN)))
    assert stats["params/body/ScanCheckpointBlock_0/Dense_0/kernel"]["lhs"].lead == (3,)
    shared = [stats[f"params/attn/{name}/kernel"]["lhs"] for name in ("query", "key", "value")]
    assert shared[0] is shared[1] is shared[2]
    assert set(stats["attn"]) == set(stats["attn#1"]) == {"lhs", "rhs"}


def test_the_interceptor_records_and_other_collections_are_updated() -> None:
    model, x = Stateful(), GIVEN[0][0]
    rngs = {"params": jax.random.key(3), "dropout": jax.random.key(4)}
    variables = jax.jit(model.init)(rngs, x)
    qmodel = linen.quantized(model, RECIPE)

    def intercepted(variables: Any, x: Any) -> Any:
        with nn.intercept_methods(linen.interceptor(RECIPE)):
            return model.apply(variables, x, rngs=rngs, mutable=["batch_stats", "quant"])

    @jax.jit
    def both(variables: Any, x: Any) -> Any:
        first = intercepted(variables, x)
        held = {**variables, "quant": first[1]["quant"]}
        return (
            first,
            intercepted(held, 2 * x)[1]["quant"],
            qmodel.apply(variables, x, rngs=rngs, mutable=["batch_stats", "quant"]),
            model.apply(variables, x, rngs=rngs, mutable=["batch_stats"]),
        )

    (y, seen), more, applied, (plain, kept) = both(variables, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), (y, seen), applied)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(close, (y, seen["batch_stats"]), (plain, kept["batch_stats"]))
    state, later = (q["sites"]["params/Dense_0/kernel"]["lhs"] for q in (seen["quant"], more))
    assert (seen["quant"]["batches"], more["batches"]) == (1, 2)
    np.testing.assert_allclose(later["max"], 2 * state["max"])


def test_a_collection_that_is_not_mutable_is_of_no_effect() -> None:
    model, x = nn.Dense(8), GIVEN[0][0]
    dynamic = linen.quantized(model, jq.w8a8())
    recording = linen.quantized(model, RECIPE)
    variables = model.init(jax.random.key(0), x)
    _, seen = recording.apply(variables, x, mutable="quant")
    held = {**variables, **seen}
    np.testing.assert_array_equal(dynamic.apply(held, x), dynamic.apply(variables, x))
    with nn.intercept_methods(linen.interceptor(jq.w8a8())):
        np.testing.assert_array_equal(model.apply(held, x), model.apply(variables, x))
    own = {**variables, "quant": {"scale": jnp.ones(())}}  # some other library's
    assert model.apply(own, x, mutable=["quant"])[1] == {"quant": {"scale": 1.0}}
    assert "quant" in dynamic.apply(own, x, mutable=["quant"])[1]


def test_mistakes() -> None:
    model, x = nn.Dense(8), GIVEN[0][0]
    variables = model.init(jax.random.key(0), x)
    qmodel = linen.quantized(model, RECIPE)
    with pytest.raises(ValueError, match="there is no 'quant' collection; expected variables"):
        qmodel.statistics(variables, x)
    _, seen = qmodel.apply(variables, x, mutable=["quant"])
    with pytest.raises(ValueError, match="there is no recipe"):
        linen.quantized(model).statistics({**variables, **seen}, x)
    other = linen.quantized(nn.Sequential([model, nn.Dense(4)]), RECIPE)
    theirs = other.init(jax.random.key(0), x)
    missing = r"'params/layers_0/kernel:lhs' is missing; .*'params/kernel:lhs' is unknown"
    with pytest.raises(ValueError, match=f"has statistics of other sites: {missing}"):
        other.apply({**theirs, **seen}, x, mutable=["quant"])
    rule = jq.Rule("**", weights=jq.int8(), activations=STATIC, observer=moving_average())
    with pytest.raises(ValueError, match=r"'params/kernel:lhs': expected.*low.*got.*min"):
        linen.quantized(model, rule).apply({**variables, **seen}, x, mutable=["quant"])
    _, bad = qmodel.apply(variables, x * jnp.nan, mutable=["quant"])
    with pytest.raises(ValueError, match="'params/kernel:lhs' had NaN or infinity in 1 of its"):
        qmodel.statistics({**variables, **bad}, x)


def test_ptq_takes_the_collection() -> None:
    model, x = nn.Dense(8), GIVEN[0][0]
    rule = jq.Rule("**", weights=jq.int8(), activations=STATIC, observer=minmax())
    qmodel = linen.quantized(model, rule)
    variables = model.init(jax.random.key(0), x)
    _, seen = qmodel.apply(variables, x, mutable=["quant"])
    by_collection, _ = linen.ptq(model, {**variables, **seen}, rule, x)
    by_batches, _ = linen.ptq(model, variables, rule, batches=[x])
    assert jax.tree.structure(by_collection) == jax.tree.structure(by_batches)
    chex.assert_trees_all_equal(by_collection, by_batches)
    assert by_collection["params"]["kernel"].calibration is not None


def test_a_collection_that_nothing_would_fill_is_refused() -> None:
    model, x = nn.Dense(8), GIVEN[0][0]
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"linen: mutable: 'quant': no rule of <Recipe w8a8: 1 r"):
        linen.quantized(model, jq.w8a8()).apply(variables, x, mutable=["quant"])
    with (
        nn.intercept_methods(linen.interceptor(jq.w8a8())),
        pytest.raises(ValueError, match="has an observer"),
    ):
        model.apply(variables, x, mutable=["quant"])
