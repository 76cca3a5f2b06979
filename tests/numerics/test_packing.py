"""Packing: the documented layout, byte by byte, and round trips for any shape."""

from functools import partial

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


@partial(jax.jit, static_argnums=1)
def packed_as(codes, cases):
    """Each array of codes packed by its options, in one program."""
    return [pack(c, **dict(case)) for c, case in zip(codes, cases, strict=True)]


@partial(jax.jit, static_argnums=(1, 2))
def there_and_back(codes, bits, signed):
    """Packed, and unpacked again; a list of arrays in one program."""
    packed = [pack(c, b) for c, b in zip(codes, bits, strict=True)]
    cases = zip(packed, bits, codes, signed, strict=True)
    return packed, [unpack(p, b, c.shape[-1], s) for p, b, c, s in cases]


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


def test_layout_is_the_documented_one():
    cases = [(bits, size) for bits in BITS for size in (1, 8, 16, 31, 64, 96, 128)]
    codes = [random_codes((2, size), bits, signed=False) for bits, size in cases]
    got = packed_as(codes, tuple((("bits", bits),) for bits, _ in cases))
    for (bits, size), rows, packed in zip(cases, codes, got, strict=True):
        want = [pack_by_definition(row, bits) for row in rows]
        np.testing.assert_array_equal(packed, want, err_msg=f"{bits} bits, {size} codes")


def test_the_nibbles_of_a_tile():
    # Byte j of t/2 holds code j below and code j + t/2 above.
    codes = np.arange(64, dtype=np.uint8) % 16
    codes[32:] = codes[32:][::-1]
    packed = np.asarray(pack(codes, 4))
    np.testing.assert_array_equal(packed & 15, codes[:32])
    np.testing.assert_array_equal(packed >> 4, codes[32:])


def every_code(bits, signed):
    low = -(2 ** (bits - 1)) if signed else 0
    return np.arange(low, low + 2**bits).astype(np.int8 if signed else np.uint8)


def test_every_code_round_trips():
    bits, signed = zip(*((b, s) for b in BITS for s in (True, False)), strict=True)
    codes = [every_code(*case) for case in zip(bits, signed, strict=True)]
    for b, s, want, got in zip(
        bits, signed, codes, there_and_back(codes, bits, signed)[1], strict=True
    ):
        assert got.dtype == want.dtype, (b, s)
        np.testing.assert_array_equal(got, want, err_msg=f"{b} bits, signed {s}")


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_round_trips_eagerly(signed):
    codes = every_code(7, signed)
    np.testing.assert_array_equal(unpack(pack(codes, 7), 7, len(codes), signed), codes)


@settings(max_examples=15)
@given(
    lead=st.lists(st.integers(0, 3), max_size=2),
    size=st.integers(0, 150),
    bits=st.sampled_from(list(BITS)),
    signed=st.booleans(),
)
def test_any_shape_round_trips_under_jit(lead, size, bits, signed):
    codes = random_codes((*lead, size), bits, signed)
    (packed,), (got,) = there_and_back([codes], (bits,), (signed,))
    assert packed.shape == (*lead, packed_bytes(size, bits))
    assert packed.dtype == jnp.uint8
    assert got.dtype == codes.dtype
    np.testing.assert_array_equal(got, codes)
    shapes = jax.eval_shape(lambda c: unpack(pack(c, bits), bits, size, signed), codes)
    assert (shapes.shape, shapes.dtype) == (codes.shape, codes.dtype)


def test_zero_size_axes():
    shapes = ((0, 24), (2, 0), (0, 0), (2, 0, 16))
    cases = [(bits, shape) for bits in (3, 4) for shape in shapes]
    codes = [np.zeros(shape, np.int8) for _, shape in cases]
    made = there_and_back(codes, tuple(bits for bits, _ in cases), (True,) * len(cases))
    for (bits, shape), packed, got in zip(cases, *made, strict=True):
        assert packed.shape == (*shape[:-1], packed_bytes(shape[-1], bits)), (bits, shape)
        assert got.shape == shape, (bits, shape)
    assert unpack(pack(np.zeros((2, 0), np.int8), 4), 4, 0, True).shape == (2, 0)


@pytest.mark.parametrize("bits", [4, 7])
def test_jit_equals_eager_and_vmap_equals_loop(bits):
    codes = random_codes((3, 5, 40), bits, signed=True)
    packed = np.asarray(pack(codes, bits))

    @jax.jit
    def run(codes, packed):
        own = partial(unpack, bits=bits, size=40, signed=True)
        return {
            "packed": (pack(codes, bits), jax.vmap(partial(pack, bits=bits))(codes)),
            "one by one": [pack(c, bits) for c in codes],
            "unpacked": (own(packed), jax.vmap(own)(packed), jnp.stack([own(p) for p in packed])),
        }

    got = run(codes, packed)
    for again in (*got["packed"], np.stack(got["one by one"])):
        np.testing.assert_array_equal(again, packed)
    for again in (*got["unpacked"], unpack(packed, bits, 40, True)):
        np.testing.assert_array_equal(again, codes)


def test_any_integer_dtype_gives_its_low_bits():
    dtypes = [np.int8, np.int16, np.int32, np.uint8, np.uint32]
    lows = [-8 if np.iinfo(dtype).min < 0 else 0 for dtype in dtypes]
    codes = [np.arange(low, low + 16).astype(d) for low, d in zip(lows, dtypes, strict=True)]
    low_bits = [(c.astype(int) & 7).astype(np.uint8) for c in codes]
    got = packed_as([*codes, *low_bits], ((("bits", 3),),) * 10)
    for dtype, packed, want in zip(dtypes, got[:5], got[5:], strict=True):
        np.testing.assert_array_equal(packed, want, err_msg=str(dtype))
    np.testing.assert_array_equal(pack(codes[2], 3), got[2])  # eagerly, of int32


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


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_packing_along_another_axis_is_packing_the_transposed(axis):
    every = [(np.arange(24 * 20 * 40) % 2**b).astype(np.uint8).reshape(24, 20, 40) for b in BITS]
    moved = [np.moveaxis(codes, axis, -1) for codes in every]
    along = tuple((("bits", bits), ("axis", axis)) for bits in BITS)
    last = tuple((("bits", bits),) for bits in BITS)
    got = packed_as([*every, *moved], along + last)
    for bits, own, wanted in zip(BITS, got[:7], got[7:], strict=True):
        want = np.moveaxis(np.asarray(wanted), -1, axis)
        np.testing.assert_array_equal(own, want, err_msg=f"{bits} bits")
