"""Calls of pure functions of variables, as both doors make them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxquant.interpret.calls import Call, is_traced
from jaxquant.interpret.record import sites_of
from jaxquant.interpret.sites import Sites
from jaxquant.params.quantize import apply_recipe
from jaxquant.qtensor import is_qtensor
from jaxquant.recipe import Recipe


def arrays_only(fn: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`fn` without what is no array in its result, and a function that completes the result."""
    kept: list[Any] = []

    def call(*args: Any, **kwargs: Any) -> list[Any]:
        flat, tree = jax.tree.flatten(fn(*args, **kwargs))
        kept[:] = [tree, [None if is_traced(x) else (x,) for x in flat]]
        return [x for x in flat if is_traced(x)]

    def rebuild(arrays: list[Any]) -> Any:
        tree, static = kept
        given = iter(arrays)
        return jax.tree.unflatten(tree, [next(given) if x is None else x[0] for x in static])

    return call, rebuild


def prepared(call: Call, variables: Any, recipe: Recipe | None) -> Call | None:
    """The call with float variables quantized, in the program if they are traced.

    `None` if it is a float call that has no site to quantize where another call of the model may.

    Raises:
      ValueError: as `jaxquant.quantize_params`.
    """
    held = any(map(is_qtensor, call.leaves))
    if recipe is None and held:
        return call
    sites = sites_of(call)
    if not held and unconcerned(sites, recipe):
        return None
    if recipe is None:
        return call
    with jax.ensure_compile_time_eval():  # for concrete arrays that a jitted function closes over
        qvariables, _ = apply_recipe(variables, recipe, sites=sites, again=held)
    new = [leaf for leaf in leaves(qvariables) if is_traced(leaf)]
    return dataclasses.replace(call, leaves=new + call.leaves[len(new) :])


def unconcerned(sites: Sites, recipe: Recipe | None) -> bool:
    """Whether all that the recipe matches lies elsewhere.

    Of a leaf that the call computes with and cannot quantize, the recipe's user must hear.
    """
    used = {site.param for site in sites.sites if site.param is not None}
    if recipe is None or not sites.leaves:
        return not used
    rules = {path: recipe.match(path) for path in sites.leaves}
    matched = {p for p, r in rules.items() if r and (r.weights or r.lookup) is not None}
    return not matched & used and bool(matched - used - set(sites.met))


def as_given(value: Any, given: Any) -> Any:
    """An updated variable: one that came in float and was only passed on stays as it came."""
    float_before = not any(map(is_qtensor, leaves(given)))
    return given if float_before and any(map(is_qtensor, leaves(value))) else value


def leaves(tree: Any) -> list[Any]:
    """The leaves of a tree, `QTensor`s among them."""
    return jax.tree.leaves(tree, is_leaf=is_qtensor)
