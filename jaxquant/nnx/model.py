"""`Quantized`: an NNX model that computes with its quantized parameters."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from flax import nnx

from jaxquant.interpret.calls import trace_call
from jaxquant.interpret.serve import serve
from jaxquant.nnx.parts import INPUTS, arrays_of
from jaxquant.qtensor import is_qtensor

_TAG = "jaxquant"  # of the update contexts below

Within = Callable[[nnx.Module], AbstractContextManager[Any]]
Pure = Callable[..., Any]
Held = Sequence[tuple[int, nnx.Variable[Any], Any]]


class Wrapped(nnx.Module):
    """A model whose methods compute otherwise than they say: as `_compute` has it.

    Attributes:
      model: the model's own graph.
    """

    def __init__(self, model: nnx.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model."""
        return self._compute("__call__", args, kwargs)

    def _compute(self, name: str, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError

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
            return self._compute(name, args, kwargs)

        return method


class Quantized(Wrapped):
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

    def _compute(self, name: str, args: Any, kwargs: Any) -> Any:
        held = [(i, v, v.get_raw_value()) for i, v in enumerate(variables(self.model))]
        held = [(i, v, q) for i, v, q in held if is_qtensor(q)]
        if not held:
            return getattr(self.model, name)(*args, **kwargs)

        def served(pure: Callable[[Within], Pure], params: Any, inputs: Any) -> Any:
            return serve(trace_call(pure(contextlib.nullcontext), params, inputs, {}))[0]

        return run_method(self.model, name, args, kwargs, held, served)


def run_method(
    model: nnx.Module,
    name: str,
    args: Any,
    kwargs: Any,
    held: Held,
    evaluate: Callable[[Callable[[Within], Pure], Any, Any], Any],
    always: bool = False,
) -> Any:
    """Calls a method of a model, evaluated by a transform, and updates the model's state.

    The model and NNX objects among the arguments (`rngs=`) go through the transform as one graph,
    as they do through `nnx.jit`: shared variables stay shared, what the method changes is changed.

    Args:
      model: the model.
      name: the method's name.
      args: its arguments.
      kwargs: its keyword arguments.
      held: variables that stay as they are, with their index among all and their value.
      evaluate: `(pure, params, inputs)` to the result of `pure(within)(params, *inputs)`, where
        `within(model)` is a context that the method runs in.
      always: return the state even where the method has not changed it.
    """
    given, tree = jax.tree.flatten((args, kwargs), is_leaf=_is_object)
    inputs = [None if _is_object(x) else x for x in given]
    traced: list[Any] = []  # what only the trace tells: how to rebuild results, if state changed

    def pure(within: Within) -> Pure:
        def call(params: Any, moving: Any, others: list[Any], inputs: list[Any]) -> Any:
            with nnx.merge_context(_TAG, inner=True) as merging:
                inner = merging.merge(graphdef, params, moving, rest)
                objects = [merging.merge(d, s) for d, s in zip(graphdefs, others, strict=True)]
            found = variables(inner)
            constants = [found[i] for i, _, _ in held]
            left = iter(objects)
            whole = [next(left) if _is_object(a) else b for a, b in zip(given, inputs, strict=True)]
            new_args, new_kwargs = jax.tree.unflatten(tree, whole)
            with within(inner):
                arrays, rebuild = arrays_of(getattr(inner, name)(*new_args, **new_kwargs))
            for variable in constants:
                variable.set_raw_value(None)
            with nnx.split_context(_TAG) as splitting:
                parts = splitting.split(inner, nnx.Param, INPUTS, ...)
                after = [parts, *map(splitting.split, objects)]
            before = (params, moving, rest), *others
            same = not always and _same((graphdef, *graphdefs), before, after)
            traced[:] = [rebuild, same]
            return arrays, None if same else after

        return call

    with nnx.update_context(_TAG):
        with nnx.split_context(_TAG) as splitting:
            graphdef, params, moving, rest = splitting.split(model, nnx.Param, INPUTS, ...)
            pairs = [splitting.split(x) for x in given if _is_object(x)]
        graphdefs, others = [d for d, _ in pairs], [s for _, s in pairs]
        arrays, after = evaluate(pure, params, (moving, others, inputs))
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


def variables(model: nnx.Module) -> list[nnx.Variable[Any]]:
    """All variables of a model, in the order of its graph."""
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Variable)]


def _is_object(x: Any) -> bool:
    return isinstance(x, (nnx.Pytree, nnx.Variable))
