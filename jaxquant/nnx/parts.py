"""The parts of an NNX model as a pure function has them, and its results without what is static.

Parameters are the `nnx.Param`s. Of the other variables random states and caches are inputs of a
call; all else, batch statistics above all, is constant for it, so that what follows from it alone
can be worked out beforehand. What a method changes is changed either way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxquant.interpret.calls import is_traced

INPUTS = (nnx.RngState, nnx.Cache)  # differ from call to call, as arguments do


def parts_of(model: Any, method: str, where: str) -> Any:
    """A model as graph definition, parameters, and states: of the inputs, and of what is constant.

    Shapes alone cannot be constants; they are inputs, too.
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
    graphdef, params, moving, rest = split
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(rest)):
        return graphdef, params, (moving, rest), ()
    return graphdef, params, (moving,), (rest,)


def arrays_of(out: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays of a method's result, and what puts them back beside what is static in it."""
    leaves, tree = jax.tree.flatten(out)
    traced = [is_traced(leaf) for leaf in leaves]
    static = [None if t else leaf for leaf, t in zip(leaves, traced, strict=True)]

    def rebuild(arrays: list[Any]) -> Any:
        left = iter(arrays)
        whole = [next(left) if t else s for s, t in zip(static, traced, strict=True)]
        return jax.tree.unflatten(tree, whole)

    return [leaf for leaf, t in zip(leaves, traced, strict=True) if t], rebuild
