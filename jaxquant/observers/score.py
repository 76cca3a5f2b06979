"""Scores a range against a histogram, and suggests better ones."""

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
    """How well a range represents the observed values.

    Attributes:
      clipped: the fraction of the values outside the representable range.
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
      sqnr_db: expected signal to quantization noise ratio.
      gain_db: gain over the ratio of the range in use.
    """

    what: str
    sqnr_db: float
    gain_db: float


def score(state: Mapping[str, Any], range: Range, spec: QSpec) -> Score:
    """Scores a range against a histogram: clipped fraction and SQNR.

    Rounding and clipping noise assume values spread evenly within each bin. So the clipped
    fraction is wrong by at most the mass of the two bins in which clipping begins. The ratio of
    smooth data is within 0.3 dB of the true one, as tested; data on a grid are scored as if spread.

    Args:
      state: of `histogram`, `profile` or another observer with a histogram, per tensor.
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
    # scales are float32: the end of a range must not count as clipped
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

    Alternatives: an asymmetric spec over `[min, max]`, for integers; the range that `mse` or
    `percentile` at 99.99 or 99.9 chooses; for integers, a scale per channel without zero points,
    as in `w8a8_static(per_channel=True)`. The noise per channel is assumed to be `S_c^2 / 12` for
    nonzero values, `S_c` from the channel's absmax or, if larger, `2^-8` of the largest absmax.
    This is the noise of the activation; the error of the weights, which absorb these scales, is
    not included.

    Args:
      state: of `histogram`, `profile` or another observer with a histogram, per tensor.
      range: in use, per tensor.
      spec: in use.
      channels: `[features]`, the absmax of each channel; by default that of the state, if any.
      min_gain_db: the least gain of a suggestion.

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
    sqnrs = {
        "mse": _score(seen, mse_range(seen, spec), spec).sqnr_db,
        **{
            f"percentile({q})": _score(seen, percentile_range(seen, q, spec), spec).sqnr_db
            for q in (99.99, 99.9)
        },
    }
    if spec.format.is_integer:
        if spec.symmetric:
            other = dataclasses.replace(spec, symmetric=False)
            sqnrs["asymmetric"] = _score(seen, (seen.low, seen.high), other).sqnr_db
        channels = state.get("channels") if channels is None else channels
        if channels is not None:
            error = _channel_noise(seen, np.asarray(channels, np.float64), spec)
            sqnrs["per channel"] = _decibels(seen.signal, error)
    best = max(sqnrs, key=lambda name: sqnrs[name])
    gain = sqnrs[best] - now
    return Suggestion(best, sqnrs[best], gain) if gain >= min_gain_db else None


def _channel_noise(seen: Bars, amax: Floats, spec: QSpec) -> float:
    """The noise of per-channel scales that are folded into weights: signed, no zero points."""
    # as in the folded scales: none is less than 2^-8 of the largest
    used = np.maximum(amax, np.max(amax, initial=0.0) * 2.0**-8)
    scale, _ = scales(-used, used, QSpec(spec.format.name.removeprefix("u"), range=spec.range))
    # channels that are always zero make no noise
    return float(np.mean(np.where(amax > 0, scale, 0.0) ** 2) / 12 * seen.counts.sum())
