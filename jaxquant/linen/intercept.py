"""The interceptor: the only code that depends on how Flax binds modules to scopes."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
from flax.core import Scope, unfreeze
from flax.core.scope import LazyRng, in_filter
from flax.linen.module import InterceptorContext, TestScope, wrap_method_once
from flax.linen.transforms import get_module_scopes, set_module_scopes
from flax.traverse_util import flatten_dict

from jaxquant.interpret.calls import trace_call
from jaxquant.interpret.serve import serve
from jaxquant.linen.collection import NAME, parted, recorded, records, require_recorded
from jaxquant.linen.pure import arrays_only, as_given, leaves, prepared
from jaxquant.params import dequantize_params
from jaxquant.qtensor import is_qtensor
from jaxquant.recipe import Recipe, RecipeLike, as_recipe

Interceptor = Callable[[Callable[..., Any], Any, Any, InterceptorContext], Any]


def interceptor(recipe: RecipeLike | None = None) -> Interceptor:
    """Makes an interceptor for `flax.linen.intercept_methods` that lets models compute quantized.

    It acts on the outermost call of any method, also of models bound by `bind`; variable updates,
    sown values and random numbers are those without it. It does nothing under `init`, and for a
    float call that uses none of the leaves that the recipe matches. With `mutable=["quant"]` and
    observers in the recipe it records, as `QuantizedModel.apply`.

    Enter the context inside a jitted function: `jax.jit` reuses the trace of the first call.
    `nn.jit` around the outermost method does the same, so float variables raise there; use
    `quantized(model, recipe).apply` instead.

    Args:
      recipe: for float variables, quantized as part of the computation; `None` if the variables
        hold `QTensor`s already.

    Raises:
      ValueError: `recipe` is not a recipe; at the call, as `QuantizedModel.apply`; float variables
        within `nn.jit`.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
    >>> model, x = nn.Dense(8), jnp.ones((2, 32))
    >>> variables = model.init(jax.random.key(0), x)
    >>> with nn.intercept_methods(interceptor(jq.w8a8())):
    ...     y = model.apply(variables, x)
    >>> bool(jnp.allclose(y, model.apply(variables, x), atol=0.05))
    True
    """
    if recipe is not None:
        recipe = as_recipe(recipe, "linen.interceptor")
    chosen: Recipe | None = recipe
    local = threading.local()  # interceptors are per thread in Flax, too

    def intercept(
        next_fun: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext
    ) -> Any:
        outermost: _Outermost | None = getattr(local, "outermost", None)
        scope = context.module.scope
        if outermost is not None:
            return outermost.inside(next_fun, args, kwargs, context)
        # Flax runs a setup in a TestScope to check it
        if scope is None or isinstance(scope, TestScope) or context.module.is_initializing():
            return next_fun(*args, **kwargs)
        if context.method_name == "setup":
            with _floats(scope):
                return next_fun(*args, **kwargs)
        local.outermost = call = _Outermost(context, args, kwargs)
        try:
            if chosen is not None:
                call.check_not_cached()
            fn, rebuild = arrays_only(call.pure)
            traced = trace_call(fn, call.variables, (call.rngs, *call.args), call.kwargs)
            if records(call.root.mutable, chosen):
                assert chosen is not None
                arrays, quant = recorded(traced, chosen, call.quant)
                result = call.finish(*rebuild(arrays))
                for name, value in quant.items():
                    call.root.put_variable(NAME, name, value)
                return result
            ready = prepared(traced, call.variables, chosen)
            if ready is None:
                return next_fun(*args, **kwargs)
            result = call.finish(*rebuild(serve(ready, chosen)[0]))
            require_recorded(call.root.mutable, chosen, call.root.variables())
            return result
        finally:
            local.outermost = None

    return intercept


class _Outermost:
    """One intercepted call as a pure function of the variables, the root's keys, and its inputs.

    This follows Flax's lifted transforms: `get_module_scopes` finds the scopes of a module and of
    modules among its fields and arguments, `set_module_scopes` clones them onto other scopes. Here
    these belong to a new root with traced variables. Random keys are passed with all counters of
    the root, so that each draw equals that of the float model.
    """

    def __init__(self, context: InterceptorContext, args: Any, kwargs: Any) -> None:
        self.module = context.module
        self.function = _function(context)
        self.scopes, self.args, self.kwargs = get_module_scopes(self.module, args, kwargs)
        self.root = self.scopes[-1].root
        if any(scope.root is not self.root for scope in self.scopes):
            name = f"{type(self.module).__name__}.{context.method_name}"
            raise ValueError(f"{name}: expected modules of one apply or bind, got several")
        variables, self.quant = parted(self.root.variables())
        self.variables = dict(variables)
        self.rngs = {name: lazy.rng for name, lazy in self.root.rngs.items()}
        self._clone: nn.Module | None = None

    def check_not_cached(self) -> None:
        """Raises within `nn.jit`, whose cache cannot tell this call from one on float variables."""
        jitted = any("jit(" in part for part in self.root.debug_path)
        if jitted and not any(map(is_qtensor, leaves(self.variables))):
            raise ValueError(
                f"{type(self.module).__name__} is called within nn.jit, whose cache does not tell "
                "a quantized call of float variables from a float one; use "
                "jaxquant.linen.quantized(model, recipe).apply, or quantize the variables first"
            )

    def pure(self, variables: Any, rngs: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Runs the call on traced values; returns its result and changed variables by path."""
        mutable = self.root.mutable
        root = Scope(
            {c: unfreeze(v) if in_filter(mutable, c) else v for c, v in variables.items()},
            {name: LazyRng(key, self.root.rngs[name].suffix) for name, key in rngs.items()},
            self.root.name,
            mutable,  # the filter itself: the call may create collections
            path=self.root.path,
            debug_path=self.root.debug_path,
            flags=self.root.flags,
        )
        root.rng_counters = _copied(self.root.rng_counters)
        with root.temporary():
            skip = len(root.path)
            scopes = [
                functools.reduce(lambda s, name: s.push(name, reuse=True), scope.path[skip:], root)
                for scope in self.scopes
            ]
            clone, *inputs = set_module_scopes(self.module, args, kwargs, scopes)
            self._clone, self._within = clone, (root, *inputs)
            wrap_method_once(self.function)(clone, *inputs[0], **inputs[1])
        return self._result

    def inside(
        self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext
    ) -> Any:
        """Runs a method call within the pure function; the first one on the clone is its body.

        Interceptors outside this one, and the capture of the method's result, see that call a
        second time. So its result and changes are recorded here, before they see it.
        """
        if context.module is not self._clone or _function(context) is not self.function:
            return next_fun(*args, **kwargs)
        self._clone = None  # further calls are recursion
        root, args, kwargs = self._within
        before = _flat(root.mutable_variables())
        result = next_fun(*args, **kwargs)
        after = _flat(root.mutable_variables())
        changed = {p: v for p, v in after.items() if p not in before or v is not before[p]}
        self._result, self._counters = (result, changed), _copied(root.rng_counters)
        return result

    def finish(self, result: Any, changed: dict[tuple[str, ...], Any]) -> Any:
        """Writes variables and counters back through the scope; returns the call's result."""
        old_values = _flat(self.variables)
        for path, value in changed.items():
            value = as_given(value, old_values.get(path))
            for name in reversed(path[2:]):
                value = {name: value}
            self.root.put_variable(path[0], path[1], value)
        _update(self.root.rng_counters, self._counters)
        return result


def _function(context: InterceptorContext) -> Callable[..., Any]:
    return context.orig_method.func  # type: ignore[attr-defined]  # functools.partial(f, module)


def _flat(variables: Any) -> dict[tuple[str, ...], Any]:
    return flatten_dict(unfreeze(variables))


def _copied(counters: Mapping[Any, Any]) -> dict[Any, Any]:
    """Copies the nested dicts of a scope's counters; keys and counts stay the same."""
    return {k: _copied(v) if isinstance(v, dict) else v for k, v in counters.items()}


def _update(counters: dict[Any, Any], new: Mapping[Any, Any]) -> None:
    """In place, since child scopes refer to the inner dicts."""
    for k, v in new.items():
        if isinstance(v, dict):
            _update(counters.setdefault(k, {}), v)
        else:
            counters[k] = v


@contextlib.contextmanager
def _floats(scope: Any) -> Iterator[None]:
    """Dequantizes a scope's own parameters during a `setup` outside of any transform.

    `setup` of a bound module runs before the method, and its `self.param` compares the shape of a
    parameter's first leaf. Uses private fields, to leave the caller's dict unchanged.
    """
    params = scope._collection("params")
    quantized = {k: v for k, v in params.items() if any(map(is_qtensor, leaves(v)))}
    quantized = {k: v for k, v in quantized.items() if not isinstance(v, Mapping)}
    if quantized:
        scope._variables["params"] = {**params, **dequantize_params(quantized)}
    try:
        yield
    finally:
        if quantized:
            scope._variables["params"] = params
