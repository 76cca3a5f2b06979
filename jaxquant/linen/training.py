"""A Linen model in training: float params, and a `quant` collection beside them."""

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
    """A Linen model whose `apply` computes as it will be served; `fake_quantized` makes it.

    Its variables are the model's, float, and a `quant` collection of arrays: what estimators learn,
    what observers have seen, the step, and the key of random rounding. They are an ordinary Linen
    variables dict: to `jit`, to donate, for a checkpoint.

    Attributes:
      model: the model, as it was given.
      recipe: the rules.
      schedule: what changes in the course of training.
    """

    model: nn.Module
    recipe: Recipe
    schedule: Schedule | None = None

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Initializes variables as `model.init` does, and the `quant` collection.

        The key of random rounding is `rngs["quant"]`, if there is one, or follows from the others.

        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
        >>> variables = fake_quantized(nn.Dense(8), jq.w8a8()).init(
        ...     jax.random.key(0), jnp.ones((2, 32))
        ... )
        >>> sorted(variables), int(variables["quant"]["step"])
        (['params', 'quant'], 0)
        """
        return self._begun(self.model.init(rngs, *args, **kwargs), rngs, args, kwargs)

    def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """The float model's output beside what `init` gives."""
        y, variables = self.model.init_with_output(rngs, *args, **kwargs)
        return y, self._begun(variables, rngs, args, kwargs)

    def tabulate(self, rngs: Any, *args: Any, **kwargs: Any) -> str:
        """The summary of the float model that `model.tabulate` gives."""
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
        """Variables of a model, such as trained ones, with a new `quant` collection.

        Args:
          variables: float variables; a `quant` collection among them is replaced.
          *args: one batch, as `model.apply` takes it; see `jaxquant.init_quant_state`.
          kwargs: keywords of `model.apply`, such as `rngs`.
          key: PRNG key of random rounding; by default `jax.random.key(0)`.

        Raises:
          ValueError: as `jaxquant.init_quant_state`.

        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
        >>> rule = jq.Rule("**", weights=jq.int4(), weight_estimator=jq.ste.lsq())
        >>> model, x = nn.Dense(8), jnp.ones((2, 32))
        >>> variables = fake_quantized(model, rule).with_state(model.init(jax.random.key(0), x), x)
        >>> jax.tree.map(jnp.shape, variables["quant"]["learned"]["weights"])
        {'params/kernel': {'step': (8, 1)}}
        """
        plain = {name: held for name, held in variables.items() if name != NAME}
        fn, options = self._apply(kwargs or {})
        state = init_quant_state(fn, plain, self.recipe, *args, kwargs=options, key=key)
        return {**plain, NAME: collection(state)}

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Applies the model as it will be served, with all keywords that `model.apply` has.

        With `"quant"` among the collections that are `mutable`, what is returned of them holds the
        collection after the call: ranges with this call's activations, and the step counted. Else
        the collection is read only: a training step that leaves it out stands still in ranges,
        schedule and random numbers.

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
        plain, held = parted(variables, where)
        if held is None:
            require_none_needed(self.recipe, self.schedule, where)
        call = self._call(plain, args, kwargs, where)
        mutable = kwargs.get("mutable", False)
        kept = held is not None and mutable is not False and in_filter(mutable, NAME)
        if unconcerned(sites_of(call), self.recipe):  # a method that has nothing to quantize
            result = self.model.apply(plain, *args, **kwargs)
            return (result[0], {**result[1], NAME: held}) if kept else result
        fn, rebuild = arrays_only(self.model.apply)
        if held is None:
            return rebuild(fake_quantized_function(fn, self.recipe)(plain, *args, **kwargs))
        frozen = None
        if self.schedule is not None and self.schedule.freeze_batchnorm is not None:
            frozen = arrays_only(freeze_batchnorm(self.model.apply))[0]
        fake = fake_quantized_function(fn, self.recipe, schedule=self.schedule, frozen=frozen)
        state = state_of(held, self._like(call), where)
        arrays, state = fake(plain, *args, quant_state=state, **kwargs)
        result = rebuild(arrays)
        if not kept:
            return result
        out, updates = result
        return out, {**updates, NAME: {**collection(state), "made_for": held["made_for"]}}

    def state(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> QuantState:
        """The `quant` collection of variables as the `QuantState` that functions take.

        Args:
          variables: the collection among them.
          *args: what else `model.apply` is called with, to trace it; shapes are enough.
          **kwargs: its keywords.

        Raises:
          ValueError: there is no collection, or it was made for another model or recipe.

        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
        >>> fmodel, x = fake_quantized(nn.Dense(8), jq.w8a8()), jnp.ones((2, 32))
        >>> state = fmodel.state(fmodel.init(jax.random.key(0), x), x)
        >>> isinstance(state, jq.qat.QuantState), int(state.step)
        (True, 0)
        """
        where = "linen.fake_quantized: state"
        plain, held = parted(variables, where)
        if held is None:
            raise ValueError(f"{where}: the variables have no {NAME!r} collection; {ASK}")
        return state_of(held, self._like(self._call(plain, args, kwargs, where)), where)

    def _begun(self, variables: Any, rngs: Any, args: Any, kwargs: Any) -> dict[str, Any]:
        if NAME in variables:
            raise ValueError(
                f"linen.fake_quantized: init: the model has a {NAME!r} collection of its own; "
                "expected that name to be free"
            )
        given = dict(rngs) if isinstance(rngs, Mapping) else {"params": rngs}
        key = given.get(NAME)
        if key is None:
            first = given["params"] if "params" in given else next(iter(given.values()))
            key = jax.random.fold_in(first, zlib.crc32(NAME.encode()))
        return self.with_state(variables, *args, kwargs={"rngs": given, **kwargs}, key=key)

    def _apply(self, kwargs: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
        """The model's arrays, and keywords; what a call in training mode updates is unseen here."""
        own = {k: v for k, v in kwargs.items() if k not in ("mutable", "capture_intermediates")}
        return arrays_only(self.model.apply)[0], {**own, "mutable": DenyList("params")}

    def _call(self, plain: Any, args: Any, kwargs: Any, where: str) -> Call:
        fn, options = self._apply(kwargs)
        call = trace_call(fn, plain, args, options)
        require_float(call, where)
        return call

    def _like(self, call: Call) -> QuantState:
        """Shapes and layout of a state for a call, perhaps of a part of the model."""

        def start(leaves: list[Any]) -> QuantState:
            own = dataclasses.replace(call, leaves=leaves)
            return state_for(own, self.recipe, None, "linen.fake_quantized", part=True)

        return jax.eval_shape(start, call.leaves)


def fake_quantized(
    model: nn.Module,
    recipe: RecipeLike,
    *,
    schedule: Schedule | None = None,
) -> FakeQuantizedModel:
    """The model in training with quantization, with `init` and `apply` as a Linen module has them.

    `apply` computes as `jaxquant.fake_quantized(model.apply, recipe)`, its state in a collection.
    An optimizer trains `variables["params"]` and `variables["quant"]["learned"]`: `trainable`
    takes them out, `updated` puts them back. A schedule that freezes BatchNorm does so for every
    `nn.BatchNorm` in the model, see `freeze_batchnorm`.

    Args:
      model: an unbound Linen module; it is not changed.
      recipe: the rules; key paths begin with the collection, as in `params/Dense_0/kernel`.
      schedule: what changes in the course of training.

    Raises:
      ValueError: `model` is no Linen module, `recipe` or `schedule` is none, or they do not go
        together.

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
    """Variables as they are served: `QTensor`s in place of params, and no `quant` collection.

    They are for `jaxquant.linen.quantized(model).apply` or `jaxquant.quantized(model.apply)`,
    which then give what `fmodel.apply` gave. See `jaxquant.convert`.

    Args:
      fmodel: the model in training, as of `fake_quantized`.
      variables: what was trained.
      *args: what else `model.apply` is called with, to trace it; shapes are enough.
      kwargs: its keywords, as the model is served.

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
    plain, held = parted(variables, where)
    like = fmodel._like(fmodel._call(plain, args, kwargs or {}, where))
    if held is None:
        require_none_needed(fmodel.recipe, fmodel.schedule, where)
        state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
    else:
        state = state_of(held, like, where)
    return convert_params(plain, state, fmodel.recipe, schedule=fmodel.schedule)
