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


def data(shape=SHAPE, seed=0, dtype="float32"):
    normal = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return normal.astype(jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(1, 2))
def round_trips(arrays, specs, storage_last_axes=()):
    """Each array by its spec, all in one program: most of the time goes into compilation."""
    qs = [
        jq.quantize(w, spec, storage_last_axes=storage_last_axes)
        for w, spec in zip(arrays, specs, strict=True)
    ]
    return [(q, jq.dequantize(q)) for q in qs]


codes_of = jax.jit(storage_codes)


ACCURACY = [
    (QSpec("int8", PerChannel(0)), lambda x: x, 0.00766),
    (QSpec("int4", PerChannel(0)), lambda x: x, 0.1226),
    (QSpec("nf4", PerGroup(32, 1)), lambda x: x, 0.0990),
    (QSpec("int8", PerChannel(0), symmetric=False), lambda x: x + 1, 0.00522),
    (QSpec("mxfp8", PerGroup(32, 1)), lambda x: x, 0.0224),
    (QSpec("mxfp4", PerGroup(32, 1)), lambda x: x, 0.1080),
    (QSpec("nvfp4", PerGroup(16, 1)), lambda x: x, 0.0894),
    (QSpec("nvfp4", PerGroup(16, 1)), lambda x: x * 1e-3, 0.0894),
    (QSpec("nvfp4", PerGroup(16, 1)), lambda x: x * 1e4, 0.0894),
]


def test_accuracy_on_normal_data():
    normal = jax.random.normal(jax.random.key(42), (10, 256, 16), jnp.bfloat16)
    normal = np.asarray(normal, np.float32)
    arrays = [transform(normal).astype(jnp.bfloat16) for _, transform, _ in ACCURACY]

    @jax.jit
    def run(arrays):
        pairs = zip(arrays, ACCURACY, strict=True)
        return [jq.dequantize(jq.quantize(x, spec), jnp.float32) for x, (spec, *_) in pairs]

    for x, restored, (spec, _, bound) in zip(arrays, run(arrays), ACCURACY, strict=True):
        wide = x.astype(np.float64)
        error = np.abs(np.asarray(restored, np.float64) - wide).mean() / np.abs(wide).mean()
        print(f"{spec}: mean |error| / mean |x| = {error:.5f}, at most {bound}")
        assert error <= bound, spec


@pytest.mark.parametrize("name", [*INTEGERS, *UNSIGNED, *FLOATS, "nf4"])
def test_within_half_a_step_of_the_grid(name):
    w = np.abs(data()) if name.startswith("u") else data()
    check_granularities(w, [QSpec(name, granularity) for granularity in GRANULARITIES])


@pytest.mark.parametrize("name", ["int2", "int4", "int6", "int8", "uint3", "uint8"])
def test_asymmetric_within_half_a_step(name):
    w = data() + np.float32(0.7)
    check_granularities(w, [QSpec(name, g, symmetric=False) for g in GRANULARITIES])


def check_granularities(w, specs):
    made = round_trips([w] * len(specs), tuple(specs))
    for spec, (q, restored) in zip(specs, made, strict=True):
        q.validate()
        check_half_step(w.astype(np.float64), np.asarray(restored, np.float64), spec)


def check_half_step(w, restored, spec):
    name = spec.format.name
    scale, zero = reference.scales(w, spec)
    bound = scale * reference.half_step(w / scale + zero, name)
    rounding = 4e-7 * (np.abs(w) + scale * np.abs(zero))  # of float32
    assert (np.abs(restored - w) <= bound + rounding).all(), spec
    # and a multiple of the scale that the formula gives
    steps = restored / scale + zero
    assert (reference.nearest(steps, name) <= 1e-6 * (1 + np.abs(steps) + np.abs(zero))).all(), spec


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "int8"])
def test_range_rules_against_the_reference(name):
    specs = [QSpec(name, PerGroup(4, 1), range=rule) for rule in ("half", "qmax", "signed")]
    w = data(seed=3)
    for spec, (_, restored) in zip(specs, round_trips([w] * 3, tuple(specs)), strict=True):
        scale, _ = reference.scales(w, spec)
        restored = np.asarray(restored, np.float64)
        values = reference.grid(name)
        expected = np.clip(np.round(w.astype(np.float64) / scale), values[0], values[-1]) * scale
        # where division falls within rounding of a tie, either neighbour is right
        fraction = np.abs(w.astype(np.float64) / scale) % 1
        tie = np.abs(fraction - 0.5) < 1e-5
        np.testing.assert_allclose(
            restored[~tie], expected[~tie], rtol=1e-5, atol=1e-7, err_msg=spec.range
        )


@pytest.mark.parametrize("name", [*INTEGERS, *FLOATS, "nf4"])
def test_data_on_the_grid_comes_back_exactly(name):
    # given its scale: where the largest magnitude falls on the largest code, it is found again
    granularities = (PerTensor(), PerChannel(1), PerGroup(8, 0))
    specs = tuple(QSpec(name, granularity, range="qmax") for granularity in granularities)
    once = round_trips([data((16, 6), seed=1)] * 3, specs)
    twice = round_trips([restored for _, restored in once], specs)
    for spec, (first, restored), (second, again) in zip(specs, once, twice, strict=True):
        codes = np.asarray(first.codes)
        np.testing.assert_array_equal(codes, np.asarray(second.codes), err_msg=repr(spec))
        np.testing.assert_allclose(again, restored, rtol=3e-7, err_msg=repr(spec))


def test_integers_come_back_bit_for_bit_with_range_qmax():
    tops = [2 ** (bits - 1) - 1 for bits in range(2, 9)]
    arrays = [np.arange(-top, top + 1, dtype=np.float32)[None, :] for top in tops]
    specs = tuple(QSpec(f"int{bits}", PerTensor(), range="qmax") for bits in range(2, 9))
    for w, spec, (_, restored) in zip(arrays, specs, round_trips(arrays, specs), strict=True):
        np.testing.assert_array_equal(restored, w, err_msg=repr(spec))


def test_ternary_comes_back_bit_for_bit():
    w = np.random.default_rng(0).integers(-1, 2, (64, 8)) * np.float32(0.37)
    q = jq.quantize(w, QSpec("int2", PerChannel(1), range="qmax"))
    np.testing.assert_array_equal(jq.dequantize(q), w)


def test_the_negative_extreme_takes_the_lowest_code():
    widths = (2, 3, 4, 6, 8)
    specs = tuple(QSpec(f"int{bits}", PerTensor()) for bits in widths)

    @jax.jit
    def run(w):
        return [storage_codes(jq.quantize(w, spec)) for spec in specs]

    for seed in range(8):
        w = data((32,), seed=seed)
        w[3] = -5.0 - 0.123 * seed
        for bits, low, high in zip(widths, run(w), run(-w), strict=True):
            assert np.min(low) == -(2 ** (bits - 1)), (bits, seed)
            assert np.max(high) == 2 ** (bits - 1) - 1, (bits, seed)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_the_signed_rule_keeps_the_extreme(name, sign):
    w = data((4, 32), seed=2)
    w[:, 7] = sign * np.array([4.0, 5.5, 8.0, 16.0])
    q = jq.quantize(w, QSpec(name, PerChannel(0), range="signed"))
    np.testing.assert_array_equal(np.asarray(jq.dequantize(q))[:, 7], w[:, 7])
    assert (np.asarray(codes_of(q))[:, 7] == reference.grid(name)[0]).all()
    assert (np.sign(q.scale) == -sign).all()


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


@jax.jit
def nonzero(scales):
    """Which arrays of scales have no zero, nor what a processor takes for one."""
    return [(scale.astype(jnp.float32) != 0).all() for scale in scales]


def test_extreme_magnitudes_stay_finite():
    for value in (0.0, 1e-45, 1e-40, 1.2e-38, 1e-30, 1e30, 1e38, -1e38, 3.4e38, -3.4e38):
        w = np.full((8, 3), value, np.float32)
        w[0, 0] *= 0.5
        made = round_trips([w] * len(ODD), tuple(ODD))
        some = nonzero([q.scale for q, _ in made])
        for spec, (q, restored), whole in zip(ODD, made, some, strict=True):
            if abs(value) > 1e38 and spec.scale_dtype == "float8_e8m0fnu":
                continue  # a power of two may round the largest float32 up to 2^128
            restored, case = np.asarray(restored), (spec, value)
            assert np.isfinite(np.asarray(q.scale, np.float32)).all(), case
            # bitsandbytes has 0 for zeros
            assert whole or (spec.format.is_codebook and abs(value) < 1e-38), case
            assert np.isfinite(restored).all(), case
            # half floats do not reach the ends of float32
            if 1e-30 <= abs(value) <= 1e30 and spec.scale_dtype != "float16":
                error = np.max(np.abs(restored / value - w / value))
                assert error < (0.51 if spec.format.bits < 4 else 0.2), case
            if value == 0.0:
                np.testing.assert_array_equal(restored, w)


def test_float16_does_not_overflow():
    w = np.array([[65504.0, -65504.0, 1.0, 0.0]], np.float16)
    names, rules = ("int8", "int4", "nf4", "float8_e4m3fn"), ("half", "qmax")
    specs = tuple(QSpec(name, PerChannel(0), range=rule) for name in names for rule in rules)
    for spec, (_, restored) in zip(specs, round_trips([w] * 8, specs), strict=True):
        assert restored.dtype == jnp.float16, spec
        assert np.isfinite(restored).all(), spec


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0, 2), (1,), (1, 5), (5, 1)])
def test_empty_arrays_and_axes_of_one(shape):
    granularities = (PerTensor(), PerChannel(-1), PerGroup(4, 0))
    specs = tuple(QSpec(n, g) for n in ("int8", "int3", "nvfp4") for g in granularities)
    w = data(shape)
    for spec, (q, restored) in zip(specs, round_trips([w] * len(specs), specs), strict=True):
        q.validate()
        assert q.shape == restored.shape == shape, spec
        assert np.isfinite(restored).all(), spec
        np.testing.assert_allclose(restored, w, atol=1.5, err_msg=repr(spec))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_comes_back(dtype):
    def run(w):
        q = jq.quantize(w, QSpec("int8", PerChannel(1)))
        return q, jq.dequantize(q), jq.dequantize(q, jnp.float32)

    q, restored, wide = jax.eval_shape(run, data(dtype=dtype))
    assert q.dtype == dtype
    assert restored.dtype == jnp.dtype(dtype)
    assert wide.dtype == jnp.float32


def promised(w, spec):
    """The QTensor of `w`, of shapes alone: what it takes is known from them."""
    return jax.eval_shape(lambda w: jq.quantize(w, spec), w)


@pytest.mark.parametrize(
    ("name", "bytes_per_64"),
    [
        *(("int2", 16), ("int3", 24), ("int4", 32), ("int6", 48), ("int8", 64), ("nf4", 32)),
        *(("float6_e3m2fn", 48), ("float4_e2m1fn", 32), ("uint3", 24)),
    ],
)
def test_codes_are_packed(name, bytes_per_64):
    q = promised(data((10, 64)), QSpec(name, PerChannel(0)))
    assert q.codes.size * q.codes.dtype.itemsize == 10 * bytes_per_64
    assert q.nbytes == 10 * bytes_per_64 + 10 * 4
    assert q.bits_per_weight == pytest.approx(bytes_per_64 / 8 + 4 * 8 / 64)


def test_block_formats_store_what_they_promise():
    w = data((8, 256))
    assert promised(w, QSpec("mxfp4", PerGroup(32, 1))).bits_per_weight == 4.25
    assert promised(w, QSpec("mxfp8", PerGroup(32, 1))).bits_per_weight == 8.25
    nvfp4 = jq.quantize(w, QSpec("nvfp4", PerGroup(16, 1)))
    assert nvfp4.nbytes == 8 * 256 // 2 + 8 * 16 + 4
    assert nvfp4.global_scale.shape == ()


def test_minor_changes_the_storage_only():
    odd = [ODD[1], ODD[3], ODD[4], ODD[9]]
    specs = tuple(QSpec(s.format, PerChannel(1), s.symmetric, s.range) for s in odd)
    arrays = [data((12, 6, 4))] * len(specs)
    pairs = zip(round_trips(arrays, specs), round_trips(arrays, specs, (0,)), strict=True)
    for spec, ((_, plain), (q, storage_last_axes)) in zip(specs, pairs, strict=True):
        assert q.axes[-1] == (-3,), spec
        np.testing.assert_array_equal(plain, storage_last_axes, err_msg=repr(spec))


@pytest.mark.parametrize("name", ["int4", "nf4", "float8_e4m3fn"])
def test_stochastic_codes_do_not_depend_on_jit(name, key):
    w = data((32, 8), seed=5)
    spec = QSpec(name, PerGroup(16, 0))
    run = jax.jit(lambda w, k: jq.quantize(w, spec, key=k))
    jitted = run(w, key)
    with jax.disable_jit():
        eager = jq.quantize(w, spec, key=key)
    np.testing.assert_array_equal(np.asarray(jitted.codes), np.asarray(eager.codes))
    other = run(w, jax.random.key(9))
    assert (np.asarray(other.codes) != np.asarray(jitted.codes)).any()


def test_stochastic_rounding_has_no_bias():
    w = data((32,), seed=6)
    specs = [QSpec(name, PerTensor()) for name in ("int8", "int3", "nf4")]
    keys = jax.random.split(jax.random.key(1), 4000)

    @jax.jit
    @jax.vmap
    def run(k):
        return [jq.dequantize(jq.quantize(w, spec, key=k)) for spec in specs]

    inside = np.abs(w) < 0.8 * np.abs(w).max()
    for spec, restored in zip(specs, run(keys), strict=True):
        drawn = np.asarray(restored, np.float64)
        spread = drawn.std(axis=0) / np.sqrt(len(keys))
        bias = np.abs(drawn.mean(axis=0) - w)
        assert (bias[inside] <= 5 * spread[inside] + 1e-6).all(), spec


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (np.arange(4, dtype=np.int32), "expected a float array, got int32"),
        (np.ones(4, np.complex64), "expected a float array, got complex64"),
        (np.float32([1.0, np.nan]), "non-finite values"),
        (np.float32([1.0, np.inf]), "non-finite values"),
    ],
)
def test_arrays_that_cannot_be_quantized(w, message):
    with pytest.raises(ValueError, match=message):
        jq.quantize(w, QSpec("int8", PerTensor()))


def test_validate_names_the_field():
    q = jq.quantize(data((8, 4)), QSpec("int8", PerChannel(1)))
    broken = jax.tree.map(lambda a: np.asarray(a, np.float32), q)
    with pytest.raises(ValueError, match=r"QTensor.codes: expected int8\[8, 4\], got float32"):
        broken.validate()
