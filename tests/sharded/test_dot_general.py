"""`dot_general` of sharded codes equals the unsharded one, and gathers no weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant import PerChannel, PerGroup, QSpec, quantize
from jaxquant.ops import dot_general
from jaxquant.qtensor import dequantize
from tests.arrays import normal
from tests.ops.cases import EXACT, LIMBS, MATRIX, K, assert_near, weights
from tests.ops.test_lowering import assert_operands_are_int8


def sharded(q, mesh, spec):
    """Codes `[n, k]` placed by `spec`, scales alike where they are not shared."""

    def put(a):
        axes = [s if n > 1 else None for s, n in zip(spec, a.shape, strict=True)]
        return jax.device_put(a, NamedSharding(mesh, P(*axes)))

    return jax.tree.map(put, q)


MESHES = [AxisType.Auto, AxisType.Explicit]
SHARDS = {
    # codes [n, k], kernel [k, n], out_sharding under an explicit mesh
    "columns": (P("model", None), P("data", None), None),
    "rows": (P(None, "model"), P("data", "model"), P("data", None)),
    "rows asked for": (P("model", None), P("data", None), P("data", "model")),
}


@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("name", ["int8", "int4 group"])
def test_sharded_equals_unsharded_and_gathers_no_weight(kind, shard, name):
    codes, activation, out = SHARDS[shard]
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    spec = QSpec("int8", PerChannel(1)) if name == "int8" else QSpec("int4", PerGroup(64, 0))
    w, x = normal(0, 512, 128), normal(1, 8, 512)
    q = quantize(w, spec, storage_last_axes=(0,))
    with jax.set_mesh(mesh):
        placed = sharded(q, mesh, codes)
        px = jax.device_put(x, NamedSharding(mesh, activation))
        for acts, bound in ((QSpec("int8"), EXACT), (None, LIMBS)):

            @jax.jit
            def call(x, q, acts=acts):
                wanted = out if kind is AxisType.Explicit else None
                return dot_general(x, q, MATRIX, out_sharding=wanted, activations=acts)

            y = call(px, placed)
            alone = jax.jit(lambda x, q, a=acts: dot_general(x, q, MATRIX, activations=a))(x, q)
            assert_near(np.asarray(y), x, dequantize(q), np.asarray(alone), bound)
            if out is not None and kind is AxisType.Explicit:
                assert y.sharding.is_equivalent_to(NamedSharding(mesh, out), 2)
            program = call.lower(px, placed).compile().as_text()
            gathers = [line for line in program.splitlines() if "all-gather" in line]
            packed = q.codes.shape[-1]
            assert not [g for g in gathers if f"128,{packed}]" in g], gathers


@pytest.mark.parametrize("rows", [1, 7, 600])
@pytest.mark.parametrize(
    "name",
    ["int8 channel", "int4 group", "uint8 asymmetric group", "mxfp4", "float6", "int8 block"],
)
def test_operands_are_int8_where_codes_may_be_divided(rows, name):
    assert_operands_are_int8(weights(name), normal(1, rows, K), "cpu")


def test_gradients_under_an_explicit_mesh():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    w, x = normal(0, 64, 32), normal(1, 8, 64)
    q = quantize(w, QSpec("int8", PerChannel(1)), storage_last_axes=(0,))
    expected = jax.grad(lambda x: (jnp.sin(jnp.arange(32.0))[None] * (x @ dequantize(q))).sum())(x)
    with jax.set_mesh(mesh):
        placed = sharded(q, mesh, P("model", None))
        px = jax.device_put(x, NamedSharding(mesh, P("data", None)))
        g = jax.device_put(jnp.sin(jnp.arange(32.0))[None], NamedSharding(mesh, P(None, "model")))
        got = jax.jit(
            jax.grad(lambda x, q: (g * dot_general(x, q, MATRIX, activations=QSpec("int8"))).sum())
        )(px, placed)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
