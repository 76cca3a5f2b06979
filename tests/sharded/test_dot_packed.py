"""The kernel for packed 4-bit codes on several devices: each runs it on its own rows."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from tests.ops.test_dot_packed import FORMATS, kernel, operands


def test_inside_shard_map():
    x, q = operands(FORMATS["int4"], 8, 128, 32, jnp.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.sharding.PartitionSpec("data")
    whole = jax.sharding.PartitionSpec()
    call = jax.shard_map(
        kernel("tpu"), mesh=mesh, in_specs=(split, whole), out_specs=split, check_vma=False
    )
    np.testing.assert_allclose(jax.jit(call)(x, q), kernel("tpu")(x, q), rtol=1e-5, atol=1e-5)
