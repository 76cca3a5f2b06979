"""Calls of pure functions of variables, as both doors make them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxquant.interpret.calls import Call, is_traced
from jaxquant.interpret.sites import Sites
from jaxquant.params import quantize_params
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


def quantize_call(call: Call, variables: Any, recipe: Recipe, sites: Sites) -> Call:
    """The call with float variables quantized: in the program if they are traced."""
    with jax.ensure_compile_time_eval():  # for concrete arrays that a jitted function closes over
        qvariables, _ = quantize_params(variables, recipe, sites=sites)
    new = [leaf for leaf in leaves(qvariables) if is_traced(leaf)]
    return dataclasses.replace(call, leaves=new + call.leaves[len(new) :])


def as_given(value: Any, given: Any) -> Any:
    """An updated variable: one that came in float and was only passed on stays as it came."""
    float_before = not any(map(is_qtensor, leaves(given)))
    return given if float_before and any(map(is_qtensor, leaves(value))) else value


def leaves(tree: Any) -> list[Any]:
    """The leaves of a tree, `QTensor`s among them."""
    return jax.tree.leaves(tree, is_leaf=is_qtensor)
