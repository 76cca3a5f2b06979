"""`jaxquant.nnx.capture`: statistics of an NNX model's activations."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
import jaxquant.nnx
from jaxquant.capture import CaptureError
from jaxquant.observers import minmax
from tests.test_nnx import Scanned

STATIC = jq.int8(granularity=jq.PerTensor())


class Net(nnx.Module):
    """Batch statistics and random state beside the parameters, and layers in a scan."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.body = Scanned(rngs)

    def __call__(self, x):
        return self.body(self.drop(self.norm(x)))

    def head(self, x):
        return self.body.layers.up.kernel[0].T @ x.T


GIVEN = [jax.random.normal(jax.random.key(n), (2, 5, 64)) for n in range(2)]


def test_layers_have_statistics_of_their_own_and_the_model_stays_as_it_is(tmp_path: Any) -> None:
    model = Net(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Not(nnx.RngState)))
    path = tmp_path / "stats.npz"
    stats = jq.nnx.capture(model, minmax(), batches=((x,) for x in GIVEN), save=path)
    after = nnx.state(model, nnx.Not(nnx.RngState))
    chex.assert_trees_all_equal(after, before)
    assert model.drop.rngs.count[...] == 0
    kernels = ("attn/query", "attn/key", "attn/value", "attn/out", "up", "down")
    names = ("body/layers/attn", "body/layers/attn#1")
    assert set(stats) == {*names, *(f"body/layers/{k}/kernel" for k in kernels)}
    assert all(seen.lead == (3,) for key in stats for seen in stats[key].values())
    queries = [
        stats[f"body/layers/attn/{name}/kernel"]["lhs"] for name in ("query", "key", "value")
    ]
    assert queries[0] is queries[1] is queries[2]
    assert stats.batches == 2
    again = jq.nnx.capture(model, minmax(), batches=GIVEN, resume=path)
    chex.assert_trees_all_equal(again, stats)


def test_statistics_or_batches_make_a_static_model() -> None:
    rule = jq.Rule("**", weights=jq.int8(), activations=STATIC, observer=minmax())
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    x = GIVEN[0][0]
    stats = jq.nnx.capture(model, rule, batches=[x])
    by_stats, _ = jq.nnx.ptq(model, rule, x, stats=stats)
    by_batches, _ = jq.nnx.ptq(model, rule, batches=iter([(x,)]))
    grids = [m.model.kernel.get_raw_value().calibration.input for m in (by_stats, by_batches)]
    chex.assert_trees_all_equal(*grids)
    np.testing.assert_allclose(by_stats(x), model(x), atol=0.05)


def test_another_method_a_quantized_model_and_mistakes() -> None:
    model = Net(nnx.Rngs(0))
    x = GIVEN[0][0]
    stats = jq.nnx.capture(model, minmax(), batches=[x], method="head")
    ((key, operands),) = stats.items()
    assert key == "body/layers/up/kernel"
    np.testing.assert_allclose(stats.finish(key, "rhs", STATIC).high, x.max())
    assert list(operands) == ["rhs"]
    qmodel, _ = jq.nnx.ptq(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), jq.w8a8(), x)
    seen = jq.nnx.capture(qmodel, minmax(), batches=[x])
    np.testing.assert_allclose(seen.finish("kernel", "lhs", STATIC).low, x.min())
    with pytest.raises(ValueError, match=r"nnx.capture: expected an nnx.Module, got function"):
        jq.nnx.capture(lambda x: x, minmax(), batches=[x])
    with pytest.raises(ValueError, match=r"nnx.capture: Net has no method 'tail'"):
        jq.nnx.capture(model, minmax(), batches=[x], method="tail")
    with pytest.raises(ValueError, match=r"nnx.capture: no batches"):
        jq.nnx.capture(model, minmax(), batches=[])
    with pytest.raises(CaptureError, match=r"nnx.capture: batch 0: NaN or infinity in .*'kernel'"):
        jq.nnx.capture(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), minmax(), batches=[x * jnp.nan])
