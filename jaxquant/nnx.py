"""The door for Flax NNX: `ptq` gives a quantized copy of a model; `capture` observes one."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import nnx
from jax import Array

from jaxquant.capture import Statistics, arguments, capture_with
from jaxquant.interpret.calls import is_traced, trace_call
from jaxquant.interpret.serve import serve
from jaxquant.observers import Observer
from jaxquant.ptq import ptq as ptq_function
from jaxquant.qtensor import is_qtensor
from jaxquant.recipe import Recipe, Rule, as_recipe
from jaxquant.report import Report

_TAG = "jaxquant"  # of the update contexts below


def ptq(
    model: nnx.Module,
    recipe: Recipe | Rule | Iterable[Rule],
    *args: Any,
    method: str = "__call__",
    key: Array | None = None,
    batches: Iterable[Any] | None = None,
    stats: Statistics | None = None,
    **kwargs: Any,
) -> tuple[Quantized, Report]:
    """Quantizes the parameters of an NNX model by a recipe, into a new model.

    As `jaxquant.ptq`: sites come from tracing `model(*args, **kwargs)` once, nothing is run, and
    `args` may be `jax.ShapeDtypeStruct`s. Parameters are the `nnx.Param`s, their key paths the
    model's attributes, such as `layers/0/attn/query/kernel`. The model itself, with its
    statistics and random states, stays as it is.

    Args:
      model: the float model, or a quantized one to quantize more of.
      recipe: rules on key paths, such as `jaxquant.w8a8()`; a rule or several make one.
      *args: what to trace the method with.
      method: name of the method to trace; parameters that it does not use stay float.
      key: PRNG key for encoders that round stochastically.
      batches: calibration samples for rules with an observer, each the tuple of the method's
        arguments (or the one argument); of the first `args` are the default.
      stats: what `capture` found, in place of `batches`.
      **kwargs: keyword arguments of the method.

    Returns:
      The quantized model, see `Quantized`, and a report on every parameter.

    Raises:
      ValueError: `recipe` is none; `model` is no NNX module, lacks the method or has variables that
        are references; a rule matches nothing, nothing is quantized, or a parameter is not finite
        or cannot be quantized as its rule says.

    >>> import jax, jax.numpy as jnp, jaxquant.nnx, jaxquant as jq
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), nnx.relu)
    >>> qmodel, report = jq.nnx.ptq(model, jq.w8a8(), jnp.ones((1, 64)))
    >>> report["layers/0/kernel"].action
    'int8 per channel, activations int8'
    >>> x = jax.random.normal(jax.random.key(1), (4, 64))
    >>> bool(abs(nnx.jit(qmodel)(x) - model(x)).max() < 0.03)
    True
    """
    recipe = as_recipe(recipe, "nnx.ptq", model)
    graphdef, params, rest = _parts(model, method, "nnx.ptq")

    def call(params: Any, rest: Any, args: Any, kwargs: Any) -> Any:
        copy = nnx.merge(graphdef, params, rest, copy=True)
        return _arrays(getattr(copy, method)(*args, **kwargs))[0]

    samples = None if batches is None else ((rest, arguments(b), kwargs) for b in batches)
    given = (rest, args, kwargs) if args or samples is None else ()
    qparams, report = ptq_function(
        call, params, recipe, *given, key=key, batches=samples, stats=stats
    )
    return Quantized(nnx.merge(graphdef, qparams, rest, copy=True)), report


def capture(
    model: nnx.Module,
    batches: Iterable[Any],
    recipe: Recipe | Rule | Iterable[Rule] | Observer,
    *,
    method: str = "__call__",
    resume: Statistics | str | os.PathLike[str] | None = None,
    save: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Statistics:
    """Runs `model(*batch)` for every batch and gathers statistics of its activations.

    As `jaxquant.capture`, with the key paths of `ptq`. The model stays as it is: each batch finds
    the same batch statistics and random states, so call `model.eval()` first.

    Args:
      model: the model, float or quantized.
      batches: any iterable of tuples of the method's arguments, or of single ones.
      recipe: rules with `observer=`; or one observer, for all contractions.
      method: name of the method to run.
      resume: statistics of an interrupted capture, or their file.
      save: a file to keep the statistics in.
      progress: a progress bar, on standard error.

    Raises:
      ValueError: as `jaxquant.capture`; `model` is no NNX module, lacks the method or has variables
        that are references.

    >>> import jax.numpy as jnp, jaxquant.nnx, jaxquant as jq
    >>> from flax import nnx
    >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    >>> print(jq.nnx.capture(model, [jnp.ones((3, 4))], jq.observers.minmax()))
    site    operand  observer  range   updates
    kernel  lhs      minmax    0 .. 1  1
    """
    where = "nnx.capture"
    graphdef, params, rest = _parts(model, method, where)

    def call(params: Any, rest: Any, *args: Any) -> Any:
        copy = nnx.merge(graphdef, params, rest, copy=True)
        return _arrays(getattr(copy, method)(*args))[0]

    return capture_with(
        where, call, params, (rest,), batches, recipe, resume=resume, save=save, progress=progress
    )


def _parts(model: Any, method: str, where: str) -> Any:
    """A model as graph definition, parameters, and the rest of its state."""
    model = model.model if isinstance(model, Quantized) else model
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
    return nnx.split(model, nnx.Param, ...)


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

    def call(params: Any, rest: Any, others: list[Any], inputs: list[Any]) -> Any:
        with nnx.merge_context(_TAG, inner=True) as merging:
            inner = merging.merge(graphdef, params, rest)
            objects = [merging.merge(d, s) for d, s in zip(graphdefs, others, strict=True)]
        variables = _variables(inner)
        constants = [variables[i] for i, _, _ in held]
        left = iter(objects)
        whole = [next(left) if _is_object(a) else b for a, b in zip(given, inputs, strict=True)]
        new_args, new_kwargs = jax.tree.unflatten(tree, whole)
        arrays, rebuild = _arrays(getattr(inner, name)(*new_args, **new_kwargs))
        for variable in constants:
            variable.set_raw_value(None)
        with nnx.split_context(_TAG) as splitting:
            after = [splitting.split(inner, nnx.Param, ...), *map(splitting.split, objects)]
        same = _same((graphdef, *graphdefs), ((params, rest), *others), after)
        traced[:] = [rebuild, same]
        return arrays, None if same else after

    with nnx.update_context(_TAG):
        with nnx.split_context(_TAG) as splitting:
            graphdef, params, rest = splitting.split(model, nnx.Param, ...)
            pairs = [splitting.split(x) for x in given if _is_object(x)]
        graphdefs, others = [d for d, _ in pairs], [s for _, s in pairs]
        arrays, after = serve(trace_call(call, params, (rest, others, inputs), {}))[0]
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


def _arrays(out: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays of a method's result, and what puts them back beside what is static in it."""
    leaves, tree = jax.tree.flatten(out)
    traced = [is_traced(leaf) for leaf in leaves]
    static = [None if t else leaf for leaf, t in zip(leaves, traced, strict=True)]

    def rebuild(arrays: list[Any]) -> Any:
        left = iter(arrays)
        whole = [next(left) if t else s for s, t in zip(static, traced, strict=True)]
        return jax.tree.unflatten(tree, whole)

    return [leaf for leaf, t in zip(leaves, traced, strict=True) if t], rebuild
