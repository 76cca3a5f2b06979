"""An NNX model in training: `fake_quantized` makes it, `convert` quantizes it for inference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax import Array

from jaxquant.encoders import measure
from jaxquant.interpret.sites import path_str
from jaxquant.nnx.model import Pure, Quantized, Within, Wrapped, run_method, variables
from jaxquant.nnx.parts import arrays_of, parts_of
from jaxquant.nnx.state import QuantVariables
from jaxquant.params.plan import Plan, identity
from jaxquant.params.quantize import leaf_report, ratios
from jaxquant.qat import QuantState, Schedule, init_quant_state
from jaxquant.qat import convert as convert_params
from jaxquant.qat import fake_quantized as fake_quantized_function
from jaxquant.qtensor import is_qtensor
from jaxquant.recipe import Recipe, RecipeLike, as_recipe
from jaxquant.report import Report


class FakeQuantized(Wrapped):
    """An NNX model whose methods compute as at inference; `fake_quantized` makes it.

    It has the methods of the model's class, each transformed as `jaxquant.fake_quantized`
    transforms a function. The model is an ordinary submodule with float parameters, and learned
    values of estimators are parameters too: `nnx.Optimizer(fmodel, tx, wrt=nnx.Param)` trains both.
    Method calls update batch statistics, caches and random states, and `quant` unless
    `fmodel.eval()` was called; a method's assignments to parameters are discarded.

    Attributes:
      model: the wrapped model.
      quant: the `QuantState` as variables.
      schedule: changes in the course of training.
    """

    def __init__(
        self, model: nnx.Module, state: QuantState, schedule: Schedule | None = None
    ) -> None:
        super().__init__(model)
        self.quant = QuantVariables(state)
        self.schedule = schedule

    def _compute(self, name: str, args: Any, kwargs: Any) -> Any:
        schedule, recipe = self.schedule, self.quant.layout.recipe
        freezes = schedule is not None and schedule.freeze_batchnorm is not None
        all_variables = enumerate(variables(self.model))
        fixed = [(i, v, v.get_raw_value()) for i, v in all_variables if isinstance(v, nnx.Param)]

        def trained(pure: Callable[[Within], Pure], params: Any, inputs: Any) -> Any:
            fn = pure(contextlib.nullcontext)
            frozen = pure(_running_averages) if freezes else None
            fake = fake_quantized_function(fn, recipe, schedule=schedule, frozen=frozen)
            result, state = fake(params, *inputs, quant_state=self.quant.state())
            self.quant.moved_on(state)
            return result

        return run_method(self.model, name, args, kwargs, fixed, trained, always=freezes)


@contextlib.contextmanager
def _running_averages(model: nnx.Module) -> Iterator[None]:
    """Sets every BatchNorm to running statistics, and restores the graph afterwards."""
    norms = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.BatchNorm)]
    before = [norm.use_running_average for norm in norms]
    for norm in norms:
        norm.use_running_average = True
    try:
        yield
    finally:
        for norm, value in zip(norms, before, strict=True):
            norm.use_running_average = value


def fake_quantized(
    model: nnx.Module,
    recipe: RecipeLike,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    method: str = "__call__",
    key: Array | None = None,
    schedule: Schedule | None = None,
) -> FakeQuantized:
    """Copies an NNX model for quantization-aware training by a recipe.

    As `jaxquant.init_quant_state` and `jaxquant.fake_quantized`: the method is run once in float on
    the example, which initializes learned steps of activations and observed ranges. Parameters are
    the `nnx.Param`s, with key paths as in `ptq`; the model itself is not changed.

    From step `schedule.freeze_batchnorm` on every `nnx.BatchNorm` uses its running statistics,
    unless it is called with `use_running_average=False`.

    Args:
      model: the float model.
      recipe: the rules; a rule whose parameters the method does not use has no effect.
      *args: one batch, arguments of the method.
      kwargs: its keyword arguments.
      method: name of the method to run.
      key: PRNG key for stochastic rounding of gradients; by default `jax.random.key(0)`.
      schedule: changes in the course of training.

    Raises:
      ValueError: there is no example; `recipe` or `schedule` has the wrong type, or they cannot be
        combined; `model` is not an NNX module or already wrapped, lacks the method or has variables
        that are references; as `jaxquant.init_quant_state`.

    >>> import jax.numpy as jnp, jaxquant.nnx, jaxquant as jq, optax
    >>> from flax import nnx
    >>> rule = jq.Rule("**/kernel", weights=jq.int4(), weight_estimator=jq.ste.lsq())
    >>> rngs, x = nnx.Rngs(0), jax.random.normal(jax.random.key(1), (32, 8))
    >>> model = nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), nnx.relu, nnx.Linear(16, 2, rngs=rngs))
    >>> fmodel = jq.nnx.fake_quantized(model, rule, x)
    >>> optimizer = nnx.Optimizer(fmodel, optax.adam(0.01), wrt=nnx.Param)
    >>> @nnx.jit
    ... def step(fmodel, optimizer, x, y):
    ...     loss = lambda fmodel: ((fmodel(x) - y) ** 2).mean()
    ...     value, grads = nnx.value_and_grad(loss)(fmodel)
    ...     optimizer.update(fmodel, grads)
    ...     return value
    >>> losses = [float(step(fmodel, optimizer, x, x[:, :2])) for _ in range(20)]
    >>> losses[-1] < 0.5 * losses[0], int(fmodel.quant.step[...])
    (True, 20)
    """
    where = "nnx.fake_quantized"
    chosen = as_recipe(recipe, where, model)
    if isinstance(model, Wrapped):
        raise ValueError(f"{where}: expected a float model, got a {type(model).__name__}")
    graphdef, params, moving, rest = parts_of(model, method, where)
    if not args and not kwargs:
        raise ValueError(f"{where}: expected an example to run {method!r} with, got none")

    def call(params: Any, moving: Any, /, *args: Any, **kwargs: Any) -> Any:
        copy = nnx.merge(graphdef, params, *moving, *rest, copy=True)
        return arrays_of(getattr(copy, method)(*args, **kwargs))[0]

    fake_quantized_function(call, chosen, schedule=schedule, frozen=call)  # for its checks alone
    state = init_quant_state(call, params, chosen, moving, *args, kwargs=kwargs, key=key)
    copy = nnx.merge(graphdef, params, *moving, *rest, copy=True)
    return FakeQuantized(copy, state, schedule)


def convert(fmodel: FakeQuantized) -> tuple[Quantized, Report]:
    """Converts a trained model for inference: parameters become `QTensor`s.

    As `jaxquant.convert`: the result equals that of `fmodel` in evaluation mode.

    Returns:
      The quantized model, as from `ptq`, and a report on every parameter; `fmodel` is not changed.

    Raises:
      ValueError: `fmodel` is not a `FakeQuantized`; a parameter or learned value is not finite.

    >>> import jax, jax.numpy as jnp, jaxquant.nnx, jaxquant as jq
    >>> from flax import nnx
    >>> model, x = nnx.Linear(64, 32, rngs=nnx.Rngs(0)), jnp.linspace(-1, 1, 64)[None]
    >>> fmodel = jq.nnx.fake_quantized(model, jq.w8a8(), x)
    >>> fmodel.eval()
    >>> qmodel, report = jq.nnx.convert(fmodel)
    >>> report["kernel"].action, bool((nnx.jit(qmodel)(x) == nnx.jit(fmodel)(x)).all())
    ('int8 per channel, activations int8', True)
    """
    if not isinstance(fmodel, FakeQuantized):
        raise ValueError(
            "nnx.convert: expected a model that jaxquant.nnx.fake_quantized made, "
            f"got {type(fmodel).__name__}"
        )
    state = fmodel.quant.state()
    split: Any = nnx.split(fmodel.model, nnx.Param, ...)
    graphdef, params, rest = split
    qparams = convert_params(params, state, state.layout.recipe, schedule=fmodel.schedule)
    report = _report(state.layout.plans, params, qparams, state.layout.recipe)
    return Quantized(nnx.merge(graphdef, qparams, rest, copy=True)), report


def _report(plans: Sequence[Plan], params: Any, qparams: Any, recipe: Recipe) -> Report:
    before = dict(_leaves(params))
    after = dict(_leaves(qparams))
    infos = [
        measure(before[plan.path], after[plan.path]) if is_qtensor(after[plan.path]) else None
        for plan in plans
    ]
    seen: dict[Any, str] = {}
    leaves = []
    for plan, ratio in zip(plans, ratios(infos), strict=True):
        w, q = before[plan.path], after[plan.path]
        array = id(q.codes) if is_qtensor(q) else identity(plan.path, w)
        leaves.append(leaf_report(plan, w, q, seen.get(array), ratio))
        seen.setdefault(array, plan.path)
    return Report(tuple(leaves), recipe.title)


def _leaves(params: Any) -> list[tuple[str, Any]]:
    flat = jax.tree.leaves_with_path(params, is_leaf=is_qtensor)
    return [(path_str(path), leaf) for path, leaf in flat]
