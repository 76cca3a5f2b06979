"""Quantized arrays: what they represent, how exactly, and in how many bytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import PerBlock, PerChannel, PerGroup, PerTensor, QSpec
from jaxquant.qtensor import storage_codes
from tests import reference

INTEGERS = [f"int{b}" for b in range(2, 9)]
UNSIGNED = [f"uint{b}" for b in range(2, 9)]
FLOATS = ["float8_e4m3fn", "float8_e5m2", "float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn"]
GRANULARITIES = [
    PerTensor(),
    PerChannel((0, 2)),
    PerGroup(5, 1),  # uneven: 12 = 5 + 5 + 2
    PerGroup(8, (2, 0)),  # over two axes, not in order
    PerBlock(5, 2, (1, 0)),  # uneven, axes swapped
]
SHAPE = (3, 12, 5)


def data(shape=SHAPE, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def round_trip(w, spec, minor=()):
    """One program instead of a dozen: most of the time goes into compilation."""
    q = jq.quantize(w, spec, minor=minor)
    return q, jq.dequantize(q)


def relative_error(x, spec):
    restored = jax.jit(lambda x: jq.dequantize(jq.quantize(x, spec), jnp.float32))(x)
    x = x.astype(jnp.float32)
    return float(jnp.mean(jnp.abs(restored - x)) / jnp.mean(jnp.abs(x)))


@pytest.mark.parametrize(
    ("spec", "transform", "bound"),
    [
        (QSpec("int8", PerChannel(0)), lambda x: x, 0.00766),
        (QSpec("int4", PerChannel(0)), lambda x: x, 0.1226),
        (QSpec("nf4", PerGroup(32, 1)), lambda x: x, 0.0990),
        (QSpec("int8", PerChannel(0), symmetric=False), lambda x: x + 1, 0.00522),
        (QSpec("mxfp8", PerGroup(32, 1)), lambda x: x, 0.0224),
        (QSpec("mxfp4", PerGroup(32, 1)), lambda x: x, 0.1080),
        (QSpec("nvfp4", PerGroup(16, 1)), lambda x: x, 0.0894),
        (QSpec("nvfp4", PerGroup(16, 1)), lambda x: x * 1e-3, 0.0894),
        (QSpec("nvfp4", PerGroup(16, 1)), lambda x: x * 1e4, 0.0894),
    ],
)
def test_accuracy_on_normal_data(spec, transform, bound):
    x = transform(jax.random.normal(jax.random.key(42), (10, 256, 16), jnp.bfloat16))
    error = relative_error(x, spec)
    print(f"{spec}: mean |error| / mean |x| = {error:.5f}, at most {bound}")
    assert error <= bound


@pytest.mark.parametrize("name", [*INTEGERS, *UNSIGNED, *FLOATS, "nf4"])
def test_within_half_a_step_of_the_grid(name):
    w = np.asarray(data(), np.float64)
    w = np.abs(w) if name.startswith("u") else w
    for granularity in GRANULARITIES:
        spec = QSpec(name, granularity)
        q, restored = round_trip(jnp.asarray(w, jnp.float32), spec)
        q.validate()
        check_half_step(w, np.asarray(restored, np.float64), spec)


@pytest.mark.parametrize("name", ["int2", "int4", "int6", "int8", "uint3", "uint8"])
def test_asymmetric_within_half_a_step(name):
    w = np.asarray(data() + 0.7, np.float64)
    for granularity in GRANULARITIES:
        spec = QSpec(name, granularity, symmetric=False)
        q, restored = round_trip(jnp.asarray(w, jnp.float32), spec)
        q.validate()
        check_half_step(w, np.asarray(restored, np.float64), spec)


def check_half_step(w, restored, spec):
    name = spec.format.name
    scale, zero = reference.scales(w, spec)
    bound = scale * reference.half_step(w / scale + zero, name)
    rounding = 4e-7 * (np.abs(w) + scale * np.abs(zero))  # of float32
    assert (np.abs(restored - w) <= bound + rounding).all(), spec
    # and a multiple of the scale that the formula gives
    steps = restored / scale + zero
    assert (reference.nearest(steps, name) <= 1e-6 * (1 + np.abs(steps) + np.abs(zero))).all(), spec


@pytest.mark.parametrize("rule", ["half", "qmax", "signed"])
@pytest.mark.parametrize("name", ["int2", "int3", "int4", "int8"])
def test_range_rules_against_the_reference(name, rule):
    spec = QSpec(name, PerGroup(4, 1), range=rule)
    w = np.asarray(data(seed=3))
    scale, _ = reference.scales(w, spec)
    restored = np.asarray(round_trip(jnp.asarray(w), spec)[1], np.float64)
    values = reference.grid(name)
    expected = np.clip(np.round(w.astype(np.float64) / scale), values[0], values[-1]) * scale
    # where division falls within rounding of a tie, either neighbour is right
    fraction = np.abs(w.astype(np.float64) / scale) % 1
    tie = np.abs(fraction - 0.5) < 1e-5
    np.testing.assert_allclose(restored[~tie], expected[~tie], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [*INTEGERS, *FLOATS, "nf4"])
def test_data_on_the_grid_comes_back_exactly(name):
    # given its scale: where the largest magnitude falls on the largest code, it is found again
    for granularity in (PerTensor(), PerChannel(1), PerGroup(8, 0)):
        spec = QSpec(name, granularity, range="qmax")
        first, restored = round_trip(data((16, 6), seed=1), spec)
        second, again = round_trip(restored, spec)
        np.testing.assert_array_equal(np.asarray(first.codes), np.asarray(second.codes))
        np.testing.assert_allclose(again, restored, rtol=3e-7)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_integers_come_back_bit_for_bit_with_range_qmax(bits):
    top = 2 ** (bits - 1) - 1
    w = jnp.asarray(np.arange(-top, top + 1), jnp.float32)[None, :]
    q = jq.quantize(w, QSpec(f"int{bits}", PerTensor(), range="qmax"))
    np.testing.assert_array_equal(jq.dequantize(q), w)


def test_ternary_comes_back_bit_for_bit():
    w = jax.random.randint(jax.random.key(0), (64, 8), -1, 2).astype(jnp.float32) * 0.37
    q = jq.quantize(w, QSpec("int2", PerChannel(1), range="qmax"))
    np.testing.assert_array_equal(jq.dequantize(q), w)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_the_negative_extreme_takes_the_lowest_code(bits):
    for seed in range(8):
        w = data((32,), seed=seed)
        w = w.at[3].set(-5.0 - 0.123 * seed)
        q = jq.quantize(w, QSpec(f"int{bits}", PerTensor()))
        codes = storage_codes(q)
        assert int(codes.min()) == -(2 ** (bits - 1)), seed
        q = jq.quantize(-w, QSpec(f"int{bits}", PerTensor()))
        assert int(storage_codes(q).max()) == 2 ** (bits - 1) - 1, seed


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_the_signed_rule_keeps_the_extreme(name, sign):
    w = data((4, 32), seed=2)
    w = w.at[:, 7].set(sign * jnp.array([4.0, 5.5, 8.0, 16.0]))
    q = jq.quantize(w, QSpec(name, PerChannel(0), range="signed"))
    np.testing.assert_array_equal(jq.dequantize(q)[:, 7], w[:, 7])
    assert (storage_codes(q)[:, 7] == reference.grid(name)[0]).all()
    assert (jnp.sign(q.scale) == -sign).all()


ODD = [QSpec(n, PerGroup(4, 0)) for n in ("int8", "int4", "int2", "nf4", *FLOATS)] + [
    QSpec("int8", PerGroup(4, 0), symmetric=False),
    QSpec("int4", PerGroup(4, 0), range="signed"),
    QSpec("int8", PerGroup(4, 0), scale_dtype="float16"),
    QSpec("int8", PerGroup(4, 0), scale_dtype="bfloat16"),
    QSpec("int8", PerGroup(4, 0), scale_dtype="float8_e8m0fnu"),
    QSpec("mxfp8", PerGroup(4, 0)),
    QSpec("mxfp4", PerGroup(4, 0)),
    QSpec("nvfp4", PerGroup(4, 0)),
]


@pytest.mark.parametrize("spec", ODD, ids=repr)
def test_extreme_magnitudes_stay_finite(spec):
    for value in (0.0, 1e-45, 1e-40, 1.2e-38, 1e-30, 1e30, 1e38, -1e38, 3.4e38, -3.4e38):
        if abs(value) > 1e38 and spec.scale_dtype == "float8_e8m0fnu":
            continue  # a power of two may round the largest float32 up to 2^128
        w = jnp.full((8, 3), value, jnp.float32).at[0, 0].multiply(0.5)
        q, restored = round_trip(w, spec)
        assert jnp.isfinite(q.scale.astype(jnp.float32)).all()
        if not (spec.format.is_codebook and abs(value) < 1e-38):  # bitsandbytes has 0 for zeros
            assert (q.scale.astype(jnp.float32) != 0).all()
        assert jnp.isfinite(restored).all()
        # half floats do not reach the ends of float32
        if 1e-30 <= abs(value) <= 1e30 and spec.scale_dtype != "float16":
            error = jnp.max(jnp.abs(restored / value - w / value))
            assert error < (0.51 if spec.format.bits < 4 else 0.2)
        if value == 0.0:
            np.testing.assert_array_equal(restored, w)


@pytest.mark.parametrize("name", ["int8", "int4", "nf4", "float8_e4m3fn"])
def test_float16_does_not_overflow(name):
    w = jnp.array([[65504.0, -65504.0, 1.0, 0.0]], jnp.float16)
    for rule in ("half", "qmax"):
        _, restored = round_trip(w, QSpec(name, PerChannel(0), range=rule))
        assert restored.dtype == jnp.float16
        assert jnp.isfinite(restored).all()


@pytest.mark.parametrize("name", ["int8", "int3", "nvfp4"])
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0, 2), (1,), (1, 5), (5, 1)])
def test_empty_arrays_and_axes_of_one(name, shape):
    for granularity in (PerTensor(), PerChannel(-1), PerGroup(4, 0)):
        w = data(shape)
        q, restored = round_trip(w, QSpec(name, granularity))
        q.validate()
        assert q.shape == restored.shape == shape
        assert jnp.isfinite(restored).all()
        np.testing.assert_allclose(restored, w, atol=1.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_comes_back(dtype):
    w = data(dtype=dtype)
    q = jq.quantize(w, QSpec("int8", PerChannel(1)))
    assert q.dtype == dtype
    assert jq.dequantize(q).dtype == jnp.dtype(dtype)
    assert jq.dequantize(q, jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "bytes_per_64"),
    [
        *(("int2", 16), ("int3", 24), ("int4", 32), ("int6", 48), ("int8", 64), ("nf4", 32)),
        *(("float6_e3m2fn", 48), ("float4_e2m1fn", 32), ("uint3", 24)),
    ],
)
def test_codes_are_packed(name, bytes_per_64):
    w = jnp.abs(data((10, 64)))
    q = jq.quantize(w, QSpec(name, PerChannel(0)))
    assert q.codes.nbytes == 10 * bytes_per_64
    assert q.nbytes == 10 * bytes_per_64 + 10 * 4
    assert q.bits_per_weight == pytest.approx(bytes_per_64 / 8 + 4 * 8 / 64)


def test_block_formats_store_what_they_promise():
    w = data((8, 256))
    assert jq.quantize(w, QSpec("mxfp4", PerGroup(32, 1))).bits_per_weight == 4.25
    assert jq.quantize(w, QSpec("mxfp8", PerGroup(32, 1))).bits_per_weight == 8.25
    nvfp4 = jq.quantize(w, QSpec("nvfp4", PerGroup(16, 1)))
    assert nvfp4.nbytes == 8 * 256 // 2 + 8 * 16 + 4
    assert nvfp4.global_scale.shape == ()


@pytest.mark.parametrize("spec", [ODD[1], ODD[3], ODD[4], ODD[9]], ids=repr)
def test_minor_changes_the_storage_only(spec):
    spec = QSpec(spec.format, PerChannel(1), spec.symmetric, spec.range)
    w = data((12, 6, 4))
    _, plain = round_trip(w, spec)
    q, minor = round_trip(w, spec, (0,))
    assert q.axes[-1] == (-3,)
    np.testing.assert_array_equal(plain, minor)


@pytest.mark.parametrize("name", ["int4", "nf4", "float8_e4m3fn"])
def test_stochastic_codes_do_not_depend_on_jit(name, key):
    w = data((32, 8), seed=5)
    spec = QSpec(name, PerGroup(16, 0))
    jitted = jax.jit(lambda w, k: jq.quantize(w, spec, key=k))(w, key)
    with jax.disable_jit():
        eager = jq.quantize(w, spec, key=key)
    np.testing.assert_array_equal(np.asarray(jitted.codes), np.asarray(eager.codes))
    other = jq.quantize(w, spec, key=jax.random.key(9))
    assert (np.asarray(other.codes) != np.asarray(jitted.codes)).any()


@pytest.mark.parametrize("name", ["int8", "int3", "nf4"])
def test_stochastic_rounding_has_no_bias(name):
    w = data((32,), seed=6)
    spec = QSpec(name, PerTensor())
    keys = jax.random.split(jax.random.key(1), 4000)
    restored = jax.jit(jax.vmap(lambda k: jq.dequantize(jq.quantize(w, spec, key=k))))(keys)
    inside = jnp.abs(w) < 0.8 * jnp.abs(w).max()
    spread = restored.std(axis=0) / np.sqrt(len(keys))
    bias = jnp.abs(restored.mean(axis=0) - w)
    assert (bias[inside] <= 5 * spread[inside] + 1e-6).all()


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (jnp.arange(4), "expected a float array, got int32"),
        (jnp.ones(4, jnp.complex64), "expected a float array, got complex64"),
        (jnp.array([1.0, jnp.nan]), "non-finite values"),
        (jnp.array([1.0, jnp.inf]), "non-finite values"),
    ],
)
def test_arrays_that_cannot_be_quantized(w, message):
    with pytest.raises(ValueError, match=message):
        jq.quantize(w, QSpec("int8", PerTensor()))


def test_validate_names_the_field():
    q = jq.quantize(data((8, 4)), QSpec("int8", PerChannel(1)))
    broken = jax.tree.map(lambda a: a.astype(jnp.float32), q)
    with pytest.raises(ValueError, match=r"QTensor.codes: expected int8\[8, 4\], got float32"):
        broken.validate()
