"""What reports advise of channels: what rules can follow, and that it gains what was said."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.observers import histogram, profile

X = np.random.default_rng(0).standard_normal((512, 16)).astype(np.float32)
X *= np.where(np.arange(16) == 5, 60, 1).astype(np.float32)
X[:, 3] = np.abs(X[:, 3])
ASYM = jq.int8(symmetric=False, granularity=jq.PerTensor())
PARAMS = {"w": jnp.eye(16), "v": jnp.eye(16)}


def fn(p: Any, x: Any) -> Any:
    return x @ p["w"], jnp.tanh(jnp.tanh(x) @ p["v"]) @ p["v"]


def test_advice_on_channels_is_what_rules_offer() -> None:
    rule = jq.Rule("**", weights=jq.int8(), activations=ASYM, observer=profile())
    stats, sites = jq.capture(fn, PARAMS, rule, batches=[X]), jq.trace(fn, PARAMS, X)
    report = jq.activation_report(stats, rule, sites)
    row = report["w"]
    assert row.suggestion == "per channel"
    assert [r.site for r in report] == ["w", "v", "v#1"] and len(report) == 3 and "w" in report
    channels = jq.w8a8_static(per_channel=True)
    q, _ = jq.ptq(lambda p, x: x @ p["w"], {"w": PARAMS["w"]}, channels, batches=[X])
    held = q["w"].calibration
    scale = np.asarray(held.divisor) * float(held.input.scale)
    error = X - np.clip(np.round(X / scale), -128, 127) * scale
    sqnr = 10 * np.log10(np.sum(X**2.0) / np.sum(error**2.0))
    assert row.sqnr_db + row.gain_db == pytest.approx(sqnr, abs=0.3)
    integer = jq.Rule(
        "**", weights=jq.int8(), activations=ASYM, observer=profile(), requantize="float32"
    )
    assert "per channel" not in {r.suggestion for r in jq.activation_report(stats, integer)}


def test_a_note_where_channels_are_not_known() -> None:
    int4 = jq.int4(granularity=jq.PerTensor())
    rule = jq.Rule("w", weights=jq.int8(), activations=int4, observer=histogram())
    stats = jq.capture(fn, PARAMS, rule, batches=[X])
    (note,) = jq.activation_report(stats, rule).notes
    assert note.startswith("w has less than 30 dB; captured with observers.profile()")
    known = jq.Rule("w", weights=jq.int8(), activations=int4, observer=profile())
    assert not jq.activation_report(jq.capture(fn, PARAMS, known, batches=[X]), known).notes
