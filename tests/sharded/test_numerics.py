"""Codes of sharded values."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxquant.numerics import encode, get


@pytest.mark.parametrize("name", ["int4", "float8_e4m3fn", "float8_e8m0fnu", "nf4"])
def test_a_key_gives_the_same_codes_however_values_are_split(name, key):
    x = np.random.default_rng(0).lognormal(size=(8, 16)).astype(np.float32)

    def run(x):
        return encode(x, get(name), key=key)

    eager = np.asarray(run(x))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    for spec in (PartitionSpec("d"), PartitionSpec(None, "d")):
        sharded = jax.device_put(x, NamedSharding(mesh, spec))
        np.testing.assert_array_equal(np.asarray(jax.jit(run)(sharded)), eager)
