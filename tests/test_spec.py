"""How an array is quantized: checked when written down, not when used."""

import copy
import pickle

import jax.numpy as jnp
import pytest

import jaxquant as jq
from jaxquant import PerBlock, PerChannel, PerGroup, PerTensor, QSpec


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QSpec("int9"), "unknown format 'int9'"),
        (lambda: QSpec("int1"), "unknown format 'int1'"),
        (lambda: QSpec("nf5"), "unknown format 'nf5'"),
        (lambda: QSpec(8), "unknown format 8"),
        (lambda: PerGroup(0, 0), "expected a positive integer, got 0"),
        (lambda: PerGroup(-32, 0), "got -32"),
        (lambda: PerGroup(2.5, 0), "got 2.5"),
        (lambda: PerGroup(True, 0), "got True"),
        (lambda: PerBlock(0, 4), "expected positive integers"),
        (lambda: PerBlock(4, -1), "expected positive integers"),
        (lambda: QSpec("nf4", symmetric=False), "nf4: only integer formats can be asymmetric"),
        (lambda: QSpec("float8_e4m3fn", symmetric=False), "only integer formats"),
        (lambda: QSpec("mxfp4", symmetric=False), "only integer formats"),
        (lambda: QSpec("int8", range="full"), "expected one of"),
        (lambda: QSpec("int8", "per_channel"), "expected PerTensor"),
        (lambda: QSpec("int8", scale_dtype="int8"), "expected a float dtype, got int8"),
        (lambda: QSpec("int8", scale_dtype="float31"), "'float31' is not a dtype"),
        (
            lambda: QSpec("int8", range="signed", scale_dtype="float8_e8m0fnu"),
            "signed",
        ),
    ],
)
def test_mistakes_are_value_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("granularity", "message"),
    [
        (PerChannel(2), "axis 2 is out of range for an array of rank 2"),
        (PerChannel(-3), "axis -3 is out of range"),
        (PerChannel((0, -2)), "named twice"),
        (PerChannel(), "no axis is named"),
        (PerGroup(4), "no axis is named"),
        (PerGroup(4, 5), "axis 5 is out of range"),
        (PerBlock(2, 2, (0, 2)), "axis 2 is out of range"),
    ],
)
def test_axes_are_checked_against_the_array(granularity, message):
    with pytest.raises(ValueError, match=message):
        QSpec("int8", granularity).resolve((4, 8))
    with pytest.raises(ValueError, match=message):
        jq.quantize(jnp.ones((4, 8)), QSpec("int8", granularity))


def test_block_formats_set_group_and_scale():
    spec = QSpec("nvfp4")
    assert spec.format.name == "float4_e2m1fn"
    assert spec.granularity == PerGroup(16)
    assert spec.scale_dtype == "float8_e4m3fn"
    assert spec.global_scale
    assert QSpec("mxfp8_e5m2").scale_dtype == "float8_e8m0fnu"
    assert not QSpec("mxfp6").global_scale


def test_specs_are_values():
    spec = QSpec("int4", PerGroup(64, (0, 1)), symmetric=False)
    twin = QSpec("int4", PerGroup(64, (0, 1)), symmetric=False)
    assert spec == twin
    assert hash(spec) == hash(twin)
    assert spec != QSpec("int4", PerGroup(64, (0, 1)))
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert copy.deepcopy(spec) == spec
    assert "int4" in repr(spec)
    assert "symmetric=False" in repr(spec)


@pytest.mark.parametrize(
    ("spec", "contracted", "ndim", "expected"),
    [
        (QSpec("int8"), (0,), 2, PerChannel((-1,))),
        (QSpec("int8"), (0, 1), 4, PerChannel((-2, -1))),
        (QSpec("int8"), (-1,), 3, PerChannel((-3, -2))),
        (QSpec("int4", PerGroup(32)), (1,), 3, PerGroup(32, (-2,))),
        (QSpec("int4", PerGroup(32)), (2, 0), 3, PerGroup(32, (-1, -3))),
        (QSpec("int4", PerGroup(32, 0)), (1,), 2, PerGroup(32, 0)),
        (QSpec("int8", PerTensor()), (0,), 2, PerTensor()),
        (QSpec("mxfp4"), (0,), 2, PerGroup(32, (-2,))),
    ],
)
def test_the_contraction_fills_open_axes(spec, contracted, ndim, expected):
    filled = spec.at(contracted, ndim)
    assert filled.granularity == expected
    assert (filled.format, filled.scale_dtype) == (spec.format, spec.scale_dtype)


def test_grouped_and_minor_axes_are_stored_last():
    blocks = QSpec("int4", PerGroup(8, (0, 2))).resolve((4, 3, 6))
    assert blocks.axes == ((-2,), (-3, -1))
    assert blocks.blocks == (1, 8)
    blocks = QSpec("int8", PerChannel(1)).resolve((4, 3), storage_last_axes=(0,))
    assert blocks.axes == ((-1,), (-2,))
    assert blocks.blocks == (1, 4)


def test_a_group_is_no_longer_than_its_axis():
    assert QSpec("int4", PerGroup(128, 0)).resolve((10, 3)).blocks == (1, 10)
    assert QSpec("int4", PerBlock(128, 128)).resolve((10, 3)).blocks == (10, 3)
