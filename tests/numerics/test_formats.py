"""Every format against its definition and against `ml_dtypes`, over all bit patterns."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxquant.numerics import (
    ALIASES,
    FORMATS,
    BlockFormat,
    Format,
    codebook_format,
    compute_dtype,
    decode,
    decode_bits,
    encode,
    encode_bits,
    get,
    minifloat,
)
from tests.compiled import optimised

PLAIN = [f for f in FORMATS.values() if isinstance(f, Format)]
FLOATS = [f for f in PLAIN if f.is_float]
NARROW = [f for f in FLOATS if f.bits <= 16]
INTEGERS = [f for f in PLAIN if f.is_integer]
BLOCKS = [f for f in FORMATS.values() if isinstance(f, BlockFormat)]
WIDE_CODEBOOK = codebook_format(np.linspace(-3.0, 4.0, 100), name="wide")
# One format for each way through the code, where running all of them would only repeat it.
KINDS = [get(n) for n in ("int4", "uint8", "int16", "float32", "bfloat16", "float8_e5m2")]
KINDS += [get(n) for n in ("float8_e8m0fnu", "float4_e2m1fn", "nf4")] + [WIDE_CODEBOOK]


def each(formats):
    return pytest.mark.parametrize("f", formats, ids=lambda f: f.name)


def dtype_of(f):
    """The dtype that `ml_dtypes` or NumPy has for a floating-point format."""
    return np.dtype(getattr(ml_dtypes, f.name, f.name))


def all_patterns(f):
    return np.arange(2**f.bits, dtype=np.uint8 if f.bits <= 8 else np.uint16)


def reference(f):
    """The float32 value of every bit pattern, by `ml_dtypes`."""
    return all_patterns(f).view(dtype_of(f)).astype(np.float32)


def assert_same_bits(got, want, name=""):
    """Equal bit by bit, signs of zero included; one NaN is as good as another."""
    got, want = np.asarray(got), np.asarray(want, np.float32)
    assert got.dtype == np.float32
    both_nan = np.isnan(got) & np.isnan(want)
    np.testing.assert_array_equal(
        np.where(both_nan, 0, got.view(np.uint32)),
        np.where(both_nan, 0, want.view(np.uint32)),
        err_msg=name,
    )


@partial(jax.jit, static_argnums=(0, 2))
def each_by(run, arrays, formats):
    """What `run` gives for each array and its format, in one program."""
    return [run(a, f) for a, f in zip(arrays, formats, strict=True)]


def there_and_back(x, f):
    return decode(encode(x, f), f)


def back_and_there(codes, f):
    return encode(decode(codes, f), f)


def bits_of(x):
    """A bit pattern for each element, to compare arrays of any dtype without float rules."""
    x = np.asarray(x)
    return x.view(f"uint{8 * x.dtype.itemsize}")


# --------------------------------------------------------------------------------------- facts


@each(FLOATS)
def test_float_facts_are_those_of_ml_dtypes(f):
    info = ml_dtypes.finfo(dtype_of(f))
    assert f.bits == info.bits
    assert (f.exponent_bits, f.mantissa_bits) == (info.nexp, info.nmant)
    assert f.max == float(info.max)
    assert f.min == float(info.min)
    assert f.smallest_normal == float(info.smallest_normal)
    assert f.epsilon == float(info.eps)
    if f.smallest_subnormal is not None:
        assert f.smallest_subnormal == float(info.smallest_subnormal)
    assert f.bits == f.signed + f.exponent_bits + f.mantissa_bits


@each(NARROW)
def test_float_facts_follow_from_the_patterns(f):
    values = reference(f)
    assert f.has_nan == np.isnan(values).any()
    assert f.has_inf == np.isinf(values).any()
    finite = values[np.isfinite(values)].astype(np.float64)
    assert (finite.min(), finite.max()) == (f.min, f.max)
    assert f.signed == (finite.min() < 0)
    positive = np.unique(finite[finite > 0])
    assert positive[0] == f.smallest_positive
    above_one = positive[positive > 1][0]
    assert above_one - 1 == f.epsilon


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("float32", (1, 8, 23, 127)),
        ("float16", (1, 5, 10, 15)),
        ("bfloat16", (1, 8, 7, 127)),
        ("float8_e4m3fn", (1, 4, 3, 7)),
        ("float8_e5m2", (1, 5, 2, 15)),
        ("float6_e2m3fn", (1, 2, 3, 1)),
        ("float6_e3m2fn", (1, 3, 2, 3)),
        ("float4_e2m1fn", (1, 2, 1, 1)),
        ("float8_e8m0fnu", (0, 8, 0, 127)),
    ],
)
def test_fields_are_the_published_ones(name, fields):
    f = get(name)
    assert (f.signed, f.exponent_bits, f.mantissa_bits, f.bias) == fields


@each(INTEGERS)
def test_integer_facts(f):
    assert (f.exponent_bits, f.mantissa_bits, f.bias, f.epsilon) == (None,) * 4
    assert f.qmax - f.qmin == 2**f.bits - 1
    assert f.qmin == (-(2 ** (f.bits - 1)) if f.signed else 0)
    storage = np.iinfo(f.storage)
    assert storage.min <= f.qmin
    assert storage.max >= f.qmax
    assert f.name == f"{'' if f.signed else 'u'}int{f.bits}"


def test_every_format_of_the_contract_is_there():
    widths = (*range(2, 9), 16)
    assert {f.name for f in INTEGERS} == {f"{u}int{b}" for u in ("", "u") for b in widths}
    assert {f.name for f in BLOCKS} >= {"mxfp8", "mxfp6", "mxfp4", "nvfp4"}
    assert "nf4" in FORMATS


@each(PLAIN)
def test_derived_facts(f):
    assert f.is_integer + f.is_float + f.is_codebook == 1
    assert f.bytes == f.bits / 8
    assert f.packed == (f.bits < 8)
    low, high = f.decimal_range
    assert math.isclose(10**high, f.max, rel_tol=1e-9)
    assert low <= high
    assert hash(f) == hash(dataclasses.replace(f))  # static data of a pytree
    if not f.is_integer:
        with pytest.raises(ValueError, match=f.name):
            _ = f.qmax


@each(BLOCKS)
def test_block_formats(f):
    assert FORMATS[f.element.name] is f.element
    assert FORMATS[f.scale.name] is f.scale
    assert f.bits == f.element.bits + 8 / f.block
    assert f.block == (16 if f.global_scale else 32)
    with pytest.raises(ValueError, match="block format"):
        encode(np.zeros(2), f)


def test_get_takes_names_aliases_dtypes_and_formats():
    for alias, name in ALIASES.items():
        assert get(alias) is FORMATS[name]
    assert get(jnp.bfloat16) is FORMATS["bfloat16"]
    assert get(np.dtype("int8")) is FORMATS["int8"]
    assert get(jnp.dtype("float8_e4m3fn")) is FORMATS["float8_e4m3fn"]
    for f in FORMATS.values():
        assert get(f) is f
    assert get(WIDE_CODEBOOK) is WIDE_CODEBOOK


@pytest.mark.parametrize("bad", ["int44", "", None, 4, 3.5, object(), float, ["int8"]])
def test_get_names_what_it_knows(bad):
    with pytest.raises(ValueError, match=r"unknown format .*float32.*nvfp4"):
        get(bad)


def test_get_suggests_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'float8_e4m3fn'"):
        get("float8_e4m3")


def test_the_table_is_read_only():
    with pytest.raises(TypeError):
        FORMATS["mine"] = FORMATS["int8"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        FORMATS["int8"].bits = 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exponent_bits": 9, "mantissa_bits": 2}, "within float32's"),
        ({"exponent_bits": 1, "mantissa_bits": 2}, "within float32's"),
        ({"exponent_bits": 4, "mantissa_bits": 24}, "within float32's"),
        ({"exponent_bits": 4, "mantissa_bits": 3, "bias": 126}, "within float32's"),
        ({"exponent_bits": 4, "mantissa_bits": 3, "bias": -200}, "largest value"),
        ({"exponent_bits": 8, "mantissa_bits": 0, "signed": False}, "largest value"),
        ({"exponent_bits": 4, "mantissa_bits": 3, "has_inf": True}, "has NaN too"),
        ({"exponent_bits": 4, "mantissa_bits": 0}, "no sign"),
        ({"exponent_bits": 5, "mantissa_bits": 10}, "storage"),
    ],
)
def test_impossible_float_formats_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        minifloat("mine", **fields)


@pytest.mark.parametrize(
    "values",
    [
        *([1.0], [], range(257), [0.0, math.nan], [0.0, math.inf], [0.0, 1e39], [1.0, 0.0]),
        *("ab", None, [[0.0, 1.0]], [0, 1j]),
    ],
)
def test_impossible_codebooks_are_refused(values):
    with pytest.raises(ValueError, match="codebook"):
        codebook_format(values)


@pytest.mark.parametrize(("n", "bits"), [(2, 1), (3, 2), (4, 2), (5, 3), (16, 4), (256, 8)])
def test_codebook_facts(n, bits):
    f = codebook_format(np.arange(n) - 1, name="mine")
    assert (f.bits, f.name, f.signed, f.min, f.max) == (bits, "mine", True, -1.0, n - 2.0)
    assert not codebook_format(np.arange(n)).signed


# ------------------------------------------------------------------------------- bit patterns


@each(NARROW)
def test_all_patterns_decode_as_in_ml_dtypes(f):
    # eagerly; formats of as many patterns share their programs
    assert_same_bits(decode_bits(all_patterns(f), f), reference(f))


def test_all_patterns_decode_as_in_ml_dtypes_when_compiled():
    got = each_by(decode_bits, [all_patterns(f) for f in NARROW], tuple(NARROW))
    for f, values in zip(NARROW, got, strict=True):
        assert_same_bits(values, reference(f), f.name)


def test_all_patterns_round_trip():
    got = each_by(encode_bits, [reference(f) for f in NARROW], tuple(NARROW))
    for f, again in zip(NARROW, map(np.asarray, got), strict=True):
        patterns, values = all_patterns(f), reference(f)
        assert again.dtype == patterns.dtype, f
        finite = np.isfinite(values)
        np.testing.assert_array_equal(again[finite], patterns[finite], err_msg=f.name)
        # Infinities saturate, NaN stays NaN.
        np.testing.assert_array_equal(
            again[np.isinf(values)].view(dtype_of(f)).astype(np.float64),
            np.sign(values[np.isinf(values)]) * f.max,
            err_msg=f.name,
        )
        assert np.isnan(again[np.isnan(values)].view(dtype_of(f)).astype(np.float32)).all(), f


def test_float32_patterns():
    x = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32)
    x = np.concatenate([x, np.uint32([0, 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000])])
    x = np.concatenate([x, x ^ np.uint32(0x80000000)])
    assert_same_bits(decode_bits(x, "float32"), x.view(np.float32))
    finite = x[np.isfinite(x.view(np.float32))]
    np.testing.assert_array_equal(encode_bits(finite.view(np.float32), "float32"), finite)


def test_a_format_of_ones_own():
    f = minifloat("float5_e2m2", 2, 2)  # unknown to ml_dtypes: checked from the definition
    for pattern, value in enumerate(np.asarray(decode_bits(np.arange(32), f)).tolist()):
        sign, e, m = pattern >> 4, pattern >> 2 & 3, pattern & 3
        magnitude = 2.0 ** (e - 1) * (1 + m / 4) if e else m / 4
        assert value == (-1) ** sign * magnitude
    np.testing.assert_array_equal(encode_bits(decode_bits(np.arange(32), f), f), np.arange(32))


@pytest.mark.parametrize("name", ["int8", "nf4", "mxfp4"])
def test_bit_patterns_are_of_float_formats(name):
    with pytest.raises(ValueError, match="floating-point"):
        decode_bits(np.zeros(2, np.uint8), name)
    with pytest.raises(ValueError, match="floating-point"):
        encode_bits(np.zeros(2, np.float32), name)


def test_bit_patterns_are_integers():
    with pytest.raises(ValueError, match="integers"):
        decode_bits(np.zeros(2, np.float32), "float16")


# ------------------------------------------------------------------------------------- codes


def rounding_cases(f):
    """float32 inputs that decide between neighbours: values, ties, what is beside them, and all."""
    values = np.unique(reference(f)[np.isfinite(reference(f))].astype(np.float64))
    ties = ((values[1:] + values[:-1]) / 2).astype(np.float32)  # exact: one mantissa bit more
    rng = np.random.default_rng(0)
    spread = np.exp2(rng.uniform(-150, 128, 20_000)) * rng.choice([-1, 1], 20_000)
    local = rng.uniform(f.min, f.max, 5_000) if f.max < 1e30 else rng.normal(size=5_000)
    special = np.float32([0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 3.4e38, -3.4e38])
    with np.errstate(over="ignore", under="ignore"):
        x = np.concatenate([values, local, spread]).astype(np.float32)
    inf = np.float32(np.inf)
    return np.concatenate([x, ties, np.nextafter(ties, inf), np.nextafter(ties, -inf), special])


def test_encode_rounds_as_ml_dtypes_and_saturates():
    cases = [rounding_cases(f) for f in NARROW]
    for f, x, codes in zip(NARROW, cases, each_by(encode, cases, tuple(NARROW)), strict=True):
        got = np.asarray(codes)
        if f.name == "float8_e8m0fnu":
            # Here alone ml_dtypes is not the nearest: it rounds all between 2^-127 and 2^-126 up.
            known = (x <= 2.0**-127) | (x >= 2.0**-126)
            x, got = x[known], got[known]
        want = np.clip(x, np.float32(f.min), np.float32(f.max)).astype(dtype_of(f))
        np.testing.assert_array_equal(bits_of(got), bits_of(want), err_msg=f.name)


def test_nearest_by_brute_force():
    cases = []
    for f in [*PLAIN, WIDE_CODEBOOK]:
        rng = np.random.default_rng(1)
        low, high = max(f.min, -1e3), min(f.max, 1e3)
        cases.append(rng.uniform(low - 1, high + 1, 257).astype(np.float32))
    got = each_by(there_and_back, cases, (*PLAIN, WIDE_CODEBOOK))
    for f, x, values in zip([*PLAIN, WIDE_CODEBOOK], cases, got, strict=True):
        check_nearest(f, x, np.asarray(values).astype(np.float64))


def check_nearest(f, x, got):
    if f.is_integer:
        grid = np.arange(f.qmin, f.qmax + 1, dtype=np.float64)
    elif f.is_codebook:
        grid = np.asarray(f.codebook)
    elif f.bits <= 16:
        grid = reference(f)[np.isfinite(reference(f))].astype(np.float64)
    else:
        grid = x.astype(np.float64)
    grid = np.unique(grid)
    at = np.clip(np.searchsorted(grid, x), 1, len(grid) - 1)
    best = np.minimum(np.abs(grid[at] - x), np.abs(grid[at - 1] - x))
    np.testing.assert_array_equal(np.abs(got - x), best, err_msg=f.name)


def every_code(f):
    if f.is_codebook:
        return np.unique(f.codebook, return_index=True)[1].astype(np.uint8)  # fp4 has two zeros
    if f.is_integer:
        return np.arange(f.qmin, f.qmax + 1, dtype=f.storage)
    if f.bits <= 16:
        codes = all_patterns(f)[np.isfinite(reference(f))]
        return codes if f.storage == "uint8" else codes.view(f.storage)
    return np.float32([0.0, 1.5, -3.25e-20, f.max, f.min])


def test_every_code_survives_decode_and_encode():
    formats = (*PLAIN, WIDE_CODEBOOK)
    every = [every_code(f) for f in formats]
    for f, codes, again in zip(
        formats, every, each_by(back_and_there, every, formats), strict=True
    ):
        assert again.dtype == jnp.dtype(f.storage), f
        np.testing.assert_array_equal(bits_of(again), bits_of(codes), err_msg=f.name)


def test_decode_of_stored_dtypes_equals_the_definition():
    # `decode` uses XLA's conversion here, subnormals and all.
    formats = tuple(f for f in NARROW if f.storage != "uint8")
    stored = [all_patterns(f).view(f.storage) for f in formats]
    wants = each_by(decode_bits, [all_patterns(f) for f in formats], formats)
    compiled = each_by(partial(decode, dtype=jnp.float32), stored, formats)
    for f, codes, want, got in zip(formats, stored, wants, compiled, strict=True):
        assert_same_bits(decode(codes, f, jnp.float32), want, f.name)
        assert_same_bits(got, want, f.name)


@each(KINDS)
def test_jit_equals_eager_and_vmap_equals_loop(f):
    x = np.random.default_rng(2).normal(size=(3, 8)).astype(np.float32) * 3
    codes = encode(x, f)
    assert codes.shape == x.shape
    values = decode(codes, f)
    assert values.dtype == jnp.float32

    @jax.jit
    def run(x, codes):
        one = partial(encode, format=f)
        loop = [one(row) for row in x]
        return one(x), jax.vmap(one)(x), loop, jax.vmap(partial(decode, format=f))(codes)

    jitted, mapped, loop, again = run(x, codes)
    np.testing.assert_array_equal(bits_of(jitted), bits_of(codes))
    np.testing.assert_array_equal(bits_of(mapped), np.stack([bits_of(row) for row in loop]))
    assert_same_bits(again, values)


def test_non_finite_input():
    x, formats = np.float32([np.nan, np.inf, -np.inf]), (*PLAIN, WIDE_CODEBOOK)
    values = each_by(there_and_back, [x] * len(formats), formats)
    for f, got in zip(formats, (np.asarray(v).astype(np.float64) for v in values), strict=True):
        assert got[1:].tolist() == [f.max, f.min], f
        if f.has_nan:
            assert np.isnan(got[0]), f
        elif f.is_codebook:
            assert got[0] == min(f.codebook, key=abs), f
        else:
            assert got[0] == 0.0, f


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_half_precision_input_is_read_as_float32(dtype):
    # Every pattern of the input dtype: its subnormals, too, must reach the codes.
    x = all_patterns(get(dtype)).view(dtype)
    formats, n = tuple(KINDS), len(KINDS)
    narrow = each_by(encode, [x] * n, formats)
    wide = each_by(encode, [x.astype(np.float32)] * n, formats)
    for f, got, want in zip(formats, narrow, wide, strict=True):
        np.testing.assert_array_equal(bits_of(got), bits_of(want), err_msg=f.name)


@pytest.mark.parametrize("shape", [(), (2, 0, 3)])
def test_shapes_without_elements_or_axes(shape, key):
    x, formats = np.zeros(shape, np.float32), tuple(KINDS)
    for run in (encode, partial(encode, key=key)):
        every = each_by(run, [x] * len(formats), formats)
        values = each_by(decode, every, formats)
        for f, codes, value in zip(formats, every, values, strict=True):
            assert codes.shape == shape, f
            assert codes.dtype == jnp.dtype(f.storage), f
            assert value.shape == shape, f


def test_decode_dtype():
    x, dtypes = np.float32([-3.0, -0.3, 0.0, 0.4, 2.0]), (jnp.float32, jnp.bfloat16, jnp.float16)
    names = ("int4", "float4_e2m1fn", "float8_e4m3fn", "float8_e8m0fnu", "nf4")
    formats = tuple(get(name) for name in names)
    codes = each_by(encode, [x] * len(names), formats)
    wide = each_by(decode, codes, formats)
    # unoptimised, older emitters flush subnormals on CPUs that convert to bfloat16 themselves
    in_each = optimised(
        lambda codes: [
            [decode(c, f, dtype) for c, f in zip(codes, formats, strict=True)] for dtype in dtypes
        ]
    )
    for dtype, narrow in zip(dtypes, in_each(codes), strict=True):
        for f, got, values in zip(formats, narrow, wide, strict=True):
            assert got.dtype == dtype, f
            want = np.asarray(values).astype(dtype)
            np.testing.assert_array_equal(np.asarray(got), want, err_msg=f"{f.name} {dtype}")


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="real numbers"):
        encode(np.zeros(2, np.complex64), "int8")
    with pytest.raises(ValueError, match="real numbers"):
        encode(np.zeros(2, np.complex64), "float16")
    with pytest.raises(ValueError, match="codes of int4 are int8, got float32"):
        decode(np.zeros(2, np.float32), "int4")
    with pytest.raises(ValueError, match="unknown format"):
        encode(np.zeros(2), "int9")


def test_powers_of_two_at_the_bottom_of_float32():
    # 2^-127 is a subnormal float32, and the halfway point to 2^-126 is 1.5 * 2^-127.
    middle = np.float32(1.5 * 2.0**-127)
    below = np.nextafter(middle, np.float32(0))
    x = np.float32([0, -1, 2.0**-149, 2.0**-127, below, middle, 2.0**-126, 1.5 * 2.0**-126])
    codes = jax.jit(partial(encode_bits, format="float8_e8m0fnu"))(x)
    np.testing.assert_array_equal(codes, [0, 0, 0, 0, 0, 1, 1, 2])


def test_subnormal_results_survive_compilation():
    # Float arithmetic on these is flushed to zero in compiled code; the codec must not use it.
    tiny = np.float32([2.0**-127, 2.0**-133, -(2.0**-130)])
    codes = jax.jit(partial(encode, format="bfloat16"))(tiny)
    np.testing.assert_array_equal(bits_of(codes), bits_of(tiny.astype(ml_dtypes.bfloat16)))
    scale = jax.jit(lambda x: decode(encode(x, "float8_e8m0fnu"), "float8_e8m0fnu"))(tiny[:1])
    assert_same_bits(scale, tiny[:1])


# ----------------------------------------------------------------------------- compute policy


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "float8_e4m3fn", "float16"])
def test_compute_dtype(name, platform):
    dtype, reason = compute_dtype(name, platform)
    if (name, platform) == ("float16", "tpu"):
        assert dtype == jnp.bfloat16
        assert "bfloat16" in reason
        assert get(dtype).exponent_bits == get("float32").exponent_bits
    else:
        assert (dtype, reason) == (jnp.dtype(name), None)
