"""Packing: the documented layout, byte by byte, and round trips for any shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.numerics import pack, packed_bytes, padded_size, tile_size, unpack

BITS = range(1, 8)
PLANES = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1]}


def random_codes(shape, bits, signed, seed=0):
    low = -(2 ** (bits - 1)) if signed else 0
    dtype = np.int8 if signed else np.uint8
    return np.random.default_rng(seed).integers(low, low + 2**bits, shape).astype(dtype)


def pack_by_definition(row, bits):
    """One row of codes to bytes, in plain Python from the description of the layout."""
    padded = [int(c) % 2**bits for c in row] + [0] * (-len(row) % 8)
    t = next(t for t in (64, 32, 16, 8) if len(padded) % t == 0)
    out = []
    for start in range(0, len(padded), t):
        left = bits
        for width in PLANES[bits]:
            left -= width
            stride = t * width // 8  # bytes of the plane
            for j in range(stride):
                codes = [padded[start + j + k * stride] for k in range(8 // width)]
                out.append(sum((c >> left) % 2**width << (k * width) for k, c in enumerate(codes)))
    return out


def test_sizes():
    for size in range(300):
        padded, tile = padded_size(size), tile_size(size)
        assert padded % 8 == 0
        assert 0 <= padded - size < 8
        assert tile in (8, 16, 32, 64)
        assert -(-size // tile) * tile == padded  # a larger tile costs no more padding...
        assert tile == 64 or -(-size // (2 * tile)) * 2 * tile > padded  # ...and the next one does
        for bits in BITS:
            assert packed_bytes(size, bits) * 8 == padded * bits


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1, 8, 16, 31, 64, 96, 128])
def test_layout_is_the_documented_one(bits, size):
    codes = random_codes((2, size), bits, signed=False)
    want = [pack_by_definition(row, bits) for row in codes]
    np.testing.assert_array_equal(pack(codes, bits), want)


def test_the_nibbles_of_a_tile():
    # Byte j of t/2 holds code j below and code j + t/2 above.
    codes = np.arange(64, dtype=np.uint8) % 16
    codes[32:] = codes[32:][::-1]
    packed = np.asarray(pack(codes, 4))
    np.testing.assert_array_equal(packed & 15, codes[:32])
    np.testing.assert_array_equal(packed >> 4, codes[32:])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_every_code_round_trips(bits, signed):
    low = -(2 ** (bits - 1)) if signed else 0
    codes = np.arange(low, low + 2**bits).astype(np.int8 if signed else np.uint8)
    got = unpack(pack(codes, bits), bits, len(codes), signed)
    assert got.dtype == codes.dtype
    np.testing.assert_array_equal(got, codes)


@settings(max_examples=15)
@given(
    lead=st.lists(st.integers(0, 3), max_size=2),
    size=st.integers(0, 150),
    bits=st.sampled_from(list(BITS)),
    signed=st.booleans(),
)
def test_any_shape_round_trips_under_jit(lead, size, bits, signed):
    codes = random_codes((*lead, size), bits, signed)
    packed = jax.jit(pack, static_argnums=1)(codes, bits)
    assert packed.shape == (*lead, packed_bytes(size, bits))
    assert packed.dtype == jnp.uint8
    got = jax.jit(unpack, static_argnums=(1, 2, 3))(packed, bits, size, signed)
    assert got.dtype == codes.dtype
    np.testing.assert_array_equal(got, codes)
    shapes = jax.eval_shape(lambda c: unpack(pack(c, bits), bits, size, signed), codes)
    assert (shapes.shape, shapes.dtype) == (codes.shape, codes.dtype)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("shape", [(0, 24), (2, 0), (0, 0), (2, 0, 16)])
def test_zero_size_axes(bits, shape):
    packed = pack(np.zeros(shape, np.int8), bits)
    assert packed.shape == (*shape[:-1], packed_bytes(shape[-1], bits))
    assert unpack(packed, bits, shape[-1], True).shape == shape


@pytest.mark.parametrize("bits", [4, 7])
def test_jit_equals_eager_and_vmap_equals_loop(bits):
    codes = random_codes((3, 5, 40), bits, signed=True)
    packed = pack(codes, bits)
    np.testing.assert_array_equal(jax.jit(pack, static_argnums=1)(codes, bits), packed)
    np.testing.assert_array_equal(jax.vmap(lambda c: pack(c, bits))(codes), packed)
    np.testing.assert_array_equal(np.stack([pack(c, bits) for c in codes]), packed)
    vmapped = jax.vmap(lambda p: unpack(p, bits, 40, True))(packed)
    np.testing.assert_array_equal(vmapped, codes)
    loop = np.stack([unpack(p, bits, 40, True) for p in packed])
    np.testing.assert_array_equal(loop, codes)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint8, np.uint32])
def test_any_integer_dtype_gives_its_low_bits(dtype):
    codes = (
        np.arange(-8, 8).astype(dtype) if np.iinfo(dtype).min < 0 else np.arange(16, dtype=dtype)
    )
    np.testing.assert_array_equal(pack(codes, 3), pack((codes.astype(int) & 7).astype(np.uint8), 3))


def test_padding_is_zero():
    packed = np.asarray(pack(np.full(9, -1, np.int8), 4))
    assert np.unpackbits(packed).sum() == 9 * 4


@pytest.mark.parametrize("bits", BITS)
def test_unpacking_is_shifts_masks_and_one_concatenate(bits):
    packed = np.zeros((2, packed_bytes(128, bits)), np.uint8)
    jaxpr = jax.make_jaxpr(lambda p: unpack(p, bits, 128, True))(packed)
    names = [eqn.primitive.name for eqn in jaxpr.jaxpr.eqns]
    assert names.count("concatenate") == 1
    assert not {"gather", "scatter", "transpose", "while", "scan"} & set(names)


@pytest.mark.parametrize("bits", [-1, 0, 8, 9])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=f"got {bits} bits"):
        pack(np.zeros(8, np.uint8), bits)
    with pytest.raises(ValueError, match=f"got {bits} bits"):
        unpack(np.zeros(8, np.uint8), bits, 8, False)


def test_wrong_arrays_are_refused():
    with pytest.raises(ValueError, match="integer codes"):
        pack(np.zeros(8, np.float32), 4)
    with pytest.raises(ValueError, match="at least one axis"):
        pack(np.int8(3), 4)
    with pytest.raises(ValueError, match=r"uint8\[\.\.\., 8\]"):
        unpack(np.zeros((2, 7), np.uint8), 4, 16, True)
    with pytest.raises(ValueError, match="uint8"):
        unpack(np.zeros((2, 8), np.int8), 4, 16, True)
    with pytest.raises(ValueError, match="uint8"):
        unpack(np.uint8(0), 4, 16, True)


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_packing_along_another_axis_is_packing_the_transposed(bits, axis):
    codes = jnp.arange(24 * 20 * 40, dtype=jnp.uint8).reshape(24, 20, 40) % 2**bits
    last = pack(jnp.moveaxis(codes, axis, -1), bits)
    assert (pack(codes, bits, axis=axis) == jnp.moveaxis(last, -1, axis)).all()
