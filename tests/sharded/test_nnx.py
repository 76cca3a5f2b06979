"""`jaxquant.nnx` with sharded parameters."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType

import jaxquant as jq
import jaxquant.nnx


def test_sharded_parameters():
    x = jax.random.normal(jax.random.key(1), (4, 64))
    mesh = jax.make_mesh((4,), ("m",), axis_types=(AxisType.Auto,))
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "m"))
    with jax.set_mesh(mesh):
        model = nnx.Linear(64, 32, kernel_init=init, rngs=nnx.Rngs(0))
        qmodel, _ = jq.nnx.ptq(model, jq.w8a8(), x)
        kernel = qmodel.model.kernel.get_raw_value()
        assert kernel.codes.addressable_shards[0].data.size == 64 * 32 // 4
        assert kernel.scale.addressable_shards[0].data.size == 32 // 4
        assert qmodel.model.kernel.out_sharding == (None, "m")
        got, want = nnx.jit(lambda model, x: model(x))(qmodel, x), model(x)
        assert float(jnp.linalg.norm(got - want)) < 0.03 * float(jnp.linalg.norm(want))
