"""A Linen model whose `apply` computes with quantized variables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax

from jaxquant.interpret.calls import trace_call
from jaxquant.interpret.serve import serve
from jaxquant.linen.pure import arrays_only, as_given, prepared
from jaxquant.ptq import ptq
from jaxquant.qtensor import is_qtensor
from jaxquant.recipe import Recipe, Rule, as_recipe
from jaxquant.report import Report


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

        Raises:
          ValueError: nothing is quantized, or what `jaxquant.quantize_params` refuses.

        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
        >>> x, qmodel = jnp.ones((2, 32)), quantized(nn.Dense(8), jq.w8a8())
        >>> y, seen = qmodel.apply(qmodel.init(jax.random.key(0), x), x, capture_intermediates=True)
        >>> jax.tree.map(jnp.shape, seen)
        {'intermediates': {'__call__': ((2, 8),)}}
        """
        fn, rebuild = arrays_only(self.model.apply)
        call = prepared(trace_call(fn, variables, args, kwargs), variables, self.recipe)
        if call is None:
            return self.model.apply(variables, *args, **kwargs)
        result = rebuild(serve(call, self.recipe)[0])
        if kwargs.get("mutable", False) is False and not kwargs.get("capture_intermediates"):
            return result
        out, mutated = result
        given = dict(jax.tree.leaves_with_path(variables, is_leaf=is_qtensor))
        return out, jax.tree.map_with_path(
            lambda path, new: as_given(new, given.get(path)), mutated, is_leaf=is_qtensor
        )

    def ptq(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, Report]:
        """Quantizes variables by the recipe: `jaxquant.ptq(model.apply, variables, recipe, ...)`.

        Args:
          variables: float variables; collections that no contraction uses stay as they are.
          *args: what else `model.apply` is called with.
          **kwargs: its keywords, and those of `jaxquant.ptq`.

        Raises:
          ValueError: there is no recipe, or as `jaxquant.ptq`.

        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
        >>> x, qmodel = jnp.ones((2, 32)), quantized(nn.Dense(8), jq.w4a16(group=16))
        >>> qvariables, _ = qmodel.ptq(qmodel.init(jax.random.key(0), x), x)
        >>> qvariables["params"]["kernel"].bits_per_weight
        6.0
        """
        if self.recipe is None:
            raise ValueError("ptq: this model has no recipe; expected quantized(model, recipe)")
        return ptq(self.model.apply, variables, self.recipe, *args, **kwargs)


def quantized(
    model: nn.Module, recipe: Recipe | Rule | Iterable[Rule] | None = None
) -> QuantizedModel:
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
    >>> qvariables, report = qmodel.ptq(model.init(jax.random.key(0), x), x)
    >>> jax.jit(qmodel.apply)(qvariables, x).shape, report["params/kernel"].bits_per_weight
    ((2, 8), 9.0)
    """
    where = "linen.quantized"
    owner = getattr(model, "__self__", None)
    if isinstance(owner, nn.Module):
        raise ValueError(
            f"{where}: expected the module itself, got its method {model.__name__}; functions, "
            "such as model.apply, are for jaxquant.quantized"
        )
    if not isinstance(model, nn.Module):
        kind = "a class; make an instance" if isinstance(model, type) else type(model).__name__
        raise ValueError(f"{where}: expected a Linen module, got {kind}")
    return QuantizedModel(model, None if recipe is None else as_recipe(recipe, where))
