"""A Linen model whose `apply` computes with quantized variables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from jaxquant.capture import Statistics, plan_of
from jaxquant.interpret.calls import trace_call
from jaxquant.interpret.serve import serve
from jaxquant.linen.collection import (
    NAME,
    parted,
    recorded,
    records,
    require_recorded,
    require_sound,
    statistics_of,
)
from jaxquant.linen.pure import arrays_only, as_given, prepared
from jaxquant.qtensor import is_qtensor
from jaxquant.recipe import Recipe, RecipeLike, as_recipe


@dataclasses.dataclass(frozen=True)
class QuantizedModel:
    """A Linen model whose `apply` computes with quantized variables; `quantized` makes it.

    `init`, `init_with_output` and `tabulate` are those of the float model. For all else use
    `model`; a bound model computes quantized under `interceptor`.

    Attributes:
      model: the wrapped model, unchanged.
      recipe: for float variables; `None` leaves them in float.
    """

    model: nn.Module
    recipe: Recipe | None = None

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Initializes float variables as `model.init` does."""
        return self.model.init(rngs, *args, **kwargs)

    def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Initializes float variables and computes with them, as `model.init_with_output` does."""
        return self.model.init_with_output(rngs, *args, **kwargs)

    def tabulate(self, rngs: Any, *args: Any, **kwargs: Any) -> str:
        """Returns `model.tabulate`, the summary of the float model."""
        return self.model.tabulate(rngs, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "bind":
            raise AttributeError(
                "QuantizedModel has no bind; under nn.intercept_methods(jaxquant.linen."
                "interceptor()) the methods of model.bind(qvariables) compute quantized"
            )
        raise AttributeError(f"QuantizedModel has no {name!r}; ask its model, as in qmodel.model")

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Applies the model, with all keywords that `model.apply` has.

        If `mutable` names `"quant"` and the recipe has observers, float variables stay float, and
        the states of the observers are returned in that collection. If the variables already have
        one, it is updated; `ptq` and `statistics` read it, and otherwise it has no effect.

        Raises:
          ValueError: nothing is quantized; as `jaxquant.quantize_params`; the `quant` collection is
            of another model, or `mutable` names it but the recipe has no observer.

        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
        >>> x, qmodel = jnp.ones((2, 32)), quantized(nn.Dense(8), jq.w8a8())
        >>> y, seen = qmodel.apply(qmodel.init(jax.random.key(0), x), x, capture_intermediates=True)
        >>> jax.tree.map(jnp.shape, seen)
        {'intermediates': {'__call__': ((2, 8),)}}
        """
        fn, rebuild = arrays_only(self.model.apply)
        variables, quant = parted(variables)
        traced = trace_call(fn, variables, args, kwargs)
        recording = records(kwargs.get("mutable"), self.recipe)
        if recording:
            assert self.recipe is not None
            arrays, quant = recorded(traced, self.recipe, quant)
            out, mutated = rebuild(arrays)
            result = out, {**mutated, NAME: quant}
        else:
            call = prepared(traced, variables, self.recipe)
            if call is None:
                return self._float(variables, args, kwargs)
            result = rebuild(serve(call, self.recipe)[0])
        if kwargs.get("mutable", False) is False and not kwargs.get("capture_intermediates"):
            return result
        out, mutated = result
        require_recorded(kwargs.get("mutable"), self.recipe, mutated)
        old_values = dict(jax.tree.leaves_with_path(variables, is_leaf=is_qtensor))
        return out, jax.tree.map_with_path(
            lambda path, new: as_given(new, old_values.get(path)), mutated, is_leaf=is_qtensor
        )

    def _float(self, variables: Any, args: Any, kwargs: Any) -> Any:
        """Runs a call that has nothing to quantize."""
        result: Any = self.model.apply(variables, *args, **kwargs)
        if kwargs.get("mutable", False) is not False:
            require_recorded(kwargs["mutable"], self.recipe, result[1])
        return result

    def statistics(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Statistics:
        """Converts the `quant` collection of variables to statistics as of `jaxquant.capture`.

        Args:
          variables: variables with the collection.
          *args: the other arguments of `model.apply`, to trace it.
          **kwargs: its keyword arguments.

        Raises:
          ValueError: there is no recipe or no collection, or it is of another model; some site was
            never reached, or had NaN or infinity.

        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
        >>> rule = jq.Rule(
        ...     "**",
        ...     weights=jq.int8(),
        ...     activations=jq.int8(granularity=jq.PerTensor()),
        ...     observer=jq.observers.minmax(),
        ... )
        >>> qmodel, x = quantized(nn.Dense(8), rule), jnp.linspace(-1, 3, 64).reshape(2, 32)
        >>> variables = qmodel.init(jax.random.key(0), x)
        >>> y, seen = qmodel.apply(variables, x, mutable=["quant"])
        >>> print(qmodel.statistics({**variables, **seen}, x))
        site           operand  observer  range    updates
        params/kernel  lhs      minmax()  -1 .. 3  1
        """
        variables, quant = parted(variables)
        if self.recipe is None or quant is None:
            lack = "recipe" if self.recipe is None else f"{NAME!r} collection"
            raise ValueError(
                f"linen: there is no {lack}; expected variables updated by "
                f"quantized(model, recipe).apply(variables, ..., mutable=[{NAME!r}])"
            )
        fn, _ = arrays_only(self.model.apply)
        plan = plan_of(trace_call(fn, variables, args, kwargs), self.recipe, "linen")
        stats = statistics_of(plan, quant)
        require_sound(stats)
        return stats


def quantized(model: nn.Module, recipe: RecipeLike | None = None) -> QuantizedModel:
    """Wraps a model; its `apply` computes as `jaxquant.quantized(model.apply)`.

    Variables may hold `QTensor`s; with a recipe, float variables that it matches are quantized as
    part of the computation, to try a recipe without storing anything.

    Args:
      model: an unbound Linen module; it is not changed.
      recipe: for float variables.

    Raises:
      ValueError: `model` is not a Linen module, or `recipe` is not a recipe.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
    >>> model, x = nn.Dense(8), jnp.ones((2, 32))
    >>> qmodel = quantized(model, jq.w8a8())
    >>> variables = model.init(jax.random.key(0), x)
    >>> qvariables, report = jq.linen.ptq(model, variables, jq.w8a8(), x)
    >>> jax.jit(qmodel.apply)(qvariables, x).shape, report["params/kernel"].bits_per_weight
    ((2, 8), 9.0)
    """
    where = "linen.quantized"
    require_module(model, where, "jaxquant.quantized")
    return QuantizedModel(model, None if recipe is None else as_recipe(recipe, where))


def require_module(model: Any, where: str, for_functions: str) -> None:
    """Raises unless `model` is a Linen module; names the API `for_functions` in the message."""
    owner = getattr(model, "__self__", None)
    if isinstance(owner, nn.Module):
        raise ValueError(
            f"{where}: expected the module itself, got its method {model.__name__}; functions, "
            f"such as model.apply, are for {for_functions}"
        )
    if not isinstance(model, nn.Module):
        kind = "a class; make an instance" if isinstance(model, type) else type(model).__name__
        raise ValueError(f"{where}: expected a Linen module, got {kind}")
