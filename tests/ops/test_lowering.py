"""What the compiler is given, for platforms that need not be there."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant import PerChannel, PerGroup, QSpec, quantize
from jaxquant.ops import conv_general_dilated, dot_general, dot_general_dynamic, lowering
from jaxquant.qtensor import dequantize
from tests.ops.cases import EXACT, LIMBS, MATRIX, K, N, assert_near, jit, normal, weights

PLATFORMS = ("cpu", "cuda", "tpu")
INT8_DOT = re.compile(
    r"dot_general.*\(tensor<[\dx?]*xi8>, tensor<[\dx?]*xi8>\) -> tensor<[\dx?]*xi32>"
)


def text(call, *args, platform):
    return jax.jit(call).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def dots(program):
    return [line for line in program.splitlines() if "stablehlo.dot_general" in line]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("rows", [1, 7, 600])
@pytest.mark.parametrize(
    "name",
    ["int8 channel", "int4 group", "uint8 asymmetric group", "mxfp4", "float6", "int8 block"],
)
def test_operands_are_int8(platform, rows, name):
    q, x = weights(name), normal(1, rows, K)
    for spec in (QSpec("int8"), QSpec("uint8", symmetric=False)):
        program = text(
            lambda x, q, s=spec: dot_general(x, q, MATRIX, activations=s), x, q, platform=platform
        )
        assert dots(program)
        assert all(INT8_DOT.search(line) for line in dots(program)), dots(program)


def test_weight_only_is_int8_on_a_cpu_and_unscaled_elsewhere():
    q, x = weights("uint8"), normal(1, 7, K)

    def call(x, q):
        return dot_general(x, q, MATRIX, activations=None)

    for platform in PLATFORMS:
        (dot,) = dots(text(call, x, q, platform=platform))
        assert bool(INT8_DOT.search(dot)) == (platform == "cpu")
        assert "xf32>" in dot or platform == "cpu"


@pytest.mark.parametrize("platform", PLATFORMS)
def test_attention_and_convolution_are_int8(platform):
    a, b, spec = normal(1, 2, 5, 8), normal(2, 2, 6, 8), QSpec("int8")
    numbers = (((2,), (2,)), ((0,), (0,)))
    program = text(
        lambda a, b: dot_general_dynamic(a, b, numbers, lhs_spec=QSpec("uint8"), rhs_spec=spec),
        a, b, platform=platform,
    )  # fmt: skip
    assert all(INT8_DOT.search(line) for line in dots(program))
    x, q = normal(1, 1, 9, 8), quantize(normal(2, 3, 8, 4), QSpec("int8", PerChannel(2)))
    program = text(
        lambda x, q: conv_general_dilated(
            x, q, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), activations=spec
        ),
        x, q, platform=platform,
    )  # fmt: skip
    assert "(tensor<1x9x8xi8>, tensor<3x8x4xi8>) -> tensor<1x9x4xi32>" in program


@pytest.mark.parametrize("name", ["int8 channel", "int4 group", "nf4"])
def test_one_export_for_all_platforms_and_batch_sizes(name):
    q = weights(name)
    rows = export.symbolic_shape("b, t")
    like = jax.ShapeDtypeStruct((*rows, K), jnp.float32)
    struct = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), q)
    numbers = (((2,), (0,)), ((), ()))

    def call(x, *leaves):
        q = jax.tree.unflatten(jax.tree.structure(struct), leaves)
        return {
            "int8": dot_general(x, q, numbers, activations=QSpec("int8", symmetric=False)),
            "float": dot_general(x, q, numbers, activations=None),
            "scores": dot_general_dynamic(
                x, x, (((1,), (1,)), ((0,), (0,))),
                lhs_spec=QSpec("uint8", symmetric=False), rhs_spec=QSpec("int8", symmetric=False),
            ),
        }  # fmt: skip

    exported = export.export(jax.jit(call), platforms=PLATFORMS)(like, *jax.tree.leaves(struct))
    again = export.deserialize(exported.serialize())
    for shape in ((1, 1, K), (2, 3, K)):
        x = normal(1, *shape)
        got = again.call(x, *jax.tree.leaves(q))
        expected = jit(call)(x, *jax.tree.leaves(q))
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-2)


def test_a_convolution_with_a_symbolic_batch():
    (b,) = export.symbolic_shape("b")
    q = quantize(normal(2, 3, 1, 8), QSpec("int8", PerChannel(2), symmetric=False))
    struct = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), q)

    def call(x, *leaves):
        return conv_general_dilated(
            x, jax.tree.unflatten(jax.tree.structure(struct), leaves), (1,), "SAME",
            dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=4,
            activations=QSpec("uint8", symmetric=False),
        )  # fmt: skip

    like = jax.ShapeDtypeStruct((b, 9, 4), jnp.float32)
    exported = export.export(jax.jit(call), platforms=PLATFORMS)(like, *jax.tree.leaves(struct))
    x = normal(1, 2, 9, 4)
    np.testing.assert_allclose(
        exported.call(x, *jax.tree.leaves(q)), call(x, *jax.tree.leaves(q)), rtol=1e-5, atol=1e-5
    )


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
    q = quantize(w, spec, minor=(0,))
    with jax.set_mesh(mesh):
        placed = sharded(q, mesh, codes)
        px = jax.device_put(x, NamedSharding(mesh, activation))
        for acts, bound in ((QSpec("int8"), EXACT), (None, LIMBS)):

            @jit
            def call(x, q, acts=acts):
                wanted = out if kind is AxisType.Explicit else None
                return dot_general(x, q, MATRIX, out_sharding=wanted, activations=acts)

            y = call(px, placed)
            alone = jit(lambda x, q, a=acts: dot_general(x, q, MATRIX, activations=a))(x, q)
            assert_near(np.asarray(y), x, dequantize(q), np.asarray(alone), bound)
            if out is not None and kind is AxisType.Explicit:
                assert y.sharding.is_equivalent_to(NamedSharding(mesh, out), 2)
            program = call.lower(px, placed).compile().as_text()
            gathers = [line for line in program.splitlines() if "all-gather" in line]
            assert not [g for g in gathers if "512" in g and "128" in g], gathers


def test_gradients_under_an_explicit_mesh():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    w, x = normal(0, 64, 32), normal(1, 8, 64)
    q = quantize(w, QSpec("int8", PerChannel(1)), minor=(0,))
    expected = jax.grad(lambda x: (jnp.sin(jnp.arange(32.0))[None] * (x @ dequantize(q))).sum())(x)
    with jax.set_mesh(mesh):
        placed = sharded(q, mesh, P("model", None))
        px = jax.device_put(x, NamedSharding(mesh, P("data", None)))
        g = jax.device_put(jnp.sin(jnp.arange(32.0))[None], NamedSharding(mesh, P(None, "model")))
        got = jax.jit(
            jax.grad(lambda x, q: (g * dot_general(x, q, MATRIX, activations=QSpec("int8"))).sum())
        )(px, placed)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_sizes_and_sums():
    (b,) = export.symbolic_shape("b")
    assert lowering.static_size((2, b), (0, 1)) == lowering.MANY
    assert lowering.fits_int32(b, True, True)
    assert lowering.fits_int32(2**15, True, True)
    assert not lowering.fits_int32(2**16, True, True)
    assert N == 20
