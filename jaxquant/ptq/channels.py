"""Static activations with per-channel scales: the scales move into the weights.

`sum_k x_k w_kn = sum_k (x_k / c_k) (c_k w_kn)`, with `c` from the channels' ranges: the divided
activation has one range for all channels, and the weight is multiplied by `c` and then encoded.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.capture import Statistics
from jaxquant.interpret.sites import Site, Sites, path_str
from jaxquant.observers import Range
from jaxquant.ptq.static import Divided, activation_side, contractions, seen_range
from jaxquant.qtensor import PerTensor, along, is_qtensor
from jaxquant.recipe import Recipe, Rule
from jaxquant.report import shown

# relative to the largest divisor: a channel with tiny values on the samples may have larger ones
_LEAST = 2.0**-8


def divided(
    params: Any, recipe: Recipe, sites: Sites, stats: Statistics
) -> tuple[Any, dict[str, Divided]]:
    """Multiplies weights by their divisors; returns the params and the divisors by path.

    Raises:
      ValueError: a parameter of a rule with per-channel scales is not contracted at one site, by a
        `dot_general` over one axis, the last of the activation.
    """
    flat, tree = jax.tree.flatten_with_path(params, is_leaf=is_qtensor)
    leaves = {path_str(path): leaf for path, leaf in flat}
    divisors: dict[str, Divided] = {}
    for path, leaf in leaves.items():
        rule = recipe.match(path)
        if rule is None or is_qtensor(leaf) or not contractions(sites, path):
            continue
        if rule.activations is None or rule.observer is None:
            continue
        if rule.activations.granularity == PerTensor():
            continue
        site = _only(path, sites, leaves, stats)
        divisors[path] = _divided(site, rule, stats)
        by = along(divisors[path].divisor, divisors[path].axis, leaf.ndim)
        leaves[path] = (jnp.asarray(leaf, jnp.float32) * by).astype(leaf.dtype)
    return jax.tree.unflatten(tree, list(leaves.values())), divisors


def _only(path: str, sites: Sites, leaves: dict[str, Any], stats: Statistics) -> Site:
    uses = sites.of(path)
    site = uses[0]
    tied = [p for p, leaf in leaves.items() if p != path and leaf is leaves[path]]
    activation = site.operands[("lhs", "rhs").index(activation_side(stats, site.key))]
    reason = ""
    if len(uses) != 1 or tied:
        reason = "is used at several sites"
    elif site.primitive != "dot_general" or len(site.contracted) != 1:
        reason = f"is contracted by {site.primitive} over axes {list(site.contracted)}"
    elif site.over != (len(activation) - 1,):
        reason = "meets another axis of the activation than its last"
    elif site.shape[site.contracted[0]] != activation[-1]:
        reason = (
            f"has {site.shape[site.contracted[0]]} indices there, of {activation[-1]} contracted"
        )
    if reason:
        raise ValueError(
            f"{shown(path)}: activations with a scale for each channel need one dot_general over "
            f"one axis, the last of the activation; this parameter {reason}. Put a rule with "
            "PerTensor() activations in front"
        )
    return site


def _divided(site: Site, rule: Rule, stats: Statistics) -> Divided:
    assert rule.activations is not None and site.param is not None
    low, high = seen_range([site], stats, rule.activations)
    amax = jnp.maximum(-low, high)
    top = jnp.max(amax, axis=-1, keepdims=True)
    divisor = jnp.where(top > 0, jnp.maximum(amax / jnp.where(top > 0, top, 1.0), _LEAST), 1.0)
    rest = Range(jnp.min(low / divisor, axis=-1), jnp.max(high / divisor, axis=-1))
    return Divided(divisor, rest, (site.contracted[0] - len(site.shape),))
