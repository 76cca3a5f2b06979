"""Splits an NNX model into the arguments of a pure function, and results into arrays and the rest.

Parameters are the `nnx.Param`s. Random states and caches are inputs of a call. All other variables,
such as batch statistics, are constants of the call, so that values that depend only on them can be
computed beforehand. Changes by a method take effect for both kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxquant.interpret.calls import is_traced

INPUTS = (nnx.RngState, nnx.Cache)  # differ from call to call, as arguments do


def parts_of(model: Any, method: str, where: str) -> Any:
    """Splits a model into graph definition, parameters, states of inputs, and states of constants.

    `jax.ShapeDtypeStruct`s cannot be constants, so that with them all states are inputs.
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(f"{where}: expected an nnx.Module, got {type(model).__name__}")
    if not callable(getattr(model, method, None)):
        raise ValueError(f"{where}: {type(model).__name__} has no method {method!r}")
    for path, v in nnx.iter_graph(model):
        if isinstance(v, nnx.Variable) and (v.hijax or v.ref):
            name, kind = "/".join(map(str, path)), "hijax" if v.hijax else "ref"
            raise ValueError(
                f"{where}: {name}: expected a plain Variable, got one with {kind}=True; "
                f"pass nnx.with_vars(model, {kind}=False)"
            )
    split: Any = nnx.split(model, nnx.Param, INPUTS, ...)
    graphdef, params, inputs, constants = split
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(constants)):
        return graphdef, params, (inputs, constants), ()
    return graphdef, params, (inputs,), (constants,)


def arrays_of(out: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Returns the arrays of a result, and a function that rebuilds the result from arrays."""
    leaves, tree = jax.tree.flatten(out)
    traced = [is_traced(leaf) for leaf in leaves]
    static = [None if t else leaf for leaf, t in zip(leaves, traced, strict=True)]

    def rebuild(arrays: list[Any]) -> Any:
        left = iter(arrays)
        merged = [next(left) if t else s for s, t in zip(static, traced, strict=True)]
        return jax.tree.unflatten(tree, merged)

    return [leaf for leaf, t in zip(leaves, traced, strict=True) if t], rebuild
