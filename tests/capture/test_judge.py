"""`activation_report`: figures against the data themselves, and what it advises."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant as jq
from jaxquant.capture import Statistics
from jaxquant.observers import absmax, histogram, minmax, mse, percentile, profile

TENSOR = jq.PerTensor()
INT8, ASYM = jq.int8(granularity=TENSOR), jq.int8(symmetric=False, granularity=TENSOR)
INT4 = jq.int4(granularity=TENSOR)
ROWS = 512
RNG = np.random.default_rng(0)
EVEN = RNG.uniform(-1, 1, (ROWS, 16)).astype(np.float32)
NORMAL = RNG.standard_normal((ROWS, 16)).astype(np.float32)
HEAVY = np.where(RNG.random((ROWS, 16)) < 1e-3, 40, 1).astype(np.float32) * NORMAL
WIDE = NORMAL * np.where(np.arange(16) == 5, 30, 1).astype(np.float32)
WIDE[:2, 5] = 100, -100

# data, spec, observer, what is advised
CASES: dict[str, tuple[np.ndarray, jq.QSpec, Any, str]] = {
    "even": (EVEN, INT8, profile(), ""),
    "relu": (np.maximum(EVEN, 0), INT8, profile(), "asymmetric"),
    "relu shifted": (np.maximum(EVEN, 0), ASYM, profile(), ""),
    "heavy": (HEAVY, INT4, histogram(), "mse"),
    "heavy, best": (HEAVY, INT4, mse(), ""),
    "wide": (WIDE, INT8, profile(), "per channel"),
    "wide, no channels": (WIDE, INT8, histogram(), ""),
    "clipped": (NORMAL, ASYM, percentile(90.0), "mse"),
}


def dense(p: Any, x: Any) -> Any:
    return {name: x[name] @ p[name] for name in CASES}


@functools.cache
def captured() -> tuple[Statistics, list[jq.Rule]]:
    params = {name: jnp.ones((16, 2)) for name in CASES}
    batches = [{name: jnp.asarray(x[i::2]) for name, (x, *_) in CASES.items()} for i in range(2)]
    recipe = [
        jq.Rule(name, weights=jq.int8(), activations=spec, observer=observer)
        for name, (_, spec, observer, _) in CASES.items()
    ]
    return jq.capture(dense, params, recipe, batches=batches), recipe


def rounded(
    x: np.ndarray, row: jq.report.SiteReport, spec: jq.QSpec
) -> tuple[np.ndarray, np.ndarray]:
    """What codes of a range stand for, float64; and which values lie beyond all codes."""
    x, least, most = x.astype(np.float64), spec.format.qmin, spec.format.qmax
    if spec.symmetric:
        scale, zero = max(-row.low, row.high) / (most + 0.5), 0.0
    else:
        scale = (row.high - row.low) / (most - least)
        zero = np.clip(least - np.round(row.low / scale), least, most)
    codes = np.round(x / scale) + zero
    held = np.clip(codes, least, most)
    edge = (1 + 1e-6) * (np.where(x > 0, most - zero, zero - least) + 0.5) * scale
    return (held - zero) * scale, np.abs(x) > edge


@pytest.mark.parametrize("name", CASES)
def test_figures_are_those_of_the_data(name: str) -> None:
    x, spec, observer, advice = CASES[name]
    report = jq.activation_report(*captured())
    row = report[name]
    assert row.operand == "lhs"
    kind = "" if spec.symmetric else " asymmetric"
    assert row.how == f"{spec.format.name}{kind}, {observer!r}"
    if name in ("even", "relu", "relu shifted", "wide"):
        assert (row.low, row.high) == (min(x.min(), 0), max(x.max(), 0))
    values, outside = rounded(x, row, spec)
    sqnr = 10 * np.log10(np.sum(x.astype(np.float64) ** 2) / np.sum((x - values) ** 2))
    assert row.sqnr_db == pytest.approx(sqnr, abs=0.3)
    # as stated: the mass of the two bins in which clipping begins
    width = 2 * 2.0 ** int(captured()[0][name]["lhs"].state["exponent"]) / 2048
    ends = [row.high + (row.high - row.low) / 510, row.low - (row.high - row.low) / 510]
    near = sum(np.mean(np.abs(x - end) <= width + abs(end) / 200) for end in ends)
    assert row.clipped == pytest.approx(outside.mean(), abs=near + 1e-9)
    assert (row.clipped > 0) == (name in ("heavy, best", "clipped"))
    assert row.suggestion == advice
    assert (row.gain_db >= 1) == bool(advice)


@pytest.mark.parametrize(
    ("name", "spec", "observer"),
    [("relu", ASYM, profile()), ("heavy", INT4, mse()), ("clipped", ASYM, mse())],
)
def test_what_is_advised_gains_what_was_said(name: str, spec: jq.QSpec, observer: Any) -> None:
    x, stats = CASES[name][0], captured()[0]
    before = jq.activation_report(*captured())[name]
    seen = dataclasses.replace(stats[name]["lhs"], observer=observer)
    low, high = seen.finish(spec)
    row = dataclasses.replace(before, low=float(low), high=float(high))
    values, _ = rounded(x, row, spec)
    sqnr = 10 * np.log10(np.sum(x.astype(np.float64) ** 2) / np.sum((x - values) ** 2))
    assert before.sqnr_db + before.gain_db == pytest.approx(sqnr, abs=0.5)


def test_each_layer_of_a_loop_has_a_row() -> None:
    def fn(p: Any, x: Any) -> Any:
        return lax.scan(lambda h, w: (jax.nn.relu(h) @ w, None), x, p["w"])[0]

    w = jnp.stack([jnp.eye(16), 2 * jnp.eye(16), 4 * jnp.eye(16)])
    rule = jq.Rule("**", weights=jq.int8(), activations=INT8, observer=profile())
    stats = jq.capture(fn, {"w": w}, rule, batches=[jnp.asarray(EVEN)])
    report = jq.activation_report(stats, rule)
    assert [row.site for row in report.sites] == ["w[0]", "w[1]", "w[2]"]
    top = float(EVEN.max())
    assert [row.high for row in report.sites] == [top, top, 2 * top]
    assert {row.suggestion for row in report.sites} == {"asymmetric"}
    assert report["w[0]"].sqnr_db == pytest.approx(report["w[2]"].sqnr_db, abs=1e-6)
    with pytest.raises(KeyError):
        report["w"]


def attention(p: Any, x: Any) -> Any:
    q, k = x @ p["q"], x @ p["k"]
    scores = jax.nn.softmax(q @ k.T, axis=-1)
    numbers = ("NWC", "WIO", "NWC")
    y = lax.conv_general_dilated(
        (scores @ k)[None], p["c"], (1,), "SAME", dimension_numbers=numbers
    )
    return jnp.einsum("bt,tn->bn", x.T, p["other"]) + y.sum() + x.T.sum() * p["bias"]


def test_only_what_a_rule_can_follow_is_advised() -> None:
    x = jnp.asarray(WIDE[:32])
    params = {n: 0.2 * jnp.eye(16) for n in "qk"}
    params |= {"c": jnp.ones((3, 16, 4)), "other": jnp.ones((32, 2)), "bias": jnp.ones((1, 1))}
    rules = [
        jq.Rule("**", weights=jq.int8(), activations=INT8, observer=profile()),
        jq.Rule("**", attention=INT8, observer=profile()),
    ]
    stats, sites = jq.capture(attention, params, rules, batches=[x]), jq.trace(attention, params, x)
    report = jq.activation_report(stats, rules, sites)
    by = {(row.site, row.operand): row for row in report.sites}
    assert by["q", "lhs"].suggestion == "per channel"
    both = {key for key in stats if len(stats[key]) == 2}
    assert len(both) == 2
    for key in (*[(k, side) for k in both for side in ("lhs", "rhs")], ("c", "lhs")):
        # attention takes one scale for all, and so does a convolution
        assert by[key].suggestion != "per channel", key
    assert by["c", "lhs"].how == "int8, profile()"
    (scores,) = [row for row in report.sites if row.how.startswith("uint8")]
    assert scores.operand == "lhs"
    assert (scores.low, scores.high <= 1) == (0.0, True)
    # a zero point would gain nothing there; with signed codes it would
    assert scores.suggestion != "asymmetric"
    signed = jq.activation_report(stats, rules)
    assert {r.how for r in signed.sites} == {"int8, profile()"}
    assert signed[scores.site].sqnr_db < scores.sqnr_db - 2


def test_a_channel_that_is_never_used_does_not_hide_the_others() -> None:
    x = (0.01 * WIDE * (np.arange(16) != 3)).astype(np.float32)
    rule = jq.Rule("**", weights=jq.int8(), activations=INT8, observer=profile())
    stats = jq.capture(
        lambda p, x: x @ p["w"], {"w": jnp.ones((16, 2))}, rule, batches=[jnp.asarray(x)]
    )
    assert jq.activation_report(stats, rule)["w"].suggestion == "per channel"


@pytest.mark.parametrize(
    ("observer", "granularity"),
    [
        (minmax(), TENSOR),
        (absmax(axis=-1), jq.PerChannel(-1)),
        (histogram(axis=-1), jq.PerChannel(-1)),
    ],
)
def test_observers_without_one_histogram_give_the_range(observer: Any, granularity: Any) -> None:
    spec = jq.int8(granularity=granularity)
    rule = jq.Rule("**", weights=jq.int8(), activations=spec, observer=observer)
    stats = jq.capture(lambda p, x: x @ p["w"], {"w": jnp.ones((16, 2))}, rule, batches=[EVEN])
    report = jq.activation_report(stats, rule)
    row = report["w"]
    assert (row.clipped, row.sqnr_db, row.suggestion) == (None, None, "")
    amax = float(np.abs(EVEN).max())
    assert (row.high == amax) or (row.low, row.high) == (EVEN.min(), EVEN.max())
    (note,) = report.notes
    assert "profile()" in note
    line = str(report).splitlines()[2].split()
    assert line[-2:] == ["-", "-"]
    json.dumps(report.to_dict(), allow_nan=False)


def test_no_signal_is_json_and_a_dash() -> None:
    rule = jq.Rule("**", weights=jq.int8(), activations=INT8, observer=profile())
    zeros = jnp.zeros((4, 16))
    stats = jq.capture(lambda p, x: x @ p["w"], {"w": jnp.ones((16, 2))}, rule, batches=[zeros])
    report = jq.activation_report(stats, rule)
    assert report["w"].clipped == 0.0
    assert str(report).splitlines()[2].split()[-1] == "-"
    (row,) = json.loads(json.dumps(report.to_dict(), allow_nan=False))["sites"]
    assert row["sqnr_db"] is None and row["site"] == "w"


def test_the_report_of_ptq_has_it() -> None:
    rule = jq.Rule("**", weights=jq.int8(), activations=INT8, observer=profile())
    relu = jnp.maximum(jnp.asarray(NORMAL), 0)
    _, report = jq.ptq(lambda p, x: x @ p["w"], {"w": jnp.ones((16, 2))}, rule, batches=[relu])
    assert report.activations["w"].suggestion == "asymmetric"
    assert "asymmetric: +" in str(report)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["activations"]["sites"][0]["suggestion"] == "asymmetric"


def test_mistakes() -> None:
    stats, recipe = captured()
    with pytest.raises(ValueError, match=r"expected the result of jaxquant\.capture, got dict"):
        jq.activation_report({}, recipe)
    with pytest.raises(ValueError, match=r"activation_report: expected a Recipe.*got None"):
        jq.activation_report(stats, None)
    with pytest.raises(ValueError, match=r"w8a16.* quantizes no activation .*\(even, relu, "):
        jq.activation_report(stats, jq.w8a16())
    channels = jq.w8a8_static(per_channel=True)
    assert len(jq.activation_report(stats, channels).sites) == len(CASES)
    some = jq.Recipe([jq.Rule("even", skip=True), *channels])
    assert "even" not in {row.site for row in jq.activation_report(stats, some).sites}
