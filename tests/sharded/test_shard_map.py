"""Inside `shard_map`, on the parts that two devices have."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from jaxquant import capture
from jaxquant.interpret.calls import trace_call
from jaxquant.interpret.evaluate import Interpreter
from jaxquant.interpret.observe import places_of
from jaxquant.interpret.slots import SiteValues
from jaxquant.observers import absmax
from tests.arrays import normal
from tests.interpret.test_slots import Scaled

D = 8


def halved(w: Any, x: Any) -> Any:
    mesh = jax.make_mesh((2,), ("b",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    call = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("b"), P()), out_specs=P("b"))
    return call(x, w)


def test_a_site_reads_its_own_value_whole() -> None:
    params, x = {"w": normal(0, D, D)}, normal(1, 4, D)
    call = trace_call(lambda p, x: halved(p["w"], x), params, (x,), {})
    (place,) = places_of(call)

    @jax.jit
    def run(leaves: Any, value: Any) -> Any:
        interpreter = Interpreter(Scaled(), call.param_paths, SiteValues({place.slot: value}))
        return call.run(interpreter, leaves)

    got = run(call.leaves, jnp.float32(3.0))
    np.testing.assert_allclose(got, 3.0 * (x @ params["w"]), rtol=1e-5)


def test_statistics_cannot_be_carried_out() -> None:
    params, x = {"a": normal(0, D, D), "b": normal(1, D, D)}, normal(2, 4, D)
    with pytest.raises(ValueError, match="'a' is inside a shard_map, out of which statistics"):
        capture(lambda p, x: halved(p["a"], x), params, absmax(), batches=[x])
    outside = jq.Rule("b", weights=jq.int8(), activations=STATIC, observer=absmax())
    stats = capture(lambda p, x: halved(p["a"], x) @ p["b"], params, outside, batches=[x])
    assert list(stats) == ["b"]


STATIC = jq.int8(granularity=jq.PerTensor())
