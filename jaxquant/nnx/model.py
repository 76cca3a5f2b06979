"""`Quantized`: an NNX model that computes with its quantized parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxquant.interpret.calls import trace_call
from jaxquant.interpret.serve import serve
from jaxquant.nnx.parts import INPUTS, arrays_of
from jaxquant.qtensor import is_qtensor

_TAG = "jaxquant"  # of the update contexts below


class Quantized(nnx.Module):
    """An NNX model whose methods contract on the codes of its quantized parameters.

    It has the methods of the model's class, each transformed as `jaxquant.quantized` transforms a
    function. The model is an ordinary submodule: `eval`, `train`,
    `nnx.split`, `nnx.jit`, `nnx.iter_modules` and checkpoints of the state all reach into it.
    Batch statistics, caches and random states move on as methods are called, as the float
    model's would; `QTensor`s are constants, and what a method assigns to one is not kept.
    Where no parameter is a `QTensor` (within `jaxquant.trace`, say) the methods run as they are.
    `nnx.grad` needs a filter that leaves them out, as `nnx.DiffState(0, nnx.LoRAParam)` does.

    Attributes:
      model: the model's own graph, with a `QTensor` in place of some parameters' arrays.

    >>> import jax.numpy as jnp, jaxquant.nnx, jaxquant as jq
    >>> from flax import nnx
    >>> model = nnx.Embed(16, 8, rngs=nnx.Rngs(0))
    >>> qmodel, _ = jq.nnx.ptq(model, jq.w8a8(), jnp.ones((2, 8)), method="attend")
    >>> qmodel.attend(jnp.ones((3, 8))).shape, qmodel(jnp.array([1, 2])).shape
    ((3, 16), (2, 8))
    """

    def __init__(self, model: nnx.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model."""
        return _run(self.model, "__call__", args, kwargs)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        # reached only by what the wrapper itself lacks; early on (unpickling, copying) also `model`
        model = None if name.startswith("_") or name == "model" else vars(self).get("model")
        if model is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        found = inspect.getattr_static(type(model), name, None)
        if isinstance(found, (staticmethod, classmethod)):
            return getattr(model, name)
        if not inspect.isroutine(found):
            raise AttributeError(
                f"{type(model).__name__} has no method {name!r}; for its other attributes "
                f"go through the submodule, as in qmodel.model.{name}"
            )

        @functools.wraps(found)
        def method(*args: Any, **kwargs: Any) -> Any:
            return _run(model, name, args, kwargs)

        return method


def _run(model: nnx.Module, name: str, args: Any, kwargs: Any) -> Any:
    """Calls a method of a model with quantized parameters, and updates the model's state.

    The model and NNX objects among the arguments (`rngs=`) go through the transform as one graph,
    as they do through `nnx.jit`: shared variables stay shared, what the method changes is changed.
    """
    held = [(i, v, v.get_raw_value()) for i, v in enumerate(_variables(model))]
    held = [(i, v, q) for i, v, q in held if is_qtensor(q)]
    if not held:
        return getattr(model, name)(*args, **kwargs)
    given, tree = jax.tree.flatten((args, kwargs), is_leaf=_is_object)
    inputs = [None if _is_object(x) else x for x in given]
    traced: list[Any] = []  # what only the trace tells: how to rebuild results, if state changed

    def call(params: Any, moving: Any, others: list[Any], inputs: list[Any]) -> Any:
        with nnx.merge_context(_TAG, inner=True) as merging:
            inner = merging.merge(graphdef, params, moving, rest)
            objects = [merging.merge(d, s) for d, s in zip(graphdefs, others, strict=True)]
        variables = _variables(inner)
        constants = [variables[i] for i, _, _ in held]
        left = iter(objects)
        whole = [next(left) if _is_object(a) else b for a, b in zip(given, inputs, strict=True)]
        new_args, new_kwargs = jax.tree.unflatten(tree, whole)
        arrays, rebuild = arrays_of(getattr(inner, name)(*new_args, **new_kwargs))
        for variable in constants:
            variable.set_raw_value(None)
        with nnx.split_context(_TAG) as splitting:
            parts = splitting.split(inner, nnx.Param, INPUTS, ...)
            after = [parts, *map(splitting.split, objects)]
        same = _same((graphdef, *graphdefs), ((params, moving, rest), *others), after)
        traced[:] = [rebuild, same]
        return arrays, None if same else after

    with nnx.update_context(_TAG):
        with nnx.split_context(_TAG) as splitting:
            graphdef, params, moving, rest = splitting.split(model, nnx.Param, INPUTS, ...)
            pairs = [splitting.split(x) for x in given if _is_object(x)]
        graphdefs, others = [d for d, _ in pairs], [s for _, s in pairs]
        arrays, after = serve(trace_call(call, params, (moving, others, inputs), {}))[0]
        rebuild, same = traced
        if not same:
            with nnx.merge_context(_TAG, inner=False) as merging:
                for changed, *states in after:
                    merging.merge(changed, *states)
            for _, variable, q in held:
                variable.set_raw_value(q)
    return rebuild(arrays)


def _same(graphdefs: Any, before: Any, after: Any) -> bool:
    """Whether a method left structure and state as they were; quantized variables are `None`."""
    if any(a.with_no_outer_index() != b for (a, *_), b in zip(after, graphdefs, strict=True)):
        return False

    def leaves(states: Any) -> list[Any]:
        return jax.tree.leaves(states, is_leaf=lambda x: x is None)

    pairs = zip(leaves([s for _, *s in after]), leaves(before), strict=True)
    return all(new is None or new is old for new, old in pairs)


def _variables(model: nnx.Module) -> list[nnx.Variable[Any]]:
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Variable)]


def _is_object(x: Any) -> bool:
    return isinstance(x, (nnx.Pytree, nnx.Variable))
