"""A Linen model in training: float params and a `quant` collection."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import DenyList
from flax.core.scope import in_filter
from jax import Array

from jaxquant.interpret.calls import Call, trace_call
from jaxquant.interpret.record import sites_of
from jaxquant.linen.batchnorm import freeze_batchnorm
from jaxquant.linen.collection import NAME
from jaxquant.linen.model import require_module
from jaxquant.linen.pure import arrays_only, unconcerned
from jaxquant.linen.state import ASK, collection, parted, require_none_needed, state_of
from jaxquant.qat import QuantState, Schedule, init_quant_state
from jaxquant.qat import convert as convert_params
from jaxquant.qat import fake_quantized as fake_quantized_function
from jaxquant.qat.fake import require_float
from jaxquant.qat.init import state_for
from jaxquant.recipe import Recipe, RecipeLike, as_recipe


@dataclasses.dataclass(frozen=True)
class FakeQuantizedModel:
    """A Linen model whose `apply` computes as at inference; `fake_quantized` makes it.

    Its variables are the float model's plus a `quant` collection of arrays: learned values of
    estimators, states of observers, the step, and the key of stochastic rounding. They are an
    ordinary Linen variables dict, for `jit`, donation and checkpoints.

    Attributes:
      model: the wrapped model, unchanged.
      recipe: the rules.
      schedule: changes in the course of training.
    """

    model: nn.Module
    recipe: Recipe
    schedule: Schedule | None = None

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Initializes variables as `model.init` does, and the `quant` collection.

        The key of stochastic rounding is `rngs["quant"]` if present, else derived from the others.

        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
        >>> variables = fake_quantized(nn.Dense(8), jq.w8a8()).init(
        ...     jax.random.key(0), jnp.ones((2, 32))
        ... )
        >>> sorted(variables), int(variables["quant"]["step"])
        (['params', 'quant'], 0)
        """
        return self._begun(self.model.init(rngs, *args, **kwargs), rngs, args, kwargs)

    def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the float model's output and the variables that `init` returns."""
        y, variables = self.model.init_with_output(rngs, *args, **kwargs)
        return y, self._begun(variables, rngs, args, kwargs)

    def tabulate(self, rngs: Any, *args: Any, **kwargs: Any) -> str:
        """Returns `model.tabulate`, the summary of the float model."""
        return self.model.tabulate(rngs, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"FakeQuantizedModel has no {name!r}; ask its model, as in fmodel.model"
        )

    def with_state(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        kwargs: Mapping[str, Any] | None = None,
        key: Array | None = None,
    ) -> dict[str, Any]:
        """Adds a new `quant` collection to variables of a model, such as trained ones.

        Args:
          variables: float variables; an existing `quant` collection is replaced.
          *args: one batch, as `model.apply` takes it; see `jaxquant.init_quant_state`.
          kwargs: keyword arguments of `model.apply`, such as `rngs`.
          key: PRNG key of stochastic rounding; by default `jax.random.key(0)`.

        Raises:
          ValueError: as `jaxquant.init_quant_state`.

        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
        >>> rule = jq.Rule("**", weights=jq.int4(), weight_estimator=jq.ste.lsq())
        >>> model, x = nn.Dense(8), jnp.ones((2, 32))
        >>> variables = fake_quantized(model, rule).with_state(model.init(jax.random.key(0), x), x)
        >>> jax.tree.map(jnp.shape, variables["quant"]["learned"]["weights"])
        {'params/kernel': {'step': (8, 1)}}
        """
        plain = {name: values for name, values in variables.items() if name != NAME}
        fn, options = self._apply(kwargs or {})
        state = init_quant_state(fn, plain, self.recipe, *args, kwargs=options, key=key)
        return {**plain, NAME: collection(state)}

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Applies the model as at inference, with all keywords that `model.apply` has.

        If `mutable` includes `"quant"`, the updated collection is among the returned ones: ranges
        include this call's activations, and the step is incremented. Otherwise the collection is
        only read: ranges, schedule and random numbers do not advance.

        Raises:
          ValueError: there is no `quant` collection and the recipe or the schedule needs one; it
            was made for another model or recipe; as `jaxquant.fake_quantized`.

        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
        >>> fmodel, x = fake_quantized(nn.Dense(8), jq.w8a8()), jnp.ones((2, 32))
        >>> variables = fmodel.init(jax.random.key(0), x)
        >>> y, updates = fmodel.apply(variables, x, mutable=["quant"])
        >>> y.shape, int(updates["quant"]["step"])
        ((2, 8), 1)
        """
        where = "linen.fake_quantized: apply"
        plain, quant = parted(variables, where)
        if quant is None:
            require_none_needed(self.recipe, self.schedule, where)
        call = self._call(plain, args, kwargs, where)
        mutable = kwargs.get("mutable", False)
        updates_quant = quant is not None and mutable is not False and in_filter(mutable, NAME)
        if unconcerned(sites_of(call), self.recipe):  # a method that has nothing to quantize
            result = self.model.apply(plain, *args, **kwargs)
            return (result[0], {**result[1], NAME: quant}) if updates_quant else result
        fn, rebuild = arrays_only(self.model.apply)
        if quant is None:
            return rebuild(fake_quantized_function(fn, self.recipe)(plain, *args, **kwargs))
        frozen = None
        if self.schedule is not None and self.schedule.freeze_batchnorm is not None:
            frozen = arrays_only(freeze_batchnorm(self.model.apply))[0]
        fake = fake_quantized_function(fn, self.recipe, schedule=self.schedule, frozen=frozen)
        state = state_of(quant, self._like(call), where)
        arrays, state = fake(plain, *args, quant_state=state, **kwargs)
        result = rebuild(arrays)
        if not updates_quant:
            return result
        out, updates = result
        return out, {**updates, NAME: {**collection(state), "made_for": quant["made_for"]}}

    def state(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> QuantState:
        """Converts the `quant` collection of variables to a `QuantState`, as functions take it.

        Args:
          variables: variables with the collection.
          *args: the other arguments of `model.apply`, to trace it; shapes are enough.
          **kwargs: its keyword arguments.

        Raises:
          ValueError: there is no collection, or it was made for another model or recipe.

        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
        >>> fmodel, x = fake_quantized(nn.Dense(8), jq.w8a8()), jnp.ones((2, 32))
        >>> state = fmodel.state(fmodel.init(jax.random.key(0), x), x)
        >>> isinstance(state, jq.qat.QuantState), int(state.step)
        (True, 0)
        """
        where = "linen.fake_quantized: state"
        plain, quant = parted(variables, where)
        if quant is None:
            raise ValueError(f"{where}: the variables have no {NAME!r} collection; {ASK}")
        return state_of(quant, self._like(self._call(plain, args, kwargs, where)), where)

    def _begun(self, variables: Any, rngs: Any, args: Any, kwargs: Any) -> dict[str, Any]:
        if NAME in variables:
            raise ValueError(
                f"linen.fake_quantized: init: the model already has a {NAME!r} collection; "
                "expected that name to be free"
            )
        keys = dict(rngs) if isinstance(rngs, Mapping) else {"params": rngs}
        key = keys.get(NAME)
        if key is None:
            first = keys["params"] if "params" in keys else next(iter(keys.values()))
            key = jax.random.fold_in(first, zlib.crc32(NAME.encode()))
        return self.with_state(variables, *args, kwargs={"rngs": keys, **kwargs}, key=key)

    def _apply(self, kwargs: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
        """Returns `model.apply` for arrays, and keywords that make all but `params` mutable."""
        others = {k: v for k, v in kwargs.items() if k not in ("mutable", "capture_intermediates")}
        return arrays_only(self.model.apply)[0], {**others, "mutable": DenyList("params")}

    def _call(self, plain: Any, args: Any, kwargs: Any, where: str) -> Call:
        fn, options = self._apply(kwargs)
        call = trace_call(fn, plain, args, options)
        require_float(call, where)
        return call

    def _like(self, call: Call) -> QuantState:
        """Returns shapes and layout of a state for a call, perhaps of a part of the model."""

        def start(leaves: list[Any]) -> QuantState:
            new_call = dataclasses.replace(call, leaves=leaves)
            return state_for(new_call, self.recipe, None, "linen.fake_quantized", part=True)

        return jax.eval_shape(start, call.leaves)


def fake_quantized(
    model: nn.Module,
    recipe: RecipeLike,
    *,
    schedule: Schedule | None = None,
) -> FakeQuantizedModel:
    """Wraps a model for quantization-aware training, with `init` and `apply` like a Linen module's.

    `apply` computes as `jaxquant.fake_quantized(model.apply, recipe)`, with its state in a
    collection. An optimizer trains `variables["params"]` and `variables["quant"]["learned"]`:
    `trainable` extracts them, `updated` puts them back. A schedule that freezes BatchNorm does so
    for every `nn.BatchNorm` in the model, see `freeze_batchnorm`.

    Args:
      model: an unbound Linen module; it is not changed.
      recipe: the rules; key paths begin with the collection, as in `params/Dense_0/kernel`.
      schedule: changes in the course of training.

    Raises:
      ValueError: `model` is not a Linen module, `recipe` or `schedule` has the wrong type, or they
        cannot be combined.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq, optax
    >>> lsq = jq.ste.lsq()
    >>> rule = jq.Rule(
    ...     "**",
    ...     weights=jq.int4(),
    ...     activations=jq.int8(granularity=jq.PerTensor()),
    ...     weight_estimator=lsq,
    ...     activation_estimator=lsq,
    ... )
    >>> model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(2)])
    >>> fmodel, optimizer = jq.linen.fake_quantized(model, rule), optax.adam(0.01)
    >>> x = jax.random.normal(jax.random.key(1), (32, 8))
    >>> variables = fmodel.init(jax.random.key(0), x)
    >>> moments = optimizer.init(jq.linen.trainable(variables))
    >>> @jax.jit
    ... def step(variables, moments, x, y):
    ...     def loss(trained):
    ...         now = jq.linen.updated(variables, trained)
    ...         out, updates = fmodel.apply(now, x, mutable=["quant"])
    ...         return ((out - y) ** 2).mean(), updates
    ...
    ...     trained = jq.linen.trainable(variables)
    ...     (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(trained)
    ...     changes, moments = optimizer.update(grads, moments, trained)
    ...     trained = optax.apply_updates(trained, changes)
    ...     return jq.linen.updated(variables, updates, trained), moments, value
    >>> losses = []
    >>> for _ in range(20):
    ...     variables, moments, value = step(variables, moments, x, x[:, :2])
    ...     losses.append(float(value))
    >>> losses[-1] < 0.5 * losses[0], int(variables["quant"]["step"])
    (True, 20)
    >>> qvariables = jq.linen.convert(fmodel, variables, x)
    >>> jax.jit(jq.linen.quantized(model).apply)(qvariables, x).shape
    (32, 2)
    """
    where = "linen.fake_quantized"
    require_module(model, where, "jaxquant.fake_quantized")
    chosen = as_recipe(recipe, where)
    # for its checks alone
    fake_quantized_function(model.apply, chosen, schedule=schedule, frozen=model.apply)
    return FakeQuantizedModel(model, chosen, schedule)


def convert(
    fmodel: FakeQuantizedModel,
    variables: Mapping[str, Any],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Converts trained variables for inference: params to `QTensor`s, no `quant` collection.

    `jaxquant.linen.quantized(model).apply` and `jaxquant.quantized(model.apply)` compute with them
    the result of `fmodel.apply`. See `jaxquant.convert`.

    Args:
      fmodel: the model in training, from `fake_quantized`.
      variables: the trained variables.
      *args: the other arguments of `model.apply`, to trace it; shapes are enough.
      kwargs: its keyword arguments at inference.

    Raises:
      ValueError: as `FakeQuantizedModel.state` and `jaxquant.convert`.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
    >>> model, x = nn.Dense(8), jnp.ones((2, 32))
    >>> fmodel = jq.linen.fake_quantized(model, jq.w8a8())
    >>> variables = fmodel.init(jax.random.key(0), x)
    >>> qvariables = jq.linen.convert(fmodel, variables, x)
    >>> y = jax.jit(jq.linen.quantized(model).apply)(qvariables, x)
    >>> bool((y == jax.jit(fmodel.apply)(variables, x)).all())
    True
    """
    if not isinstance(fmodel, FakeQuantizedModel):
        raise ValueError(
            "linen.convert: expected a model that jaxquant.linen.fake_quantized made, "
            f"got {type(fmodel).__name__}"
        )
    where = "linen.convert"
    plain, quant = parted(variables, where)
    like = fmodel._like(fmodel._call(plain, args, kwargs or {}, where))
    if quant is None:
        require_none_needed(fmodel.recipe, fmodel.schedule, where)
        state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
    else:
        state = state_of(quant, like, where)
    return convert_params(plain, state, fmodel.recipe, schedule=fmodel.schedule)
