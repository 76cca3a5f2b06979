"""The doors for Flax Linen: `quantized` wraps a model, `interceptor` works in place.

Both trace the model as a pure function of its variables and evaluate that, as `jaxquant.quantized`
does; the model itself is neither edited nor subclassed. Key paths begin with the collection:
`params/encoder/layer_0/kernel` (patterns match with or without `params/`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import Scope, unfreeze
from flax.core.scope import LazyRng, in_filter
from flax.linen.transforms import get_module_scopes, set_module_scopes
from flax.traverse_util import flatten_dict

from jaxquant.interpret.calls import Call, is_traced, trace_call
from jaxquant.interpret.record import sites_of
from jaxquant.interpret.serve import serve
from jaxquant.interpret.sites import Sites
from jaxquant.params import dequantize_params, quantize_params
from jaxquant.ptq import ptq
from jaxquant.qtensor import is_qtensor
from jaxquant.recipe import Recipe
from jaxquant.report import Report

Interceptor = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class QuantizedModel:
    """A Linen model that computes with quantized variables; `quantized` makes it.

    Attributes:
      model: the model, as it was given.
      recipe: for variables that are still float when they come in; `None` leaves those alone.
    """

    model: nn.Module
    recipe: Recipe | None = None

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Initializes float variables, just as `model.init` does."""
        return self.model.init(rngs, *args, **kwargs)

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Applies the model, with all keywords that `model.apply` has.

        Raises:
          ValueError: nothing is quantized, or what `jaxquant.quantize_params` refuses.
        """
        rebuild: list[Callable[[list[Any]], Any]] = []

        def fn(variables: Any, *args: Any, **kwargs: Any) -> list[Any]:
            arrays, again = _arrays(self.model.apply(variables, *args, **kwargs))
            rebuild[:] = [again]
            return arrays

        call = trace_call(fn, variables, args, kwargs)
        if self.recipe is not None:
            call = _quantize_call(call, variables, self.recipe, sites_of(call))
        result = rebuild[0](serve(call, self.recipe)[0])
        if kwargs.get("mutable", False) is False and not kwargs.get("capture_intermediates"):
            return result
        out, mutated = result
        given = dict(jax.tree.leaves_with_path(variables, is_leaf=is_qtensor))
        return out, jax.tree.map_with_path(
            lambda path, new: _as_given(new, given.get(path)), mutated, is_leaf=is_qtensor
        )

    def ptq(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, Report]:
        """Quantizes variables by the recipe: `jaxquant.ptq(model.apply, variables, recipe, ...)`.

        Args:
          variables: float variables; collections that no contraction uses stay as they are.
          *args: what else `model.apply` is called with.
          **kwargs: its keywords, and those of `jaxquant.ptq`.

        Raises:
          ValueError: there is no recipe, or as `jaxquant.ptq`.
        """
        if self.recipe is None:
            raise ValueError("ptq: this model has no recipe; expected quantized(model, recipe)")
        return ptq(self.model.apply, variables, self.recipe, *args, **kwargs)


def quantized(model: nn.Module, recipe: Recipe | None = None) -> QuantizedModel:
    """The model with `init` and `apply` that compute as `jaxquant.quantized(model.apply)`.

    Variables may hold `QTensor`s; with a recipe, float variables that it matches are quantized as
    part of the computation, which is how to try a recipe without storing anything.

    Args:
      model: an unbound Linen module; it is not changed.
      recipe: for variables that come in float.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
    >>> model, x = nn.Dense(8), jnp.ones((2, 32))
    >>> qmodel = quantized(model, jq.w8a8())
    >>> qvariables, report = qmodel.ptq(model.init(jax.random.key(0), x), x)
    >>> jax.jit(qmodel.apply)(qvariables, x).shape, report["params/kernel"].bits_per_weight
    ((2, 8), 9.0)
    """
    return QuantizedModel(model, recipe)


def interceptor(recipe: Recipe | None = None) -> Interceptor:
    """An interceptor for `flax.linen.intercept_methods` under which models compute quantized.

    It acts on the outermost call of a method, whichever that is, and on `model.bind(...)` too;
    variables are updated, values sown and random numbers drawn as without it. Under `init` it
    steps aside, as it does for a float call that uses none of what the recipe matches.

    `jax.jit` remembers what a function did when it was first traced: enter the context inside the
    function that is jitted. This holds for `nn.jit` around the outermost method as well; there
    `quantized(model, recipe).apply` is the door to take.

    Args:
      recipe: for float variables, quantized as part of the computation; `None` if the variables
        hold `QTensor`s already.

    Raises:
      ValueError: at the call, as `QuantizedModel.apply`.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
    >>> model, x = nn.Dense(8), jnp.ones((2, 32))
    >>> variables = model.init(jax.random.key(0), x)
    >>> with nn.intercept_methods(interceptor(jq.w8a8())):
    ...     y = model.apply(variables, x)
    >>> bool(jnp.allclose(y, model.apply(variables, x), atol=0.05))
    True
    """
    local = threading.local()  # interceptors are per thread in Flax, too

    def intercept(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        outer: _Outermost | None = getattr(local, "outer", None)
        scope = context.module.scope
        if outer is not None:
            return outer.inside(next_fun, args, kwargs, context)
        if scope is None or context.module.is_initializing():
            return next_fun(*args, **kwargs)
        if context.method_name == "setup":
            with _floats(scope):
                return next_fun(*args, **kwargs)
        local.outer = outer = _Outermost(context, args, kwargs)
        try:
            call = trace_call(outer.pure, outer.variables, (outer.rngs, *outer.args), outer.kwargs)
            if recipe is not None or not _holds_qtensor(call.leaves):
                sites = sites_of(call)
                if not _holds_qtensor(call.leaves) and _unconcerned(sites, recipe):
                    return next_fun(*args, **kwargs)
                if recipe is not None:
                    call = _quantize_call(call, outer.variables, recipe, sites)
            return outer.finish(serve(call, recipe)[0])
        finally:
            local.outer = None

    return intercept


class _Outermost:
    """One intercepted call as a pure function of the variables, the root's keys, and its inputs.

    Flax's own lifted transforms work so: `get_module_scopes` finds the scopes of a module and of
    modules among its fields and arguments, `set_module_scopes` clones them onto others. Here the
    others belong to a new root that holds stand-ins. Random keys are passed as the root has them
    with all counters, so that each draw is the one of the float model.
    """

    def __init__(
        self, context: nn.module.InterceptorContext, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.module = context.module
        # bound as functools.partial(function, module)
        self.function = context.orig_method.func  # type: ignore[attr-defined]
        self.name = context.method_name
        self.scopes, self.args, self.kwargs = get_module_scopes(self.module, args, kwargs)
        self.root = self.scopes[-1].root
        if any(scope.root is not self.root for scope in self.scopes):
            raise ValueError(
                f"{type(self.module).__name__}.{self.name}: expected modules bound by one apply "
                "or bind, got some of another"
            )
        self.variables = dict(self.root.variables())
        self.rngs = {name: lazy.rng for name, lazy in self.root.rngs.items()}
        self._clone: nn.Module | None = None

    def pure(self, variables: dict[str, Any], rngs: dict[str, Any], *args: Any, **kw: Any) -> Any:
        """The call on stand-ins: arrays of the result and of the variables that changed."""
        mutable = self.root.mutable
        root = Scope(
            {c: unfreeze(v) if in_filter(mutable, c) else v for c, v in variables.items()},
            {name: LazyRng(key, self.root.rngs[name].suffix) for name, key in rngs.items()},
            self.root.name,
            mutable,  # the filter: collections that do not exist yet may come to
            path=self.root.path,
            debug_path=self.root.debug_path,
            flags=self.root.flags,
        )
        root.rng_counters = _copied(self.root.rng_counters)
        with root.temporary():
            scopes = [_at(root, scope.path[len(root.path) :]) for scope in self.scopes]
            clone, args, kw = set_module_scopes(self.module, args, kw, scopes)
            self._clone, self._within = clone, (root, args, kw)
            self._method(clone)(*args, **kw)
        arrays, self._rebuild = _arrays(self._result)
        return arrays

    def _method(self, module: nn.Module) -> Callable[..., Any]:
        """The bound method of a function; its name may be that of some decorator's wrapper."""
        for cls in type(module).__mro__:
            for method in vars(cls).values():
                if getattr(method, "__wrapped__", None) is self.function:
                    return method.__get__(module)
        return getattr(module, self.name)

    def inside(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        """A method call within the pure function; the first one on the clone is its body.

        Interceptors outside this one, and the capture of the method's result, surround that call
        a second time. So what counts is taken here, before they see it.
        """
        if context.module is not self._clone or context.orig_method.func is not self.function:  # type: ignore[attr-defined]
            return next_fun(*args, **kwargs)
        self._clone = None  # further calls are recursion
        root, args, kwargs = self._within
        before = flatten_dict(unfreeze(root.mutable_variables()))
        result = next_fun(*args, **kwargs)
        after = flatten_dict(unfreeze(root.mutable_variables()))
        changed = {p: v for p, v in after.items() if p not in before or v is not before[p]}
        self._result, self._counters = (result, changed), _copied(root.rng_counters)
        return result

    def finish(self, arrays: list[Any]) -> Any:
        """Writes variables and counters back through the scope; the call's result."""
        result, changed = self._rebuild(arrays)
        given = flatten_dict(self.variables)
        for path, value in changed.items():
            value = _as_given(value, given.get(path))
            for name in reversed(path[2:]):
                value = {name: value}
            self.root.put_variable(path[0], path[1], value)
        _update(self.root.rng_counters, self._counters)
        return result


def _at(root: Scope, path: tuple[str, ...]) -> Scope:
    for name in path:
        root = root.push(name, reuse=True)
    return root


def _copied(counters: Mapping[Any, Any]) -> dict[Any, Any]:
    """Counters of a scope hold those of its children: keys stay, dicts are new."""
    return {k: _copied(v) if isinstance(v, dict) else v for k, v in counters.items()}


def _update(counters: dict[Any, Any], new: Mapping[Any, Any]) -> None:
    """In place, since child scopes refer to the inner dicts."""
    for k, v in new.items():
        if isinstance(v, dict):
            _update(counters.setdefault(k, {}), v)
        else:
            counters[k] = v


@contextlib.contextmanager
def _floats(scope: Scope) -> Iterator[None]:
    """A scope whose own raw parameters are dequantized, for a `setup` outside of any transform.

    `setup` of a bound module comes before the method, and its `self.param` compares the shape of
    a parameter's first leaf. Private: `Scope` offers no other way to look at variables anew
    without changing a dict that may be the caller's.
    """
    saved = {col: scope._collection(col) for col in scope.root.variables()}
    own = {
        col: {k: x for k, x in values.items() if not isinstance(x, Mapping) and _holds_qtensor(x)}
        for col, values in saved.items()
    }
    own = {col: values for col, values in own.items() if values}
    try:
        for col, values in own.items():
            scope._variables[col] = {**saved[col], **dequantize_params(values)}
        yield
    finally:
        for col in own:
            scope._variables[col] = saved[col]


def _quantize_call(call: Call, variables: Any, recipe: Recipe, sites: Sites) -> Call:
    """The call with float variables quantized: in the program if they are traced."""
    with jax.ensure_compile_time_eval():  # for concrete arrays that a jitted function closes over
        qvariables, _ = quantize_params(variables, recipe, sites=sites)
    new = [leaf for leaf in jax.tree.leaves(qvariables, is_leaf=is_qtensor) if is_traced(leaf)]
    return dataclasses.replace(call, leaves=new + call.leaves[len(new) :])


def _unconcerned(sites: Sites, recipe: Recipe | None) -> bool:
    """Whether a call has no site to quantize, but another call of the model may.

    Of a leaf that this call computes with and cannot quantize, the recipe's user must hear.
    """
    used = {site.param for site in sites.sites if site.param is not None}
    if not used or recipe is None:
        return not used

    def matched(path: str) -> bool:
        rule = recipe.match(path)
        return rule is not None and (rule.weights or rule.lookup) is not None

    elsewhere = [path for path in sites.leaves if path not in used and path not in sites.met]
    return not any(map(matched, used)) and any(map(matched, elsewhere))


def _arrays(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays of a result, and a function that puts others in their places."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [leaf for leaf in leaves if is_traced(leaf)]
    static = [(False, None) if is_traced(leaf) else (True, leaf) for leaf in leaves]

    def rebuild(arrays: list[Any]) -> Any:
        given = iter(arrays)
        return jax.tree.unflatten(structure, [x if known else next(given) for known, x in static])

    return arrays, rebuild


def _holds_qtensor(tree: Any) -> bool:
    return any(map(is_qtensor, jax.tree.leaves(tree, is_leaf=is_qtensor)))


def _as_given(value: Any, given: Any) -> Any:
    """An updated variable: one that came in float and was only passed on stays as it came."""
    return given if _holds_qtensor(value) and not _holds_qtensor(given) else value
