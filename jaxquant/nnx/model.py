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
Fixed = Sequence[tuple[int, nnx.Variable[Any], Any]]


class Wrapped(nnx.Module):
    """A model whose method calls go through `_compute`.

    Attributes:
      model: the wrapped model.
    """

    def __init__(self, model: nnx.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model."""
        return self._compute("__call__", args, kwargs)

    def _compute(self, name: str, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Callable[..., Any]:
        # called for names the wrapper lacks: early in unpickling or copying also for `model`
        model = None if name.startswith("_") or name == "model" else vars(self).get("model")
        if model is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        attribute = inspect.getattr_static(type(model), name, None)
        if isinstance(attribute, (staticmethod, classmethod)):
            return getattr(model, name)
        if not inspect.isroutine(attribute):
            raise AttributeError(
                f"{type(model).__name__} has no method {name!r}; for its other attributes "
                f"go through the submodule, as in qmodel.model.{name}"
            )

        @functools.wraps(attribute)
        def method(*args: Any, **kwargs: Any) -> Any:
            return self._compute(name, args, kwargs)

        return method


class Quantized(Wrapped):
    """An NNX model whose methods contract on the codes of its quantized parameters.

    It has the methods of the model's class, each transformed as `jaxquant.quantized` transforms a
    function. The model is an ordinary submodule: `eval`, `train`,
    `nnx.split`, `nnx.jit`, `nnx.iter_modules` and checkpoints of the state all reach into it.
    Method calls update batch statistics, caches and random states as in the float model; `QTensor`s
    are constants, and a method's assignments to them are discarded. If no parameter is a `QTensor`
    (for example within `jaxquant.trace`) the methods run unchanged. `nnx.grad` needs a filter that
    excludes `QTensor`s, such as `nnx.DiffState(0, nnx.LoRAParam)`.

    Attributes:
      model: the wrapped model, with `QTensor`s in place of some parameters' arrays.

    >>> import jax.numpy as jnp, jaxquant.nnx, jaxquant as jq
    >>> from flax import nnx
    >>> model = nnx.Embed(16, 8, rngs=nnx.Rngs(0))
    >>> qmodel, _ = jq.nnx.ptq(model, jq.w8a8(), jnp.ones((2, 8)), method="attend")
    >>> qmodel.attend(jnp.ones((3, 8))).shape, qmodel(jnp.array([1, 2])).shape
    ((3, 16), (2, 8))
    """

    def _compute(self, name: str, args: Any, kwargs: Any) -> Any:
        fixed = [(i, v, v.get_raw_value()) for i, v in enumerate(variables(self.model))]
        fixed = [(i, v, q) for i, v, q in fixed if is_qtensor(q)]
        if not fixed:
            return getattr(self.model, name)(*args, **kwargs)

        def served(pure: Callable[[Within], Pure], params: Any, inputs: Any) -> Any:
            return serve(trace_call(pure(contextlib.nullcontext), params, inputs, {}))[0]

        return run_method(self.model, name, args, kwargs, fixed, served)


def run_method(
    model: nnx.Module,
    name: str,
    args: Any,
    kwargs: Any,
    fixed: Fixed,
    evaluate: Callable[[Callable[[Within], Pure], Any, Any], Any],
    always: bool = False,
) -> Any:
    """Evaluates a method of a model by a transform, and updates the model's state.

    The model and NNX objects among the arguments (`rngs=`) pass through the transform as one graph,
    as through `nnx.jit`: shared variables stay shared, and changes by the method take effect.

    Args:
      model: the model.
      name: the method's name.
      args: its arguments.
      kwargs: its keyword arguments.
      fixed: variables that are not updated, as (index among all variables, variable, value).
      evaluate: maps `(pure, params, inputs)` to the result of `pure(within)(params, *inputs)`,
        where `within(model)` is a context that the method runs in.
      always: return the state even if the method has not changed it.
    """
    flat, tree = jax.tree.flatten((args, kwargs), is_leaf=_is_object)
    inputs = [None if _is_object(x) else x for x in flat]
    traced: list[Any] = []  # known after tracing: how to rebuild results, and if state changed

    def pure(within: Within) -> Pure:
        def call(params: Any, moving: Any, others: list[Any], inputs: list[Any]) -> Any:
            with nnx.merge_context(_TAG, inner=True) as merging:
                inner = merging.merge(graphdef, params, moving, rest)
                objects = [merging.merge(d, s) for d, s in zip(graphdefs, others, strict=True)]
            inner_variables = variables(inner)
            constants = [inner_variables[i] for i, _, _ in fixed]
            left = iter(objects)
            leaves = [next(left) if _is_object(a) else b for a, b in zip(flat, inputs, strict=True)]
            new_args, new_kwargs = jax.tree.unflatten(tree, leaves)
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
            pairs = [splitting.split(x) for x in flat if _is_object(x)]
        graphdefs, others = [d for d, _ in pairs], [s for _, s in pairs]
        arrays, after = evaluate(pure, params, (moving, others, inputs))
        rebuild, same = traced
        if not same:
            with nnx.merge_context(_TAG, inner=False) as merging:
                for changed, *states in after:
                    merging.merge(changed, *states)
            for _, variable, q in fixed:
                variable.set_raw_value(q)
    return rebuild(arrays)


def _same(graphdefs: Any, before: Any, after: Any) -> bool:
    """Whether a method left structure and state unchanged; fixed variables are `None`."""
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
