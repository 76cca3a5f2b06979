"""8-bit optimizer states of sharded parameters: placed like these, and equal to unsharded ones."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.optim import adam8bit
from tests.optim.test_quantize_state import close, normal, stepped


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded(kind) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    # 1024 / 4 is a whole block, 600 / 4 is none
    params = {"even": normal(16, 1024), "odd": normal(16, 600, seed=1)}
    want, want_state = stepped(adam8bit(0.1), params)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, P("data", "model")))
        got, state = stepped(adam8bit(0.1), placed)
    # A rounding (2^-23) crosses the bound of a cell (1.4 % wide) for one value in 60,000; were it
    # one in 1,000, moments would differ by a cell there: 0.014 sqrt(1e-3) of the whole.
    close(got, want, rtol=0.014 * 1e-3**0.5)
    for leaf in params:
        codes = state[0].mu[leaf].codes
        assert codes.sharding.is_equivalent_to(placed[leaf].sharding, 2), leaf
        mine, theirs = np.asarray(codes), np.asarray(want_state[0].mu[leaf].codes)
        assert np.mean(mine != theirs) < 1e-3
