"""What the compiler is given, for platforms that need not be there."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxquant import PerChannel, PerGroup, QSpec, quantize
from jaxquant.ops import conv_general_dilated, dot_general, dot_general_dynamic, lowering
from tests.arrays import normal
from tests.ops.cases import (
    MATRIX,
    K,
    N,
    weights,
)

PLATFORMS = ("cpu", "cuda", "tpu")
INT8_DOT = re.compile(
    r"dot_general.*\(tensor<[\dx?]*xi8>, tensor<[\dx?]*xi8>\) -> tensor<[\dx?]*xi32>"
)


def text(call, *args, platform):
    return jax.jit(call).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def dots(program):
    return [line for line in program.splitlines() if "stablehlo.dot_general" in line]


# A CPU sums groups of less than 64 in float, and rows alone in one loop: test_lowering_table.py.
LONG_GROUPS = quantize(normal(0, 128, N), QSpec("int4", PerGroup(64, 0)), storage_last_axes=(0,))


@pytest.mark.parametrize(
    ("platform", "rows", "name"),
    [
        *itertools.product(("cpu",), (7, 600), ("int8 channel", "float6", "int4 long group")),
        *itertools.product(
            ("cuda", "tpu"),
            (1, 7, 600),
            (
                *("int8 channel", "float6", "int4 group", "int4 long group"),
                *("uint8 asymmetric group", "mxfp4", "int8 block"),
            ),
        ),
    ],
)
def test_operands_are_int8(platform, rows, name):
    q = LONG_GROUPS if name == "int4 long group" else weights(name)
    assert_operands_are_int8(q, normal(1, rows, q.shape[0]), platform)


def assert_operands_are_int8(q, x, platform):
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
        expected = jax.jit(call)(x, *jax.tree.leaves(q))
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


def test_sizes_and_sums():
    (b,) = export.symbolic_shape("b")
    assert lowering.static_size((2, b), (0, 1)) == lowering.MANY
    assert lowering.fits_int32(b, True, True)
    assert lowering.fits_int32(2**15, True, True)
    assert not lowering.fits_int32(2**16, True, True)
    assert N == 20


@pytest.mark.parametrize(
    ("rows", "in_groups", "packed", "fused"),
    [
        *((1, *kind, True) for kind in itertools.product((False, True), repeat=2)),
        (2, True, True, True),
        (2, True, False, False),
        (2, False, True, False),
        (3, True, True, False),
    ],
)
def test_rows_that_one_loop_contracts(monkeypatch, rows, in_groups, packed, fused):
    monkeypatch.setattr(lowering, "FUSES_SUMS", True)
    assert lowering.fused_wins(rows, in_groups, packed) == fused
    monkeypatch.setattr(lowering, "FUSES_SUMS", False)
    assert not lowering.fused_wins(rows, in_groups, packed)
