"""Static activations: grids from statistics, carried by the quantized params."""

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
    """What becomes of one activation with a scale for each channel.

    Attributes:
      divisor: float32 `[*layers, channels]`.
      range: of what is left of the activation, `[*layers]`.
      axis: the weight's axes (negative) that meet the channels.
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
    """The params with grids for what the recipe's rules make static.

    `divided` are those whose activations have a scale for each channel.

    Raises:
      ValueError: there are no statistics of a site that needs them.
    """
    flat, tree = jax.tree.flatten_with_path(qparams, is_leaf=is_qtensor)
    leaves = {path_str(path): leaf for path, leaf in flat}
    for path, leaf in leaves.items():
        rule = recipe.match(path)
        if not is_qtensor(leaf) or rule is None or rule.observer is None:
            continue
        before = leaf.calibration or Calibration()
        if before.input is not None:
            continue
        spec, uses = rule.activations, contractions(sites, path)
        if spec is None or not uses:
            continue
        by = divided.get(path)
        seen = seen_range(uses, stats, spec) if by is None else by.range
        if seen.low.shape != leaf.batch:
            raise ValueError(
                f"{shown(path)}: expected statistics for layers {list(leaf.batch)}, "
                f"got {list(seen.low.shape)}"
            )
        source = _entry(stats, uses[0].key) if len(uses) == 1 else path
        grid = grid_of(*range_to_scale(seen, spec), spec, source)
        held = dataclasses.replace(before, input=grid)
        if by is not None:
            held = dataclasses.replace(held, divisor=by.divisor, axis=by.axis)
        if rule.requantize is not None:
            leaf = with_fine_scales(leaf, [a - len(leaf.batch) for a in uses[0].contracted])
        config = dataclasses.replace(leaf.contraction, requantize=rule.requantize)
        leaves[path] = dataclasses.replace(leaf, contraction=config, calibration=held)
    for path, grids in _attention(leaves, recipe, sites, stats).items():
        held = leaves[path].calibration or Calibration()
        leaves[path] = dataclasses.replace(
            leaves[path], calibration=dataclasses.replace(held, attention=grids)
        )
    return jax.tree.unflatten(tree, list(leaves.values()))


def contractions(sites: Sites, path: str) -> list[Site]:
    """The sites at which a parameter is contracted."""
    return [site for site in sites.of(path) if site.primitive != "gather"]


def check_sites(sites: Sites, stats: Statistics) -> None:
    """Raises unless every site that there are statistics of is one of the traced function's.

    Shapes have to agree in rank, and in what the parameter fixes.
    """
    if not isinstance(stats, Statistics):
        raise ValueError(
            f"stats: expected what jaxquant.capture returns, got {type(stats).__name__}"
        )
    unknown = [key for key in stats if key not in sites]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ValueError(
            f"stats: these are statistics of another model: {', '.join(map(shown, unknown[:3]))}"
            f"{more} {'is' if len(unknown) == 1 else 'are'} no site of this one, whose sites are "
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
    """Axes of an activation whose size its parameter fixes; the number of rows, say, is free."""
    if site.primitive != "conv_general_dilated":
        return list(site.over)
    # of all but the batch axis, only the one with the kernel's input features
    sizes = [site.shape[a] for a in site.contracted]
    found = [a for a in site.over if operand[a] in sizes]
    return found if len(found) == 1 else []


def check_observers(recipe: Recipe, sites: Sites, stats: Statistics) -> None:
    """Raises where statistics are of another observer than the recipe's rule has.

    Sites that share an entry, as those of concatenated parameters, may share one's observer.
    Ranges per channel for one per tensor, and the reverse, are left to `seen_range`.
    """
    named: dict[str, list[tuple[str, Observer]]] = {}
    for key, operands in stats.sites:
        param = sites[key].param
        rule = recipe.attention_rule(key) if param is None else recipe.match(param)
        if rule is not None and rule.observer is not None:
            for _, entry in operands:
                named.setdefault(entry, []).append((key, rule.observer))
    for entry, rules in named.items():
        got, (key, expected) = stats.entries[entry].observer, rules[0]
        if got not in [observer for _, observer in rules] and got.axis == expected.axis:
            raise ValueError(
                f"stats: {shown(key)}: expected statistics of {expected!r}, which its rule has, "
                f"got those of {got!r}; capture with this recipe, or put {got!r} in the rule"
            )


def _seen(stats: Statistics, key: str, operand: str) -> Observed:
    found: Mapping[str, Observed] = stats.get(key, {})
    if operand not in found:
        known = ", ".join(map(shown, list(stats)[:5]))
        raise ValueError(
            f"{shown(key)}: its rule has an observer, but there are no statistics of it; "
            f"capture with this recipe (there are statistics of {known or 'nothing'})"
        )
    return found[operand]


def activation_side(stats: Statistics, key: str) -> str:
    """Which operand of a parameter's site is the other one; the left where nothing was seen."""
    return next(iter(stats.get(key, {"lhs": None})))


def _entry(stats: Statistics, key: str) -> str:
    operands = dict(dict(stats.sites).get(key, ()))
    return next(iter(operands.values()), key)


def seen_range(uses: list[Site], stats: Statistics, spec: QSpec) -> Range:
    """The range of what a parameter meets at all of its sites, `[*layers, *channels]`.

    Raises:
      ValueError: there are no statistics of a site, or none that can be merged.
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
    """For each leaf that is to carry some, grids of sites without a parameter.

    A site's grids are arrays with the layers of the loops around it as leading axes; a leaf with
    the same batch axes carries them along.
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
