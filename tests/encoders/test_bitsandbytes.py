"""Codes and scales against bitsandbytes' own, and against a NumPy reference of its formulas."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.numerics.nested_map import decode_nested, encode_nested, nested_map
from jaxquant.qtensor import nest, storage_codes, storage_scale
from tests.encoders import bnb_reference as ref

codes_of = jax.jit(storage_codes)
STORED = pathlib.Path(__file__).parent / "bitsandbytes_vectors.npz"


@functools.cache
def arrays():
    """Weights `[out, in]` by name: usual ones and awkward ones."""
    rng = np.random.default_rng(0)
    usual = rng.normal(size=(48, 512)).astype(np.float32) * 0.02
    zeros = usual.copy()
    zeros[3, 64:128] = 0
    zeros[4] = 0
    extreme = np.exp(rng.uniform(-80, 80, (16, 256))).astype(np.float32)
    extreme[0, :4] = 3.0e38, -3.0e38, 1e30, -2.9e38
    extreme *= rng.choice([-1, 1], extreme.shape).astype(np.float32)
    ties = rng.choice(_between(), (16, 128)).astype(np.float32)
    ties[:, ::64] = 1
    heavy = rng.standard_t(2, (32, 192)).astype(np.float32)
    return {
        "usual": usual, "zeros": zeros, "extreme": extreme, "ties": ties, "heavy": heavy,
        "row": usual[:1, :448],
    }  # fmt: skip


def _between():
    """Midpoints of both tables and their neighbours."""
    parts = []
    for table in ref.TABLES.values():
        values = np.sort(table)
        middle = (values[:-1] + values[1:]) / np.float32(2)
        middle = middle[middle != 0]  # what is beside 0 is subnormal, which XLA takes for 0
        parts += [middle, np.nextafter(middle, np.float32(2)), np.nextafter(middle, np.float32(-2))]
    return np.concatenate(parts)


def encoded(w, name, double=False):
    """Ours, of a weight `[out, in]` that is kept as `[in, out]`."""
    spec = jq.QSpec(name, jq.PerGroup(64, axis=0), double=double)
    return jq.quantize(w.T, spec)


def flat_codes(q, name):
    """Ours as bitsandbytes numbers and orders them: `[out, in]` flattened."""
    return ref.order(name)[np.asarray(codes_of(q)).reshape(-1)]


def same_zero(codes, name, which):
    """Codes with one zero alone: XLA takes quotients below 2^-126 for 0, FP4 has two zeros."""
    return np.where(codes == 8, 0, codes) if (name, which) == ("fp4", "extreme") else codes


@pytest.mark.parametrize("which", arrays())
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_four_bit_codes_and_scales_are_those_of_the_formulas(name, which):
    w = arrays()[which]
    q = encoded(w, name).validate()
    codes, absmax = ref.quantize_4bit(w, name)
    got = flat_codes(q, name)
    np.testing.assert_array_equal(same_zero(got, name, which), same_zero(codes, name, which))
    np.testing.assert_array_equal(np.asarray(q.scale).reshape(-1), absmax)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_a_last_block_that_is_not_full(name):
    sizes, spec = (1, 63, 65, 1000), jq.QSpec(name, jq.PerGroup(64, axis=0))
    every = [np.random.default_rng(n).normal(size=n).astype(np.float32) for n in sizes]

    @jax.jit
    def run(every):
        qs = [jq.quantize(w, spec) for w in every]
        return [(storage_codes(q), q.scale) for q in qs]

    for size, w, (own, scale) in zip(sizes, every, run(every), strict=True):
        codes, absmax = ref.quantize_4bit(w, name)
        got = ref.order(name)[np.asarray(own)[:size]]
        np.testing.assert_array_equal(got, codes, err_msg=f"{size} values")
        np.testing.assert_array_equal(scale, absmax, err_msg=f"{size} values")


def test_the_map_of_scales():
    np.testing.assert_array_equal(np.asarray(nested_map(), np.float32), ref.dynamic_map())
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(decode_nested(codes), ref.dynamic_map())
    middle = (ref.dynamic_map()[:-1] + ref.dynamic_map()[1:]) / 2
    x = np.concatenate(
        [[1, 1], middle, np.linspace(-1, 1, 255 * 400 + 1)[:-1].astype(np.float32)]
    ).astype(np.float32)
    encode = jax.jit(encode_nested)
    np.testing.assert_array_equal(encode_nested(jnp.asarray(middle)), encode(middle))
    for start in range(1, x.size, 200):
        part = np.concatenate([[1], x[start : start + 200]]).astype(np.float32)
        np.testing.assert_array_equal(encode(part), ref.quantize_8bit(part)[0])


@pytest.mark.parametrize("which", arrays())
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_double_quantization_is_that_of_the_formulas(name, which):
    w = arrays()[which]
    plain, q = encoded(w, name), encoded(w, name, double=True).validate()
    np.testing.assert_array_equal(q.codes, plain.codes)
    absmax = ref.quantize_4bit(w, name)[1]
    mean = np.float32(np.sum(absmax.astype(np.float64)) / absmax.size)
    np.testing.assert_allclose(q.nested.offset, mean, rtol=2e-7)
    offset = np.asarray(q.nested.offset)
    codes, scale = ref.quantize_8bit(absmax - offset)
    np.testing.assert_array_equal(np.asarray(q.scale).reshape(-1), codes)
    np.testing.assert_array_equal(q.nested.scale, scale)
    want = ref.dequantize_8bit(codes, scale) + offset
    got = np.asarray(jax.jit(storage_scale)(q)).reshape(-1)
    np.testing.assert_allclose(got, want, rtol=3e-7, atol=3e-7 * scale.max())


def test_bits_per_weight():
    w = jax.ShapeDtypeStruct((1024, 512), np.float32)
    for name in ("nf4", "fp4"):
        spec = jq.QSpec(name, jq.PerGroup(64, axis=0), double=True)
        q = jax.eval_shape(functools.partial(jq.quantize, spec=spec), w)
        assert abs(q.bits_per_weight - 4.127) < 1e-3


def test_stored_vectors():
    """What an earlier run of the reference gave, bitsandbytes' own beside it, is what it gives."""
    with np.load(STORED) as held:
        w = held["w"]
        for name in ("nf4", "fp4"):
            codes, absmax = ref.quantize_4bit(w, name)
            np.testing.assert_array_equal(ref.packed(codes), held[f"{name}_packed"])
            np.testing.assert_array_equal(absmax, held[f"{name}_absmax"])
            q = encoded(w, name)
            np.testing.assert_array_equal(ref.packed(flat_codes(q, name)), held[f"{name}_packed"])
            np.testing.assert_array_equal(np.asarray(q.scale).reshape(-1), absmax)
            offset = held[f"{name}_offset"]
            codes, nested = nest(q.scale, jnp.asarray(offset))
            np.testing.assert_array_equal(np.asarray(codes).reshape(-1), held[f"{name}_nested"])
            np.testing.assert_array_equal(nested.scale, held[f"{name}_nested_absmax"])


# Against bitsandbytes itself, where it is installed.


@pytest.fixture(scope="module")
def bnb():
    pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    import bitsandbytes.functional as functional
    import torch

    return functional, torch


@pytest.mark.parametrize("which", [*arrays(), "odd"])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_against_bitsandbytes(bnb, name, which):
    functional, torch = bnb
    w = arrays()[which] if which != "odd" else arrays()["usual"].reshape(1, -1)[:, :999]
    theirs, state = functional.quantize_4bit(torch.tensor(w), quant_type=name)
    q = encoded(w, name)
    theirs_flat = np.stack([theirs.numpy() >> 4, theirs.numpy() & 15], -1).reshape(-1)[: w.size]
    np.testing.assert_array_equal(
        same_zero(flat_codes(q, name)[: w.size], name, which), same_zero(theirs_flat, name, which)
    )
    np.testing.assert_array_equal(np.asarray(q.scale).reshape(-1), state.absmax.numpy())
    if which != "odd":
        back = functional.dequantize_4bit(theirs, state).numpy()
        np.testing.assert_allclose(np.asarray(jq.dequantize(q)).T, back, rtol=2e-7)

    theirs, state = functional.quantize_4bit(
        torch.tensor(w), quant_type=name, compress_statistics=True
    )
    q = encoded(w, name, double=True)
    # torch sums in an order of its own, and another on another machine
    np.testing.assert_allclose(q.nested.offset, state.offset.numpy(), rtol=5e-7)
    plain = encoded(w, name).scale
    codes, nested = nest(plain, jnp.asarray(state.offset.numpy()))
    np.testing.assert_array_equal(np.asarray(codes).reshape(-1), state.absmax.numpy())
    np.testing.assert_array_equal(nested.scale, state.state2.absmax.numpy())
    if np.asarray(q.nested.offset) == state.offset.numpy():
        np.testing.assert_array_equal(np.asarray(q.scale).reshape(-1), state.absmax.numpy())
        np.testing.assert_array_equal(q.nested.scale, state.state2.absmax.numpy())


def test_the_map_of_bitsandbytes(bnb):
    functional, _ = bnb
    theirs = functional.create_dynamic_map().numpy()
    np.testing.assert_array_equal(np.asarray(nested_map(), np.float32), theirs)
