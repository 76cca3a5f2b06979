"""The kernel for packed 4-bit codes: interpreted here, lowered for platforms that are not here."""

import contextlib
import re
import warnings
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxquant import PerChannel, PerGroup, PerTensor, QSpec, quantize
from jaxquant.numerics import tile_size
from jaxquant.ops import dot_general, dot_general_packed
from jaxquant.ops.pallas.packed_kernel import PLATFORMS, Layout, blocks_for
from jaxquant.qtensor import dequantize, storage_scale
from tests.arrays import normal
from tests.ops.cases import (
    MATRIX,
    matmul,
)

FORMATS = {
    "int4": QSpec("int4", PerGroup(64, 0)),
    "uint4 asymmetric": QSpec("uint4", PerGroup(64, 0), symmetric=False),
    "int4 asymmetric": QSpec("int4", PerGroup(64, 0), symmetric=False),
    "uint4 float zero": QSpec("uint4", PerGroup(64, 0), symmetric=False, zero_dtype="float32"),
    "int4 double": QSpec("int4", PerGroup(64, 0), double=True),
    "int4 channel": QSpec("int4", PerChannel(1)),
    "int4 tensor": QSpec("int4", PerTensor()),
    "nf4": QSpec("nf4", PerGroup(64, 0)),
    "fp4": QSpec("fp4", PerGroup(64, 0)),
    "mxfp4": QSpec("mxfp4", PerGroup(32, 0)),
    "nvfp4": QSpec("nvfp4", PerGroup(32, 0)),
}
# Products of codes and bfloat16 are exact in float32; only sums are rounded, in another order. The
# values of a codebook are rounded to bfloat16 first.
SUMS, CODEBOOK = 1e-6, 2.0**-9


@cache
def operands(spec, rows, k, n, dtype=jnp.bfloat16):
    """Rows `[rows, k]` and a QTensor of a weight `[k, n]`."""
    make = jax.jit(lambda x, w: (x.astype(dtype), quantize(w, spec, storage_last_axes=(0,))))
    x, w = (np.random.default_rng(seed).normal(size=s) for seed, s in ((1, (rows, k)), (0, (k, n))))
    return make(x.astype(np.float32), w.astype(np.float32))


def kernel(platform):
    return lambda x, q: dot_general_packed(x, q, MATRIX, interpret=platform)


@jax.jit
def held(q):
    """The dequantized weight and the scales as they are stored."""
    return dequantize(q), storage_scale(q)


def called(call, *args):
    return str(jax.make_jaxpr(call)(*args)).count("pallas_call")


def multiplied(platform, x, q):
    """The product by one kernel."""
    traced = jax.jit(kernel(platform)).trace(x, q)
    assert str(traced.jaxpr).count("pallas_call") == 1
    return traced.lower().compile()(x, q)


def reference(x, q, scale):
    """The contraction in float64 by the documented layout: `x` `[m, k]`, `q` `[k, n]`."""
    fmt, size, k = q.spec.format, q.padded[-1], q.shape[0]
    tile = tile_size(size)
    packed = np.asarray(q.codes).reshape(-1, size // tile, tile // 2)
    codes = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(-1, size).astype(int)
    if fmt.is_integer:
        values = np.where(codes > fmt.qmax, codes - 16, codes).astype(np.float64)
    elif fmt.is_codebook:
        values = np.asarray(fmt.codebook)[codes]
    else:
        steps = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        values = np.where(codes & 8, -1, 1) * steps[codes & 7]
    group = size // q.groups[-1]

    def each(a):
        return np.repeat(np.asarray(a, np.float64), group, axis=1)

    zero = 0.0 if q.zero_point is None else each(q.zero_point)
    w = each(scale) * (values - zero)
    return np.asarray(x, np.float64) @ np.broadcast_to(w, values.shape)[:, :k].T


def assert_close(y, expected, x, w, bound):
    reach = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(w, np.float64))
    error = np.abs(np.asarray(y, np.float64) - np.asarray(expected, np.float64))
    assert (error <= bound * reach + 1e-12).all(), (error / reach).max()


@pytest.mark.parametrize("name", FORMATS)
def test_formats_agree_with_the_reference(name):
    x, q = operands(FORMATS[name], 3, 256, 64)
    w, scale = held(q)
    bound = CODEBOOK if q.spec.format.is_codebook else SUMS
    y = multiplied("tpu", x, q)
    assert y.dtype == jnp.float32
    assert_close(y, reference(x, q, scale), x, w, bound)
    assert_close(y, np.asarray(x, np.float64) @ w, x, w, bound)


@pytest.mark.parametrize(("platform", "name"), [("tpu", "nf4"), ("cuda", "uint4 asymmetric")])
def test_float32_is_multiplied_in_full(platform, name):
    x, q = operands(FORMATS[name], 3, 128, 32, jnp.float32)
    y = jax.jit(kernel(platform))(x, q)
    w, scale = held(q)
    assert_close(y, reference(x, q, scale), x, w, SUMS)


SHAPES = {
    # rows, k, n, group
    "tiles of two groups": (3, 256, 64, 32),
    "a group of one tile": (1, 192, 32, 64),
    "a group of two tiles": (16, 512, 128, 128),
    "groups beyond a vector": (3, 1024, 16, 512),
    "k is no multiple of the group": (3, 90, 48, 32),
    "rows in several blocks": (130, 64, 16, 64),
}


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_agree_with_the_reference(platform, shape):
    rows, k, n, group = SHAPES[shape]
    x, q = operands(QSpec("uint4", PerGroup(group, 0), symmetric=False), rows, k, n)
    y = multiplied(platform, x, q)
    assert y.shape == (rows, n)
    w, scale = held(q)
    assert_close(y, reference(x, q, scale), x, w, SUMS)


def test_axes_and_dtypes_are_those_of_lax():
    x, (_, q) = normal(1, 2, 128, 5), operands(FORMATS["int4"], 1, 128, 64)
    left, right = (((1,), (0,)), ((), ())), (((0,), (1,)), ((), ()))

    def calls(contract, q):
        yield contract(x, q, left)
        yield contract(q, x, right, None, jnp.bfloat16)

    packed = partial(dot_general_packed, interpret="tpu")
    both = jax.jit(lambda q: ([*calls(packed, q)], [*calls(jax.lax.dot_general, dequantize(q))]))
    for y, plain in zip(*both(q), strict=True):
        assert (y.shape, y.dtype) == (plain.shape, plain.dtype)
        y, plain = np.asarray(y, np.float32), np.asarray(plain, np.float32)
        np.testing.assert_allclose(y, plain, rtol=2e-2, atol=1e-4)


def test_a_weight_is_contracted_along_its_last_axis_too():
    x, w = normal(1, 3, 128), normal(2, 64, 128)  # an embedding and its logits
    q = jax.jit(lambda w: quantize(w, QSpec("int4", PerGroup(64, 1)), storage_last_axes=(1,)))(w)
    numbers = (((1,), (1,)), ((), ()))
    y = jax.jit(lambda x, q: dot_general_packed(x, q, numbers, interpret="tpu"))(x, q)
    np.testing.assert_allclose(y, matmul(x, dequantize(q).T), rtol=1e-4, atol=1e-4)


def test_jit_vmap_and_scan_equal_a_loop():
    x, w = normal(1, 3, 2, 128), normal(0, 3, 128, 32)
    q = jax.jit(lambda w: quantize(w, QSpec("int4", PerGroup(32, 0)), batch_axes=1))(w)
    call = jax.jit(kernel("tpu"))
    layers = [jax.tree.map(lambda a, i=i: np.asarray(a)[i], (x, q)) for i in range(3)]
    one = np.stack([call(*layer) for layer in layers])
    mapped = jax.jit(jax.vmap(call))(x, q)
    _, scanned = jax.jit(lambda xq: jax.lax.scan(lambda c, xq: (c, call(*xq)), None, xq))((x, q))
    for got in (mapped, scanned):
        np.testing.assert_allclose(got, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_gradient_is_that_of_the_dequantized_contraction(platform):
    x, q = operands(FORMATS["uint4 asymmetric"], 3, 128, 32, jnp.float32)
    g = normal(2, 3, 32)
    got = jax.jit(jax.grad(lambda x: (g * kernel(platform)(x, q)).sum()))(x)
    expected = matmul(g, held(q)[0].T)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="not differentiable"):
        jax.grad(lambda q: kernel(platform)(x, q).sum(), allow_int=True)(q)


UNSUITED = {
    "8 bits": (QSpec("int8", PerChannel(1)), (128, 32)),
    "3 bits": (QSpec("int3", PerChannel(1)), (128, 32)),
    "a group that cuts halves of tiles": (QSpec("int4", PerGroup(48, 0)), (192, 32)),
    "scales along both axes": (QSpec("int4", PerChannel((0, 1))), (64, 32)),
    "k is not packed in whole": (QSpec("int4", PerChannel(1)), (90, 32)),
    "grouped the other way": (QSpec("int4", PerGroup(16, 1)), (64, 64)),
}


@pytest.mark.parametrize("name", UNSUITED)
def test_what_does_not_suit_is_contracted_as_ever(name):
    spec, shape = UNSUITED[name]
    x, q = normal(1, 3, shape[0]), jax.jit(lambda w: quantize(w, spec))(normal(0, *shape))

    def call(x, q):
        return dot_general_packed(x, q, MATRIX, interpret="tpu")

    assert called(call, x, q) == called(lambda x, q: dot_general_packed(x, q, MATRIX), x, q) == 0
    ever = lambda x, q: dot_general(x, q, MATRIX, activations=None)
    np.testing.assert_array_equal(*jax.jit(lambda x, q: (call(x, q), ever(x, q)))(x, q))


def test_other_dtypes_and_symbolic_rows_are_contracted_as_ever():
    x, q = operands(FORMATS["int4"], 3, 128, 32)
    assert called(kernel("tpu"), x, q) == 1
    assert called(kernel("tpu"), np.asarray(x).astype(np.float16), q) == 0
    (b,) = export.symbolic_shape("b")
    assert called(kernel("tpu"), jax.ShapeDtypeStruct((b, 128), jnp.bfloat16), q) == 0


def test_a_cpu_contracts_as_ever():
    x, q = operands(FORMATS["int4"], 3, 128, 32, jnp.float32)
    packed = lambda x, q: dot_general_packed(x, q, MATRIX)
    ever = lambda x, q: dot_general(x, q, MATRIX, activations=None)
    np.testing.assert_array_equal(*jax.jit(lambda x, q: (packed(x, q), ever(x, q)))(x, q))


def test_mistakes():
    x, q = operands(FORMATS["int4"], 3, 128, 32, jnp.float32)
    with pytest.raises(ValueError, match="interpret is one of"):
        dot_general_packed(x, q, MATRIX, interpret="cpu")
    for lhs, rhs in ((x, x.T), (q, q)):
        with pytest.raises(ValueError, match="one operand is a QTensor"):
            dot_general_packed(lhs, rhs, MATRIX)


def test_blocks_divide_what_they_cut():
    for rows in (1, 17, 600):
        for outs in (16, 48, 100, 4096):
            for size, group in ((64, 32), (192, 64), (4096, 128), (16384, 32), (384, 384)):
                layout = Layout.of(size, group)
                for itemsize in (2, 4):
                    for platform in PLATFORMS:
                        found = blocks_for(platform, rows, outs, layout, itemsize)
                        if found is None:
                            continue
                        assert outs % found.outs == layout.size % found.chunk == 0
                        assert found.chunk % layout.run == 0 or layout.run % found.chunk == 0
                        assert found.rows % 16 == 0
                        if platform == "cuda":
                            assert all(
                                n & (n - 1) == 0 for n in (found.rows, found.outs, found.chunk)
                            )
                        else:
                            assert found.outs % 128 == 0 or found.outs == outs
                            assert found.chunk % 128 == 0 or found.chunk == layout.size


# What a platform's kernel is a call of, and a device of it that need not be there.
LOWERED = {
    "tpu": ("tpu_custom_call", AbstractDevice("TPU v5 lite", 1, "tpu")),
    "cuda": ("__gpu$xla.gpu.triton", AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")),
}
FLOATS = re.compile(r"tensor<((?:\d+x)+)(?:f64|f32|bf16|f16)>")


@contextlib.contextmanager
def device_of(platform):
    """Pallas asks which chip it lowers for; and from 0.11 on it warns that Triton will go."""
    mesh = AbstractMesh((1,), ("one",), (AxisType.Explicit,), abstract_device=LOWERED[platform][1])
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        yield


def largest_float(program):
    return max(np.prod([int(n) for n in dims.split("x")[:-1]]) for dims in FLOATS.findall(program))


def exported(call, platform, x, q):
    """JAX promises nothing of how long Triton's calls stay readable, so it has to be told."""
    leaves, tree = jax.tree.flatten(q)
    structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, *leaves)]
    with device_of(platform):
        return export.export(
            jax.jit(lambda x, *leaves: call(x, jax.tree.unflatten(tree, leaves))),
            platforms=(platform,),
            disabled_checks=[export.DisabledSafetyCheck.custom_call(LOWERED["cuda"][0])],
        )(*structs)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("int4", "bfloat16"), ("uint4 asymmetric", "float32"), ("nf4", "bfloat16")],
)
def test_an_export_calls_the_kernel_and_holds_no_float_weight(platform, name, dtype):
    k, n = 512, 256
    x, q = operands(FORMATS[name], 3, k, n, dtype)
    text = exported(lambda x, q: dot_general_packed(x, q, MATRIX), platform, x, q).mlir_module()
    assert text.count(f"custom_call @{LOWERED[platform][0]}") == 1
    assert "stablehlo.dot_general" not in text
    assert largest_float(text) <= k * n // 16


def test_the_measure_of_an_export_sees_a_float_weight():
    x, q = operands(FORMATS["int4"], 3, 512, 256)
    call = lambda x, q: dot_general(x, q, MATRIX, activations=None)
    text = exported(call, "tpu", x, q).mlir_module()
    assert "stablehlo.dot_general" in text
    assert largest_float(text) == 512 * 256
