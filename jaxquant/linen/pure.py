"""Calls of pure functions of variables, shared by `quantized` and `interceptor`."""

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
    """Returns `fn` with only the arrays of its result, and a function that restores the rest."""
    structure: list[Any] = []

    def call(*args: Any, **kwargs: Any) -> list[Any]:
        flat, tree = jax.tree.flatten(fn(*args, **kwargs))
        structure[:] = [tree, [None if is_traced(x) else (x,) for x in flat]]
        return [x for x in flat if is_traced(x)]

    def rebuild(arrays: list[Any]) -> Any:
        tree, static = structure
        values = iter(arrays)
        return jax.tree.unflatten(tree, [next(values) if x is None else x[0] for x in static])

    return call, rebuild


def prepared(call: Call, variables: Any, recipe: Recipe | None) -> Call | None:
    """Returns the call with float variables quantized, within the trace if they are traced.

    `None` for a float call that has nothing to quantize although another call of the model may.

    Raises:
      ValueError: as `jaxquant.quantize_params`.
    """
    quantized = any(map(is_qtensor, call.leaves))
    if recipe is None and quantized:
        return call
    sites = sites_of(call)
    if not quantized and unconcerned(sites, recipe):
        return None
    if recipe is None:
        return call
    with jax.ensure_compile_time_eval():  # for concrete arrays that a jitted function closes over
        qvariables, _ = apply_recipe(variables, recipe, sites=sites, again=quantized)
    new = [leaf for leaf in leaves(qvariables) if is_traced(leaf)]
    return dataclasses.replace(call, leaves=new + call.leaves[len(new) :])


def unconcerned(sites: Sites, recipe: Recipe | None) -> bool:
    """Whether the recipe matches only leaves that the call does not use.

    If the call uses a matched leaf but cannot quantize it, this is false, so that an error follows.
    """
    used = {site.param for site in sites.sites if site.param is not None}
    if recipe is None or not sites.leaves:
        return not used
    rules = {path: recipe.match(path) for path in sites.leaves}
    matched = {p for p, r in rules.items() if r and (r.weights or r.lookup) is not None}
    return not matched & used and bool(matched - used - set(sites.met))


def as_given(value: Any, given: Any) -> Any:
    """Returns an updated variable; a float one that was only quantized stays as given."""
    float_before = not any(map(is_qtensor, leaves(given)))
    return given if float_before and any(map(is_qtensor, leaves(value))) else value


def leaves(tree: Any) -> list[Any]:
    """Returns the leaves of a tree; a `QTensor` is a leaf."""
    return jax.tree.leaves(tree, is_leaf=is_qtensor)
