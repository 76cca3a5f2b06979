"""`activation_report`: judges the activation ranges that a recipe gets from statistics."""

from __future__ import annotations

import re

import jax
import numpy as np

from jaxquant.capture.statistics import Observed, Statistics
from jaxquant.interpret.serve import unsigned
from jaxquant.interpret.sites import Site, Sites
from jaxquant.observers import Histogram, Range, score, suggest
from jaxquant.observers.base import as_range
from jaxquant.qtensor import QSpec
from jaxquant.recipe import Recipe, RecipeLike, Rule, as_recipe
from jaxquant.report import ActivationReport, SiteReport

_NOISY = 30.0  # dB
_REPEAT = re.compile(r"#\d+$")


def activation_report(
    stats: Statistics, recipe: RecipeLike, sites: Sites | None = None
) -> ActivationReport:
    """Reports how well activation ranges fit the recipe: clipping, noise, and suggestions.

    Clipped fraction and `SQNR = 10 log10(sum x^2 / sum (x - x_hat)^2)` are estimated from the
    histograms that `percentile`, `mse`, `entropy`, `histogram` and `profile` keep of the captured
    samples. A suggestion is made if it gains 1 dB or more: another observer, a zero point, or
    per-channel scales (only after `profile`, which keeps the channels' absmax, and where rules can
    have them: without `requantize`, for a parameter of one dense layer).

    Args:
      stats: statistics from `jaxquant.capture`.
      recipe: its specs quantize the activations; sites that it leaves in float are left out.
      sites: of the function, from `jaxquant.trace`. They tell which activations are nonnegative and
        get unsigned codes, and which can have per-channel scales; without them all get the recipe's
        codes, and per-channel scales may be suggested at any site with a parameter.

    Raises:
      ValueError: `recipe` is not a recipe, or leaves every site in float.

    >>> import jax, jax.numpy as jnp, jaxquant as jq
    >>> from jaxquant.capture import capture
    >>> x = jax.nn.relu(jax.random.normal(jax.random.key(0), (64, 16)))
    >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.eye(16)}
    >>> recipe = jq.w8a8_static(jq.observers.profile(), symmetric=True)
    >>> report = activation_report(capture(fn, params, recipe, batches=[x]), recipe)
    >>> report["w"].suggestion, report["w"].clipped
    ('asymmetric', 0.0)
    """
    recipe = as_recipe(recipe, "activation_report")
    if not isinstance(stats, Statistics):
        raise ValueError(
            "activation_report: expected the result of jaxquant.capture, got "
            f"{type(stats).__name__}"
        )
    rows: list[SiteReport] = []
    noisy: list[SiteReport] = []
    for key in stats:
        operands = stats[key]
        rule = _rule(recipe, key, len(operands))
        spec = None if rule is None else rule.activations if len(operands) == 1 else rule.attention
        if rule is None or spec is None:
            continue
        site = None if sites is None else sites.get(key)
        for operand, seen in operands.items():
            side = ("lhs", "rhs").index(operand)
            side_spec = unsigned(spec) if site is not None and site.nonneg[side] else spec
            channels = len(operands) == 1 and rule.requantize is None
            if sites is not None and site is not None and channels:
                channels = _has_channels(sites, site, side)
            site_rows = _rows(key, operand, seen, side_spec, channels)
            rows += site_rows
            if channels and "channels" not in seen.state:
                noisy += [r for r in site_rows if r.sqnr_db is not None and r.sqnr_db < _NOISY]
    if not rows:
        raise ValueError(
            f"activation_report: {recipe!r} quantizes no activation that there are statistics of "
            f"({', '.join(stats) or 'there are none'})"
        )
    notes = []
    if any(row.clipped is None for row in rows):
        notes.append(
            "clipping and noise are known only for observers with a per-tensor histogram; "
            "profile() gives most detail"
        )
    if noisy:
        these = f"{noisy[0].site} has" if len(noisy) == 1 else f"{len(noisy)} activations have"
        notes.append(
            f"{these} less than {_NOISY:g} dB; captured with observers.profile(), this report "
            "would tell whether a scale for each channel helps"
        )
    return ActivationReport(tuple(rows), tuple(notes))


def _rule(recipe: Recipe, key: str, operands: int) -> Rule | None:
    """Returns the rule of a site; a site with two observed operands has no parameter."""
    if operands == 2:
        return recipe.attention_rule(key)
    return recipe.match(_REPEAT.sub("", key))


def _has_channels(sites: Sites, site: Site, side: int) -> bool:
    """Whether the activation of a parameter's site can have a scale for each channel."""
    activation = site.operands[side]
    if site.primitive != "dot_general" or site.over != (len(activation) - 1,) or site.param is None:
        return False
    single = len(site.contracted) == 1 and len(sites.of(site.param)) == 1
    return single and site.shape[site.contracted[0]] == activation[-1]


def _rows(key: str, operand: str, seen: Observed, spec: QSpec, channels: bool) -> list[SiteReport]:
    ranges = seen.finish(spec)
    host = jax.tree.map(np.asarray, seen.state)
    rows = []
    for index in np.ndindex(*seen.lead):
        state = {n: v[index] for n, v in host.items() if channels or n != "channels"}
        low, high = np.asarray(ranges.low)[index], np.asarray(ranges.high)[index]
        site = f"{key}[{', '.join(map(str, index))}]" if index else key
        how = f"{spec.format.name}{'' if spec.symmetric else ' asymmetric'}, {seen.observer!r}"
        row = SiteReport(site, operand, how, float(np.min(low)), float(np.max(high)))
        if isinstance(seen.observer, Histogram) and not np.ndim(low):
            row = _judged(row, state, as_range(low, high), spec)
        rows.append(row)
    return rows


def _judged(row: SiteReport, state: dict, range: Range, spec: QSpec) -> SiteReport:
    current, suggestion = score(state, range, spec), suggest(state, range, spec)
    return SiteReport(
        row.site,
        row.operand,
        row.how,
        row.low,
        row.high,
        current.clipped,
        current.sqnr_db,
        "" if suggestion is None else suggestion.what,
        0.0 if suggestion is None else suggestion.gain_db,
    )
