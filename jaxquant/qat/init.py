"""`init_quant_state`: learned steps from weights and from one example, ranges from that example."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxquant.capture.plan import observed_call, plan_of
from jaxquant.capture.statistics import Sites as Seen
from jaxquant.capture.statistics import Statistics
from jaxquant.interpret.calls import Call, trace_call
from jaxquant.observers.base import Axis, State, counted, counted_both, everywhere, no_updates
from jaxquant.params.plan import Plan
from jaxquant.params.quantize import check_finite
from jaxquant.qat.fake import observations, plans_of, require_float, require_trainable
from jaxquant.qat.leaves import learns_activations, observes, weight_estimator
from jaxquant.qat.state import Layout, QuantState, leaves_of, shapes_of
from jaxquant.qtensor import magnitude
from jaxquant.recipe import Recipe, RecipeLike, Rule, as_recipe
from jaxquant.report import shown
from jaxquant.ste import Moments


def init_quant_state(
    fn: Callable[..., Any],
    params: Any,
    recipe: RecipeLike,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    key: Array | None = None,
) -> QuantState:
    """The initial state for training `fn` by a recipe.

    `fn(params, *args)` runs once in float: learned steps of activations and observed ranges
    start from its activations. Learned steps of weights start from the weights.

    Args:
      fn: any traceable function whose first argument is a params pytree.
      params: its float parameters.
      recipe: the rules, as for `fake_quantized`.
      *args: one batch: the other arguments of `fn`.
      kwargs: its keyword arguments, such as `{"train": False}`.
      key: PRNG key for gradients that are rounded at random; by default `jax.random.key(0)`.

    Raises:
      ValueError: `recipe` is not a recipe, or training does not support it; a weight, or an
        activation of the example, is not finite; as `jaxquant.quantize_params`.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> rule = jq.Rule("**", weights=jq.int4(), weight_estimator=jq.ste.lsq())
    >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.full((4, 2), 7.0)}
    >>> state = jq.init_quant_state(fn, params, rule, jnp.ones((1, 4)))
    >>> state.learned["weights"]["w"]["step"].shape, int(state.step)
    ((2, 1), 0)
    """
    where = "init_quant_state"
    chosen = as_recipe(recipe, where, params)
    require_trainable(chosen, where)
    try:
        call = trace_call(fn, params, args, dict(kwargs or {}))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    require_float(call, where)
    return state_for(call, chosen, key, where)


def state_for(
    call: Call, chosen: Recipe, key: Array | None, where: str, *, part: bool = False
) -> QuantState:
    """A new state for a traced call, perhaps of a part of the model."""
    plans = plans_of(call, chosen)
    weights = {p: x for p, x in zip(call.paths, call.leaves, strict=True) if p is not None}
    check_finite([(p.path, weights[p.path]) for p in plans if p.spec is not None])

    learned: dict[str, Any] = {"weights": {}, "activations": {}}
    constants: dict[str, dict[str, Array]] = {}
    for plan in plans:
        if plan.spec is None:
            continue
        estimator = weight_estimator(plan)
        try:
            arrays = estimator.init(
                jnp.asarray(weights[plan.path]),
                plan.spec,
                storage_last_axes=plan.storage_last_axes,
                batch_axes=plan.batch_axes,
            )
        except ValueError as error:
            raise ValueError(f"{where}: {shown(plan.path)}: {error}") from error
        fixed = estimator.constants
        if any(name not in fixed for name in arrays):
            learned["weights"][plan.path] = {k: v for k, v in arrays.items() if k not in fixed}
        if any(name in fixed for name in arrays):
            constants[plan.path] = {k: v for k, v in arrays.items() if k in fixed}

    learned["activations"] = _activations(call, chosen, plans, where)
    observer_plan = observations(call, chosen, where, part=part)
    ranges: dict[str, Any] = {}
    sites: Seen = ()
    lead: tuple[tuple[str, tuple[int, ...]], ...] = ()
    if observer_plan is not None:
        stats = _observed(call, chosen, where, part=part)
        ranges = {name: entry.state for name, entry in stats.entries.items()}
        sites = stats.sites
        lead = tuple((name, entry.lead) for name, entry in stats.entries.items())
        for plan in plans:
            if observes(plan):
                keys = [site.key for site in plan.sites if site.primitive != "gather"]
                entries = [entry for key in keys for entry in stats.get(key, {}).values()]
                _require_layers(call, plan, {entry.lead for entry in entries}, where)
    layout = Layout(chosen, plans, leaves_of(call), sites, lead, shapes_of(learned))
    return QuantState(
        learned, constants, ranges, jnp.zeros((), jnp.int32), _words(key, where), layout
    )


def _observed(call: Call, recipe: Any, where: str, *, part: bool = False) -> Statistics:
    """The observers' statistics of one call; concrete unless the call is traced."""
    shapes = [x for x in call.leaves if isinstance(x, jax.ShapeDtypeStruct)]
    if shapes:
        raise ValueError(
            f"{where}: example: expected arrays, since activation ranges start from their values, "
            f"got {shapes[0]}"
        )
    plan = plan_of(call, recipe, where, part=part)
    start = plan.start()
    states = {name: entry.state for name, entry in start.entries.items()}
    states = jax.jit(lambda s, leaves, consts: observed_call(plan, s, leaves, consts)[1])(
        states, call.leaves, call.consts
    )
    for name, state in states.items():
        if not isinstance(state["bad"], jax.core.Tracer) and np.any(np.asarray(state["bad"])):
            raise ValueError(f"{where}: {name!r}: the example gives values that are not finite")
    entries = {
        name: dataclasses.replace(entry, state=states[name])
        for name, entry in start.entries.items()
    }
    return dataclasses.replace(start, entries=entries, batches=jnp.ones((), jnp.int32))


def _activations(
    call: Call, recipe: Recipe, plans: tuple[Plan, ...], where: str
) -> dict[str, dict[str, Array]]:
    """Initial learned steps of activations, from the moments of the example."""
    learners = {plan.path: plan for plan in plans if learns_activations(plan) is not None}
    if not learners:
        return {}
    rules = [
        dataclasses.replace(
            rule,
            observer=_Summing() if _learns(rule) else None,
            activation_estimator=None,
            attention=None,
        )
        for rule in recipe
        if rule.skip or rule.weights is not None or rule.lookup is not None
    ]
    stats = _observed(call, Recipe(rules), where, part=True)
    steps = {}
    for path, plan in learners.items():
        keys = [site.key for site in plan.sites if site.primitive != "gather"]
        states = [entry.state for key in keys for entry in stats.get(key, {}).values()]
        leads = {entry.lead for key in keys for entry in stats.get(key, {}).values()}
        _require_layers(call, plan, leads, where)
        total = states[0]
        for state in states[1:]:
            total = _Summing().merge(total, state)
        estimator = learns_activations(plan)
        assert estimator is not None and plan.rule is not None
        spec = plan.rule.activations
        assert spec is not None
        steps[path] = estimator.init_activation(moments(total), spec)
    return steps


def _require_layers(call: Call, plan: Plan, leads: set[tuple[int, ...]], where: str) -> None:
    """Raises unless activations were observed once for each layer of a leaf."""
    leaf = next(x for p, x in zip(call.paths, call.leaves, strict=True) if p == plan.path)
    layers = tuple(jnp.shape(leaf)[: plan.batch_axes])
    if leads != {layers}:
        got = " and ".join(str(list(lead)) for lead in sorted(leads)) or "none"
        raise ValueError(
            f"{where}: {shown(plan.path)}: expected activations for layers {list(layers)}, got "
            f"{got}; if a parameter is sliced or reshaped before a scan, ranges of its activations "
            "are found at run time: leave observer and activation_estimator out of its rule"
        )


def _words(key: Any, where: str) -> Array:
    """Key data, uint32 `[2]`, from a PRNG key of any implementation."""
    if key is None:
        return jnp.zeros(2, jnp.uint32)
    typed = hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = hasattr(key, "dtype") and key.dtype == jnp.uint32
    if not (typed and key.shape == ()) and not (raw and key.ndim == 1):
        raise ValueError(f"{where}: key: expected one PRNG key, as jax.random.key(0), got {key!r}")
    data = jax.random.key_data(key) if typed else key
    return data if data.shape == (2,) else jax.random.bits(key, (2,), jnp.uint32)


def _learns(rule: Rule) -> bool:
    return rule.activation_estimator is not None and bool(rule.activation_estimator.learns)


@dataclasses.dataclass(frozen=True, repr=False)
class _Summing(Axis):
    """The observer that accumulates moments: running means, the range and the count."""

    name: ClassVar[str] = "moments"

    def init(self, aval: Any) -> State:
        """See `Observer.init`."""
        zero = jnp.zeros((), jnp.float32)
        sums = dict.fromkeys(("mean_abs", "mean", "mean_square", "low", "high", "count"), zero)
        return {**sums, **no_updates()}

    def update(self, state: State, x: Array) -> State:
        """Updates the means over all values so far."""
        x = x.astype(jnp.float32)
        finite = jnp.isfinite(everywhere(jnp.max(magnitude(x), initial=0.0)))
        one = {
            "mean_abs": everywhere(jnp.mean(jnp.abs(x))),
            "mean": everywhere(jnp.mean(x)),
            "mean_square": everywhere(jnp.mean(x * x)),
            "low": everywhere(jnp.min(x)),
            "high": everywhere(jnp.max(x)),
            "count": jnp.float32(x.size),
            "updates": jnp.int32(1),
            "bad": jnp.int32(0),
        }
        new = self.merge(state, one)
        accepted = {k: jnp.where(finite, new[k], v) for k, v in state.items()}
        return {**accepted, **counted(state, finite)}

    def merge(self, a: State, b: State) -> State:
        """The means over both, weighted by their counts."""
        count = a["count"] + b["count"]
        share = b["count"] / jnp.maximum(count, 1.0)
        new = {k: a[k] + (b[k] - a[k]) * share for k in ("mean_abs", "mean", "mean_square")}
        new["low"] = jnp.minimum(a["low"], b["low"])
        new["high"] = jnp.maximum(a["high"], b["high"])
        return {**new, "count": count, **counted_both(a, b)}

    def finish(self, state: State, spec: Any) -> Any:
        """Unsupported: moments are not a range."""
        raise NotImplementedError


def moments(state: State) -> Moments:
    """The moments that estimators start from; see `jaxquant.ste.Moments`."""
    variance = jnp.maximum(state["mean_square"] - state["mean"] ** 2, 0.0)
    return Moments(
        state["mean_abs"], state["mean"], jnp.sqrt(variance), state["low"], state["high"]
    )
