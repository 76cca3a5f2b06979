"""Round to nearest: the encoder of a rule that names none."""

import math

import chex
import jax
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import PerChannel, PerGroup, PerTensor, QSpec
from jaxquant.encoders import Encoder, Info, measure, rtn


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_it_is_a_value():
    assert isinstance(rtn(), Encoder)
    assert rtn() == rtn()
    assert rtn(stochastic=True) != rtn()
    assert len({rtn(), rtn(), rtn(stochastic=True)}) == 2


@pytest.mark.parametrize("spec", [QSpec("int8", PerChannel(1)), QSpec("nf4", PerGroup(16, 0))])
def test_it_quantizes_and_measures(spec):
    w = normal(64, 8)
    q, info = rtn()(w, spec, storage_last_axes=(0,))
    expected = jq.quantize(w, spec, storage_last_axes=(0,))
    np.testing.assert_array_equal(np.asarray(q.codes), np.asarray(expected.codes))
    w64, restored = np.asarray(w, np.float64), np.asarray(jq.dequantize(q), np.float64)
    sqnr = 10 * np.log10(np.sum(w64**2) / np.sum((w64 - restored) ** 2))
    assert info.sqnr_db == pytest.approx(sqnr, abs=1e-3)


def test_batch_axes_are_encoded_one_by_one():
    w = normal(3, 16, 8) * np.float32([1.0, 10.0, 100.0])[:, None, None]
    spec = QSpec("int8", PerTensor())
    q, info = rtn()(w, spec, batch_axes=1)
    assert q.batch == (3,)
    for layer in range(3):
        one = jq.quantize(w[layer], spec)
        np.testing.assert_array_equal(np.asarray(q.codes)[layer], np.asarray(one.codes))
    assert info.sqnr_db > 35


def test_a_key_is_for_stochastic_rounding_only(key):
    w = normal(64, 8)
    spec = QSpec("int4", PerChannel(1))
    plain, _ = rtn()(w, spec, key=key)
    np.testing.assert_array_equal(np.asarray(plain.codes), np.asarray(rtn()(w, spec)[0].codes))
    drawn, info = rtn(stochastic=True)(w, spec, key=key)
    assert (np.asarray(drawn.codes) != np.asarray(plain.codes)).any()
    assert info.sqnr_db < measure(w, plain).sqnr_db
    with pytest.raises(ValueError, match="pass key="):
        rtn(stochastic=True)(w, spec)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_ratio_does_not_depend_on_magnitude(scale):
    w = normal(64, 8)
    _, info = rtn()(w * np.float32(scale), QSpec("int8", PerChannel(1)))
    _, plain = rtn()(w, QSpec("int8", PerChannel(1)))
    assert info.sqnr_db == pytest.approx(plain.sqnr_db, abs=0.05)


def test_exact_zero_and_empty_arrays():
    spec = QSpec("int8", PerTensor(), range="qmax")
    assert rtn()(np.arange(-127, 128, dtype=np.float32), spec)[1].sqnr_db == math.inf
    assert rtn()(np.zeros((4, 4), np.float32), spec)[1].sqnr_db == math.inf
    assert rtn()(np.zeros((0, 4), np.float32), spec)[1].sqnr_db == math.inf
    assert Info(np.float32(1.0), np.float32(0.0)).sqnr_db == -math.inf


def test_it_traces():
    spec = QSpec("int4", PerGroup(16, 0))
    w = normal(64, 8)
    shapes, _ = jax.eval_shape(lambda w: rtn()(w, spec), jax.ShapeDtypeStruct(w.shape, w.dtype))
    q, _ = jax.jit(lambda w: rtn()(w, spec))(w)
    assert jax.tree.structure(shapes) == jax.tree.structure(q)
    q.validate()


SPECS = [
    (QSpec("int8", PerChannel(1)), (0,)),
    (QSpec("int4", PerGroup(16, 0)), (0,)),
    (QSpec("int4", PerGroup(24, 0), symmetric=False), (0,)),  # the last group is padded
    (QSpec("nf4", PerGroup(24, 0), double=True), (0,)),
    (QSpec("int4", PerGroup(8, 1)), (0,)),
]


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(("spec", "storage_last_axes"), SPECS)
def test_sums_are_those_of_the_result_and_codes_those_of_quantize(spec, storage_last_axes, batch):
    w = normal(*batch, 64, 40)
    q, info = rtn()(w, spec, storage_last_axes=storage_last_axes, batch_axes=len(batch))
    expected = jq.quantize(w, spec, storage_last_axes=storage_last_axes, batch_axes=len(batch))
    chex.assert_trees_all_equal(q, expected)
    assert info.sqnr_db == pytest.approx(measure(w, q).sqnr_db, abs=1e-3)


def test_values_that_came_back_count_as_no_error_whatever_their_magnitude():
    spec = QSpec("nf4", PerGroup(16, 0))
    w = jq.dequantize(jq.quantize(np.linspace(-3e-20, 3e-20, 64, dtype=np.float32)[:, None], spec))
    assert rtn()(w, spec)[1].sqnr_db == math.inf


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen_in_sums_and_scales(value):
    w = normal(64, 8)
    w[5, 3] = value
    q, info = rtn()(w, QSpec("int8", PerChannel(1)))
    assert np.isnan(q.scale).all() and math.isnan(info.sqnr_db)
