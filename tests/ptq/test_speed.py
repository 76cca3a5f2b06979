"""Reports say once that a preset is slower than float, and which one is known to be faster."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxquant as jq
from jaxquant.interpret.calls import trace_call
from jaxquant.interpret.record import sites_of
from jaxquant.ops import speed as measured
from jaxquant.ops.speed import COLUMNS, TIMES, Kind, Load, kind_of, ratio, read
from jaxquant.ptq import speed
from jaxquant.ptq.speed import Meter

SIZE = 2048

# Figures of two machines, made up so that what is said does not change when others are measured.
ONE = read("""
integer  8  - integer | 0.6 0.4 0.3 0.6 0.7 0.7 | 1.4 0.8 0.7 0.5 | 0.1
integer  8  - float   | 0.5 0.4 0.5 0.9 1.4 1.0 | 1.3 1.2 1.2 1.0 | 0.1
integer  4 32 float   | 0.3 0.4 0.8 1.7 1.2 1.0 | 1.2 1.1 1.0 1.0 | 0.1
integer  4 64 integer | 0.4 0.4 0.4 1.3 1.5 1.6 | 0.9 1.4 1.6 1.6 | 0.1
float    4 32 float   | 2.2 2.4 1.2 2.0 1.2 1.0 | 1.3 1.0 1.0 1.1 | 0.1
float    8  - float8  | 2.0 2.0 1.2 1.6 1.2 1.2 | 2.0 1.8 1.6 1.1 | 0.2
codebook 4 64 float   | 2.8 2.4 1.4 2.0 1.2 1.0 | 1.4 1.0 1.2 1.1 | 0.1
""")
OTHER = read("""
integer  8  - integer | 0.8 0.5 0.4 0.3 0.3 0.3 | -   0.7 0.4 0.3 | 0.1
integer  8  - float   | 0.6 0.4 0.5 0.5 0.5 1.0 | -   1.0 1.0 1.0 | 0.1
integer  4 64 integer | -   -   -   0.8 0.8 1.0 | -   1.4 1.3 1.2 | 0.1
codebook 4 64 float   | 6.0 3.0 2.0 1.3 1.3 1.1 | -   1.1 1.0 1.1 | 0.1
""")


@pytest.fixture(autouse=True)
def _figures(monkeypatch) -> None:
    monkeypatch.setattr(measured, "TIMES", {"cpu": {(0, 10): {"one": ONE, "other": OTHER}}})


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def mlp(p, x):
    return jax.nn.relu(x @ p["up"]) @ p["down"]


def conv(p, x, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, p["w"], (2, 2), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


WEIGHTS = {"up": shape(SIZE, SIZE), "down": shape(SIZE, SIZE)}


def spoken(fn, params, recipe, *args, platforms="cpu") -> list[str]:
    _, report = jq.ptq(fn, params, recipe, *args, platforms=platforms)
    notes = [note for note in report.notes if note.startswith("speed:")]
    assert str(report).count("speed:") == len(notes)
    return notes


def loads_of(fn, params, *args) -> dict[str, Load]:
    meter = Meter()
    sites_of(trace_call(fn, params, args, {}), meter)
    return meter.loads


IN = "saves memory, not time: the layers take about"
OF = "float's time;"
SAID = {
    "codebook, 1 row": (jq.nf4(), 1, f"nf4 in groups of 64 at 1 row {IN} 2.8 to 6.0 times {OF} "
    "w4a16() takes about 0.3 times"),
    "codebook, 12 rows": (jq.nf4(), 12, f"nf4 in groups of 64 at 12 rows {IN} 1.4 to 2.0 times "
    f"{OF} w4a8() takes about 0.4 times"),
    "no 4 bits faster": (jq.nf4(), 256, f"nf4 in groups of 64 at 256 rows {IN} 1.2 to 1.3 times "
    f"{OF} w8a8() takes about 0.3 to 0.7 times"),
    "one machine": (jq.mxfp4(), 1, f"mxfp4 in groups of 32 at 1 row {IN} 2.2 times {OF} "
    "w4a16() takes about 0.3 times"),
    "8 bits": (jq.w8a8_fp8(), 1, "e4m3fn per channel, activations e4m3fn at 1 row "
    f"{IN} 2.0 times {OF} "
    "w8a16() takes about 0.5 to 0.6 times"),
    "large groups": (jq.nf4(group=512), 1, f"nf4 in groups of 512 at 1 row {IN} 2.8 to 6.0 times "
    f"{OF} w4a16() takes about 0.3 times"),
    "slow on one": (jq.w8a16(), 256, None),
    "as fast": (jq.mxfp4(), 5000, None),
    "faster": (jq.w8a8(), 1, None),
    "smaller groups": (jq.nf4(group=32), 1, None),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_what_is_said_of_a_preset(name) -> None:
    recipe, rows, text = SAID[name]
    expected = [] if text is None else [f"speed: on a CPU, {text}"]
    assert spoken(mlp, WEIGHTS, recipe, shape(rows, SIZE)) == expected


CONVOLVED = {
    "4 bits": ((3, 3, 64, 64), 1, jq.w4a8(), "int4 in groups of 128, activations int8 in "
    f"convolutions {IN} 1.3 to 1.6 times {OF} w8a8() takes about 0.4 to 0.7 times"),
    "narrow": ((3, 3, 3, 64), 1, jq.w8a8(), "int8 per channel, activations int8 in convolutions "
    f"{IN} 1.4 times float's time, and no preset is known to be faster than float here"),
    "8 bits": ((3, 3, 64, 64), 1, jq.w8a8(), None),
    "depthwise": ((3, 3, 1, 64), 64, jq.w4a8(), None),
    "grouped": ((3, 3, 32, 64), 2, jq.w4a8(), None),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLVED)
def test_what_is_said_of_convolutions(name) -> None:
    kernel, groups, recipe, text = CONVOLVED[name]
    fn = functools.partial(conv, groups=groups)
    image = shape(8, 112, 112, kernel[2] * groups)
    expected = [] if text is None else [f"speed: on a CPU, {text}"]
    assert spoken(fn, {"w": shape(*kernel)}, recipe, image) == expected


SILENT = {
    "w8a8": (mlp, WEIGHTS, jq.w8a8(), {}),
    "w8a16": (mlp, WEIGHTS, jq.w8a16(), {}),
    "tpu": (mlp, WEIGHTS, jq.nf4(), {"platforms": "tpu"}),
    "gpu": (mlp, WEIGHTS, jq.nf4(), {"platforms": ["gpu", "tpu"]}),
    "half": (mlp, {k: shape(SIZE, SIZE, dtype=jnp.float16) for k in WEIGHTS}, jq.nf4(), {}),
    "blocks": (mlp, WEIGHTS, jq.Rule("**", weights=jq.QSpec("nf4", jq.PerBlock(8, 8))), {}),
    "3 bits": (mlp, WEIGHTS, jq.Rule("**", weights=jq.int3()), {}),
}


@pytest.mark.parametrize("name", SILENT)
def test_nothing_is_said_of_what_is_faster_or_not_known(name) -> None:
    fn, params, recipe, options = SILENT[name]
    dtype = params["up"].dtype
    assert not spoken(fn, params, recipe, shape(4, SIZE, dtype=dtype), **options)


def test_nothing_is_said_of_small_layers() -> None:
    small = {"up": shape(64, 64), "down": shape(64, 64)}
    assert not spoken(mlp, small, jq.nf4(), shape(1, 64))


def test_once_for_all_platforms() -> None:
    assert len(spoken(mlp, WEIGHTS, jq.nf4(), shape(1, SIZE), platforms=["tpu", "cpu"])) == 1
    assert not jq.ptq(mlp, WEIGHTS, jq.w8a8(), shape(1, SIZE))[1].notes


NF4 = jq.QSpec("nf4", jq.PerGroup(64))
SLOW_DOWN = jq.Rule("down", weights=NF4)


MIXED = {
    "float": (jq.Recipe([SLOW_DOWN]), "1.9 to 3.5"),  # 1 and 2.8, 1 and 6
    "w8a8": (jq.w8a8().prepend(SLOW_DOWN), "1.7 to 3.4"),  # 0.6 and 2.8, 0.8 and 6
}


@pytest.mark.parametrize("rest", MIXED)
def test_a_slow_layer_counts_as_much_as_it_computes(rest) -> None:
    recipe, times = MIXED[rest]
    (note,) = spoken(mlp, WEIGHTS, recipe, shape(1, SIZE))
    assert f"nf4 in groups of 64 at 1 row {IN} {times} times {OF}" in note
    small = {"up": shape(SIZE, SIZE), "down": shape(SIZE, SIZE // 16)}
    assert not spoken(mlp, small, recipe, shape(1, SIZE))


def test_the_range_of_rows_is_that_of_the_slow_layers() -> None:
    two = lambda p, x: (x @ p["up"], x[:2] @ p["down"], x[:1] @ p["last"])
    params = WEIGHTS | {"last": shape(SIZE, SIZE)}
    recipe = jq.Recipe(jq.nf4()).prepend(jq.Rule("last", weights=jq.int8()))
    (note,) = spoken(two, params, recipe, shape(8, SIZE))
    assert "nf4 in groups of 64 at 2 to 8 rows saves" in note


def test_leaves_quantized_before_are_counted() -> None:
    once, _ = jq.ptq(mlp, WEIGHTS, jq.Recipe([SLOW_DOWN]), shape(1, SIZE))
    (note,) = spoken(mlp, once, jq.Rule("up", weights=jq.int8()), shape(1, SIZE))
    assert note.startswith("speed: on a CPU, nf4 at 1 row saves")


def test_where_no_preset_is_faster_that_is_said(monkeypatch) -> None:
    monkeypatch.setattr(speed, "_CHOICES", (jq.nf4,))
    (note,) = spoken(mlp, WEIGHTS, jq.nf4(), shape(1, SIZE))
    assert note.endswith("float's time, and no preset is known to be faster than float here")


def test_layers_of_a_scan_and_convolutions_are_counted() -> None:
    layers = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    assert loads_of(layers, {"w": shape(6, 8, 8)}, shape(3, 8)) == {"w": Load("dense", 3, 8, 64, 6)}
    steps = lambda p, x: lax.scan(lambda h, x: (jnp.tanh(h @ p["w"] + x), None), x[0], x)[0]
    assert loads_of(steps, {"w": shape(8, 8)}, shape(5, 3, 8)) == {"w": Load("dense", 3, 8, 64, 5)}
    image = shape(2, 8, 6, 4)
    assert loads_of(conv, {"w": shape(3, 3, 4, 5)}, image) == {"w": Load("conv", 24, 36, 180)}
    deep = loads_of(conv, {"w": shape(3, 3, 1, 8)}, image, 4)
    assert deep == {"w": Load("depthwise", 24, 9, 72)}
    assert loads_of(conv, {"w": shape(3, 3, 2, 4)}, image, 2)["w"].op is None
    heads = lambda p, x: jnp.einsum("btk,khd->bthd", x, p["w"])
    found = loads_of(heads, {"w": shape(8, 3, 2)}, shape(2, 6, 8))
    assert found == {"w": Load("dense", 12, 8, 48)}
    experts = lambda p, x: jnp.einsum("ebk,ekn->ebn", x, p["w"])
    assert loads_of(experts, {"w": shape(4, 8, 6)}, shape(4, 2, 8))["w"].op is None
    tied = lambda p, x: (p["table"][x] @ p["w"]) @ p["table"].T
    found = loads_of(tied, {"table": shape(9, 8), "w": shape(8, 8)}, shape(3, dtype=jnp.int32))
    assert found == {"w": Load("dense", 3, 8, 64), "table#1": Load("dense", 3, 8, 72)}


def test_symbolic_sizes_are_not_guessed() -> None:
    (n,) = jax.export.symbolic_shape("n")
    assert not spoken(mlp, WEIGHTS, jq.nf4(), shape(n, SIZE))


@pytest.mark.parametrize("platform", TIMES)
def test_the_tables_are_whole(platform) -> None:
    for machines in TIMES[platform].values():
        for rows in machines.values():
            assert len({row.kind for row in rows}) == len(rows)
            for row in rows:
                for op, columns in COLUMNS.items():
                    assert len(row.ratios[op]) == len(columns)
                    assert all(r is None or 0 < r < 100 for r in row.ratios[op])


def test_the_nearest_row_and_column() -> None:
    kind = kind_of(jq.int4(group=64))
    for rows, expected in ((1, 0.3), (12, 0.8), (5000, 1.0)):
        load = Load("dense", rows, SIZE, SIZE**2)
        assert ratio("cpu", load, kind, (0, 12)) == (expected, expected)
        assert ratio("cpu", load, kind, (0, 9)) is None
        assert ratio("cpu", load, kind._replace(group=16)) is None
        assert ratio("cpu", load._replace(op=None), kind) is None
    assert ratio("cpu", Load("dense", 1, 64, 64 * 64), kind) is None
    assert kind_of(jq.int4(group=64), summed=64) == Kind("integer", 4, None, "float")
