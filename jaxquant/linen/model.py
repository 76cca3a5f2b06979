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

    `init`, `init_with_output` and `tabulate` are the float model's. All else is asked of `model`;
    one that is bound computes quantized under `interceptor`.

    Attributes:
      model: the model, as it was given.
      recipe: for variables that are still float when they come in; `None` leaves those alone.
    """

    model: nn.Module
    recipe: Recipe | None = None

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Initializes float variables, just as `model.init` does."""
        return self.model.init(rngs, *args, **kwargs)

    def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Initializes float variables and computes with them, as `model.init_with_output` does."""
        return self.model.init_with_output(rngs, *args, **kwargs)

    def tabulate(self, rngs: Any, *args: Any, **kwargs: Any) -> str:
        """The summary of the float model that `model.tabulate` gives."""
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

        With `"quant"` among the collections named in `mutable`, and observers in the recipe, float
        variables are computed with as they are, and what the observers see is returned in that
        collection. Passed in again with the variables, it is added to; `ptq` and `statistics` read
        it, and otherwise it is of no effect.

        Raises:
          ValueError: nothing is quantized, or what `jaxquant.quantize_params` refuses; a `quant`
            collection of another model, or one asked for with no observer in the recipe.

        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
        >>> x, qmodel = jnp.ones((2, 32)), quantized(nn.Dense(8), jq.w8a8())
        >>> y, seen = qmodel.apply(qmodel.init(jax.random.key(0), x), x, capture_intermediates=True)
        >>> jax.tree.map(jnp.shape, seen)
        {'intermediates': {'__call__': ((2, 8),)}}
        """
        fn, rebuild = arrays_only(self.model.apply)
        variables, held = parted(variables)
        traced = trace_call(fn, variables, args, kwargs)
        recording = records(kwargs.get("mutable"), self.recipe)
        if recording:
            assert self.recipe is not None
            arrays, quant = recorded(traced, self.recipe, held)
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
        given = dict(jax.tree.leaves_with_path(variables, is_leaf=is_qtensor))
        return out, jax.tree.map_with_path(
            lambda path, new: as_given(new, given.get(path)), mutated, is_leaf=is_qtensor
        )

    def _float(self, variables: Any, args: Any, kwargs: Any) -> Any:
        """A call that has nothing to quantize."""
        result: Any = self.model.apply(variables, *args, **kwargs)
        if kwargs.get("mutable", False) is not False:
            require_recorded(kwargs["mutable"], self.recipe, result[1])
        return result

    def statistics(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Statistics:
        """The `quant` collection of variables as `jaxquant.capture` returns statistics.

        Args:
          variables: the collection among them.
          *args: what else `model.apply` is called with, to trace it.
          **kwargs: its keywords.

        Raises:
          ValueError: there is no recipe or no collection, or it is another model's; some site was
            never reached, or held NaN or infinity.

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
        variables, held = parted(variables)
        if self.recipe is None or held is None:
            lack = "recipe" if self.recipe is None else f"{NAME!r} collection"
            raise ValueError(
                f"linen: there is no {lack}; expected variables updated by "
                f"quantized(model, recipe).apply(variables, ..., mutable=[{NAME!r}])"
            )
        fn, _ = arrays_only(self.model.apply)
        plan = plan_of(trace_call(fn, variables, args, kwargs), self.recipe, "linen")
        stats = statistics_of(plan, held)
        require_sound(stats)
        return stats


def quantized(model: nn.Module, recipe: RecipeLike | None = None) -> QuantizedModel:
    """The model with `init` and `apply` that compute as `jaxquant.quantized(model.apply)`.

    Variables may hold `QTensor`s; with a recipe, float variables that it matches are quantized as
    part of the computation, which is how to try a recipe without storing anything.

    Args:
      model: an unbound Linen module; it is not changed.
      recipe: for variables that come in float.

    Raises:
      ValueError: `model` is no Linen module, or `recipe` none.

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
    """Raises for what is no Linen module, naming what takes functions in its place."""
    owner = getattr(model, "__self__", None)
    if isinstance(owner, nn.Module):
        raise ValueError(
            f"{where}: expected the module itself, got its method {model.__name__}; functions, "
            f"such as model.apply, are for {for_functions}"
        )
    if not isinstance(model, nn.Module):
        kind = "a class; make an instance" if isinstance(model, type) else type(model).__name__
        raise ValueError(f"{where}: expected a Linen module, got {kind}")
