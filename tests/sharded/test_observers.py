"""Observers of sharded arrays."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.observers import absmax, profile
from tests.observers.cases import OBSERVERS, same


@pytest.mark.parametrize("placed", [P("d"), P(None, None, "d")])
def test_sharded_arrays(placed):
    """Explicit axes, kept ones among them: the state is that of one device, on all of them."""
    x = np.random.default_rng(4).normal(size=(4, 3, 8)).astype(np.float32)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    for observer in (absmax(-1), OBSERVERS["histogram"](axis=-1), profile(bins=64)):

        @jax.jit
        def seen(x, observer=observer):
            return observer.update(observer.init(x), x)

        with jax.set_mesh(mesh):
            state = seen(jax.device_put(x, NamedSharding(mesh, placed)))
        assert all(value.sharding.is_fully_replicated for value in state.values())
        same(state, seen(x))
