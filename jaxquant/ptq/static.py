"""Static activations: grids from statistics, stored in the quantized params."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax import Array

from jaxquant.capture import Observed, Statistics
from jaxquant.interpret.serve import unsigned
from jaxquant.interpret.sites import Site, Sites, path_str
from jaxquant.observers import Observer, Range, finish_stacked, range_to_scale
from jaxquant.ops import grid_of, with_fine_scales
from jaxquant.qtensor import Calibration, PerTensor, QSpec, QuantParams, is_qtensor
from jaxquant.recipe import Recipe
from jaxquant.report import shown


@dataclasses.dataclass(frozen=True)
class Divided:
    """One activation with per-channel scales, divided by them.

    Attributes:
      divisor: float32 `[*layers, channels]`.
      range: of the divided activation, `[*layers]`.
      axis: the weight's axes (negative) that are contracted with the channels.
    """

    divisor: Array
    range: Range
    axis: tuple[int, ...]


def calibrated(
    qparams: Any,
    recipe: Recipe,
    sites: Sites,
    stats: Statistics,
    divided: Mapping[str, Divided],
) -> Any:
    """Adds to the params the grids of the activations that the recipe makes static.

    `divided` has the parameters whose activations have per-channel scales, by path.

    Raises:
      ValueError: a site that needs statistics has none.
    """
    flat, tree = jax.tree.flatten_with_path(qparams, is_leaf=is_qtensor)
    leaves = {path_str(path): leaf for path, leaf in flat}
    for path, leaf in leaves.items():
        rule = recipe.match(path)
        if not is_qtensor(leaf) or rule is None or rule.observer is None:
            continue
        previous = leaf.calibration or Calibration()
        if previous.input is not None:
            continue
        spec, uses = rule.activations, contractions(sites, path)
        if spec is None or not uses:
            continue
        div = divided.get(path)
        seen = seen_range(uses, stats, spec) if div is None else div.range
        if seen.low.shape != leaf.batch:
            raise ValueError(
                f"{shown(path)}: expected statistics for layers {list(leaf.batch)}, "
                f"got {list(seen.low.shape)}"
            )
        source = _entry(stats, uses[0].key) if len(uses) == 1 else path
        grid = grid_of(*range_to_scale(seen, spec), spec, source)
        calibration = dataclasses.replace(previous, input=grid)
        if div is not None:
            calibration = dataclasses.replace(calibration, divisor=div.divisor, axis=div.axis)
        if rule.requantize is not None:
            leaf = with_fine_scales(leaf, [a - len(leaf.batch) for a in uses[0].contracted])
        config = dataclasses.replace(leaf.contraction, requantize=rule.requantize)
        leaves[path] = dataclasses.replace(leaf, contraction=config, calibration=calibration)
    for path, grids in _attention(leaves, recipe, sites, stats).items():
        calibration = leaves[path].calibration or Calibration()
        leaves[path] = dataclasses.replace(
            leaves[path], calibration=dataclasses.replace(calibration, attention=grids)
        )
    return jax.tree.unflatten(tree, list(leaves.values()))


def contractions(sites: Sites, path: str) -> list[Site]:
    """Returns the sites at which a parameter is contracted."""
    return [site for site in sites.of(path) if site.primitive != "gather"]


def check_sites(sites: Sites, stats: Statistics) -> None:
    """Raises unless every site in `stats` is a site of the traced function.

    Shapes must agree in rank and in the sizes that the parameter fixes.
    """
    if not isinstance(stats, Statistics):
        raise ValueError(
            f"stats: expected the result of jaxquant.capture, got {type(stats).__name__}"
        )
    unknown = [key for key in stats if key not in sites]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ValueError(
            f"stats: these are statistics of another model: {', '.join(map(shown, unknown[:3]))}"
            f"{more} {'is' if len(unknown) == 1 else 'are'} no site of this model, whose sites are "
            f"{', '.join(map(shown, list(sites)[:5]))}"
        )
    for key in stats:
        for operand, seen in stats[key].items():
            expected = sites[key].operands[("lhs", "rhs").index(operand)]
            if len(expected) != len(seen.shape):
                raise ValueError(
                    f"stats: {shown(key)}, {operand}: expected statistics of an array like "
                    f"{list(expected)}, got {list(seen.shape)}"
                )
            for a in _fixed(sites[key], expected):
                if expected[a] != seen.shape[a]:
                    raise ValueError(
                        f"stats: {shown(key)}, {operand}: expected statistics of an array with "
                        f"{expected[a]} values along axis {a}, like {list(expected)}, got "
                        f"{seen.shape[a]}, of {list(seen.shape)}"
                    )


def _fixed(site: Site, operand: tuple[int, ...]) -> list[int]:
    """Axes of an activation whose size its parameter fixes; the number of rows is free."""
    if site.primitive != "conv_general_dilated":
        return list(site.over)
    # only the axis with the kernel's input features, if its size tells which one that is
    sizes = [site.shape[a] for a in site.contracted]
    axes = [a for a in site.over if operand[a] in sizes]
    return axes if len(axes) == 1 else []


def check_observers(recipe: Recipe, sites: Sites, stats: Statistics) -> None:
    """Raises if statistics come from another observer than that of the recipe's rule.

    Sites that share an entry, as those of concatenated parameters, may have the observer of one.
    Per-channel ranges for a per-tensor rule, and the reverse, are left to `seen_range`.
    """
    expected_observers: dict[str, list[tuple[str, Observer]]] = {}
    for key, operands in stats.sites:
        param = sites[key].param
        rule = recipe.attention_rule(key) if param is None else recipe.match(param)
        if rule is not None and rule.observer is not None:
            for _, entry in operands:
                expected_observers.setdefault(entry, []).append((key, rule.observer))
    for entry, rules in expected_observers.items():
        got, (key, expected) = stats.entries[entry].observer, rules[0]
        if got not in [observer for _, observer in rules] and got.axis == expected.axis:
            raise ValueError(
                f"stats: {shown(key)}: expected statistics of {expected!r}, which its rule has, "
                f"got those of {got!r}; capture with this recipe, or put {got!r} in the rule"
            )


def _seen(stats: Statistics, key: str, operand: str) -> Observed:
    operands: Mapping[str, Observed] = stats.get(key, {})
    if operand not in operands:
        known = ", ".join(map(shown, list(stats)[:5]))
        raise ValueError(
            f"{shown(key)}: its rule has an observer, but there are no statistics of it; "
            f"capture with this recipe (there are statistics of {known or 'nothing'})"
        )
    return operands[operand]


def activation_side(stats: Statistics, key: str) -> str:
    """Which operand of a parameter's site is the activation; `"lhs"` without statistics."""
    return next(iter(stats.get(key, {"lhs": None})))


def _entry(stats: Statistics, key: str) -> str:
    operands = dict(dict(stats.sites).get(key, ()))
    return next(iter(operands.values()), key)


def seen_range(uses: list[Site], stats: Statistics, spec: QSpec) -> Range:
    """The range of a parameter's activation over all of its sites, `[*layers, *channels]`.

    Raises:
      ValueError: a site has no statistics, or those of several sites cannot be merged.
    """
    first, *rest = [_seen(stats, s.key, activation_side(stats, s.key)) for s in uses]
    for other in rest:
        if (other.observer, other.lead) != (first.observer, first.lead):
            raise ValueError(
                f"{shown(uses[0].key)}: its sites were observed differently: "
                f"{first.observer} {list(first.lead)} and {other.observer} {list(other.lead)}"
            )
        merged = first.observer.merge(first.state, other.state)
        first = dataclasses.replace(first, state=merged)
    return _finished(first, spec, shown(uses[0].key))


def _finished(seen: Observed, spec: QSpec, where: str) -> Range:
    per_tensor = spec.granularity == PerTensor()
    if per_tensor and seen.observer.axis is not None:
        raise ValueError(
            f"{where}: the rule's activations have one scale, and the statistics, of "
            f"{seen.observer}, a range for each channel"
        )
    if not per_tensor and seen.observer.axis not in (-1, (-1,)):
        raise ValueError(
            f"{where}: the rule's activations have a scale for each channel, and the statistics, "
            f"of {seen.observer}, one range"
        )
    try:
        return finish_stacked(seen.observer, seen.state, spec, len(seen.lead))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _attention(
    leaves: dict[str, Any], recipe: Recipe, sites: Sites, stats: Statistics
) -> dict[str, dict[str, tuple[QuantParams, QuantParams]]]:
    """Grids of sites without a parameter, by the path of the leaf that is to store them.

    A site's grids are arrays with the layers of the loops around it as leading axes; a leaf with
    the same batch axes stores them.
    """
    carried: dict[str, dict[str, tuple[QuantParams, QuantParams]]] = {}
    for site in sites.sites:
        rule = recipe.attention_rule(site.key) if site.param is None else None
        if rule is None or rule.observer is None or rule.attention is None:
            continue
        sides = [_seen(stats, site.key, operand) for operand in ("lhs", "rhs")]
        specs = [unsigned(rule.attention) if n else rule.attention for n in site.nonneg]
        lhs, rhs = (
            grid_of(*range_to_scale(_finished(seen, spec, shown(site.key)), spec), spec)
            for seen, spec in zip(sides, specs, strict=True)
        )
        lead = sides[0].lead
        carrier = next((p for p, q in leaves.items() if is_qtensor(q) and q.batch == lead), None)
        if carrier is None or sides[1].lead != lead:
            raise ValueError(
                f"{shown(site.key)}: no quantized parameter has the layers {list(lead)} of this "
                "contraction, so nothing can carry its grids; leave it dynamic or quantize one"
            )
        carried.setdefault(carrier, {})[site.key] = (lhs, rhs)
    return carried
