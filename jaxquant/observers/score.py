"""How well a range serves, and what would serve better, judged from a histogram."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxquant.observers.base import Range
from jaxquant.observers.noise import Bars, Floats, bars, clip_points, noise, scales
from jaxquant.observers.search import Ends, mse_range, percentile_range
from jaxquant.qtensor import QSpec


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a range represents what was seen.

    Attributes:
      clipped: the fraction of the values beyond what the spec can represent.
      sqnr_db: signal to quantization noise ratio, `10 log10(sum x^2 / sum (x - x_hat)^2)`;
        `inf` without noise, `nan` without signal.
      signal: mean of `x^2`.
    """

    clipped: float
    sqnr_db: float
    signal: float


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A better way to quantize an activation.

    Attributes:
      what: `"asymmetric"`, `"per channel"`, or an observer: `"mse"`, `"percentile(99.99)"`.
      sqnr_db: the ratio it is expected to give.
      gain_db: how much that is above the one in use.
    """

    what: str
    sqnr_db: float
    gain_db: float


def score(state: Mapping[str, Any], range: Range, spec: QSpec) -> Score:
    """Judges a range for what a histogram has seen: clipped fraction and SQNR.

    Rounding and clipping noise are those of values spread evenly within each bin. So the clipped
    fraction is wrong by at most the mass of the two bins in which clipping begins. The ratio of
    smooth data is within 0.3 dB of the true one, as tested; data that lie on a grid of their own
    are judged as if they did not.

    Args:
      state: of `histogram`, `profile` or another that keeps one, per tensor.
      range: per tensor.
      spec: format and range rule.

    >>> import jax
    >>> from jaxquant.observers import histogram
    >>> x = jax.random.normal(jax.random.key(0), (10000,))
    >>> state = histogram().update(histogram().init(x), x)
    >>> found = score(state, histogram().finish(state, QSpec("int8")), QSpec("int8"))
    >>> found.clipped, round(found.sqnr_db)
    (0.0, 41)
    """
    seen = bars(state)
    return _score(seen, (float(range.low), float(range.high)), spec)


def _score(seen: Bars, ends: Ends, spec: QSpec) -> Score:
    low, high = (np.array([end]) for end in ends)
    scale, zero = scales(low, high, spec)
    under, over = clip_points(scale, zero, spec.format)
    # scales are float32: a range's own end must not count as beyond it
    under, over = (end * (1 + 1e-6) for end in (under, over))
    inside = seen.up_to(over)[0] - seen.up_to(under)[0]
    total = max(seen.total, 1.0)
    clipped = max(float(seen.counts.sum() - inside[0]), 0.0) / total
    error = float(noise(seen, low, high, spec)[0])
    return Score(clipped, _decibels(seen.signal, error), seen.signal / total)


def _decibels(signal: float, error: float) -> float:
    if signal == 0:
        return math.nan
    return math.inf if error == 0 else 10 * (math.log10(signal) - math.log10(error))


def suggest(
    state: Mapping[str, Any],
    range: Range,
    spec: QSpec,
    channels: Any = None,
    min_gain_db: float = 1.0,
) -> Suggestion | None:
    """The best of a few alternatives to a range, if it gains enough.

    They are: an asymmetric spec over `[min, max]`, for integers; the range that `mse` or
    `percentile` at 99.99 or 99.9 would choose; a scale for each channel, for integers, without
    zero points, as `w8a8_static(per_channel=True)` has them: its noise is taken to be `S_c^2 / 12`
    for values other than zero, `S_c` from the channel's absmax or `2^-8` of the largest one. That
    is the noise of the activation; what the weights, which take these scales over, lose is not in
    it.

    Args:
      state: of `histogram`, `profile` or another that keeps one, per tensor.
      range: in use, per tensor.
      spec: in use.
      channels: `[features]`, the absmax of each channel; by default the state's own, if it has one.
      min_gain_db: what a suggestion must gain at least.

    >>> import jax
    >>> from jaxquant.observers import histogram
    >>> x = jax.nn.relu(jax.random.normal(jax.random.key(0), (10000,)))
    >>> state = histogram().update(histogram().init(x), x)
    >>> found = suggest(state, histogram().finish(state, QSpec("int8")), QSpec("int8"))
    >>> found.what, round(found.gain_db)
    ('asymmetric', 6)
    """
    seen = bars(state)
    now = _score(seen, (float(range.low), float(range.high)), spec).sqnr_db
    if not math.isfinite(now):
        return None
    found = {
        "mse": _score(seen, mse_range(seen, spec), spec).sqnr_db,
        **{
            f"percentile({q})": _score(seen, percentile_range(seen, q, spec), spec).sqnr_db
            for q in (99.99, 99.9)
        },
    }
    if spec.format.is_integer:
        if spec.symmetric:
            other = dataclasses.replace(spec, symmetric=False)
            found["asymmetric"] = _score(seen, (seen.low, seen.high), other).sqnr_db
        channels = state.get("channels") if channels is None else channels
        if channels is not None:
            error = _channel_noise(seen, np.asarray(channels, np.float64), spec)
            found["per channel"] = _decibels(seen.signal, error)
    what = max(found, key=lambda name: found[name])
    gain = found[what] - now
    return Suggestion(what, found[what], gain) if gain >= min_gain_db else None


def _channel_noise(seen: Bars, amax: Floats, spec: QSpec) -> float:
    """The noise of scales for each channel that move into the weights: signed, no zero points."""
    # as these scales are made: none is less than 2^-8 of the largest
    used = np.maximum(amax, np.max(amax, initial=0.0) * 2.0**-8)
    scale, _ = scales(-used, used, QSpec(spec.format.name.removeprefix("u"), range=spec.range))
    # what is always zero makes no noise
    return float(np.mean(np.where(amax > 0, scale, 0.0) ** 2) / 12 * seen.counts.sum())
