"""`fake_quantized`: a function for training, with float params and contractions on codes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.capture.plan import Plan as Observations
from jaxquant.capture.plan import plan_of
from jaxquant.encoders import rtn
from jaxquant.interpret.calls import Call, trace_call
from jaxquant.interpret.evaluate import Interpreter
from jaxquant.interpret.observe import Observe, statistics_slot
from jaxquant.interpret.policy import Policy
from jaxquant.interpret.record import sites_of
from jaxquant.interpret.slots import SiteValues
from jaxquant.interpret.train import InFloat, Train
from jaxquant.params.plan import Plan, make_plans
from jaxquant.qat.leaves import key_of, learns_activations, observes, trained, weight_estimator
from jaxquant.qat.schedule import Phase, Schedule
from jaxquant.qat.state import QuantState, leaves_of, require_same
from jaxquant.qtensor import is_qtensor
from jaxquant.recipe import Recipe, RecipeLike, as_recipe
from jaxquant.report import shown


def fake_quantized(
    fn: Callable[..., Any],
    recipe: RecipeLike,
    *,
    schedule: Schedule | None = None,
    frozen: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Makes `fn` compute with float params as it will be served quantized.

    Params and activations are rounded by the recipe's rules, and contractions run on their codes:
    the same contractions, on the same codes and scales of weights, as in `quantized(fn)` with the
    params that `convert` makes. Float operations between them are the same, too, but XLA may round
    them differently in another program. Gradients pass each rounding straight through, or by the
    rules' estimators, to the float params. Works under `jit`, `grad`, `vmap` and in any loop.

    The signature is that of `fn`, with one more keyword, `quant_state`: the result of
    `init_quant_state`, for rules with observers, estimators that learn, or gradients rounded at
    random. With it, the result is `(result of fn, next state)`. The call uses the ranges of the
    state passed in; the ranges of the next state include the activations of this call.

    Args:
      fn: any traceable function; its first argument is the float params.
      recipe: the rules.
      schedule: changes in the course of training.
      frozen: `fn` with BatchNorm on running statistics, used from `schedule.freeze_batchnorm` on;
        its result has the structure of that of `fn`.

    Raises:
      ValueError: at the call: a rule needs a state and there is none, or the state was made for
        another recipe or other params; as `jaxquant.quantize_params`. At once: `recipe` or
        `schedule` has the wrong type, or they do not fit each other.

    >>> import jax, jax.numpy as jnp, jaxquant as jq
    >>> fn = lambda p, x: x @ p["w"]
    >>> fake = jq.fake_quantized(fn, jq.w8a8())
    >>> params, x = {"w": jnp.eye(4)}, jnp.arange(4.0)[None]
    >>> grads = jax.jit(jax.grad(lambda p: fake(p, x).sum()))(params)
    >>> grads["w"][:, 0].round(1)
    Array([0., 1., 2., 3.], dtype=float32)
    """
    where = "fake_quantized"
    chosen = as_recipe(recipe, where)
    if not callable(fn):
        raise ValueError(f"{where}: expected a function of params first, got {type(fn).__name__}")
    phases = _phases(chosen, schedule, frozen, where)

    @functools.wraps(fn)
    def wrapped(params: Any, /, *args: Any, quant_state: Any = None, **kwargs: Any) -> Any:
        call = trace_call(fn, params, args, kwargs)
        require_float(call, where)
        if quant_state is None:
            if schedule is not None:
                raise ValueError(f"{where}: a schedule counts steps; {_ASK}")
            plans = plans_of(call, chosen)
            _require_stateless(plans, where)
            return _run(call, plans, phases[0], None, None)[0]
        require_same(quant_state, chosen, leaves_of(call), where)
        last = call
        if any(phase.frozen for phase in phases):
            assert frozen is not None
            last = trace_call(frozen, params, args, kwargs)
            _require_alike(call, last, where)
        return _step(call, last, phases, schedule, quant_state)

    return wrapped


_ASK = (
    "make a state with jaxquant.init_quant_state(fn, params, recipe, *args) and pass it as "
    "quant_state="
)


def _phases(
    recipe: Recipe, schedule: Schedule | None, frozen: Any, where: str
) -> tuple[Phase, ...]:
    if schedule is None:
        schedule = Schedule()
    if not isinstance(schedule, Schedule):
        raise ValueError(f"{where}: schedule: expected a jq.Schedule, got {schedule!r}")
    if schedule.freeze_batchnorm is not None and frozen is None:
        raise ValueError(
            f"{where}: the schedule freezes BatchNorm at step {schedule.freeze_batchnorm}; pass "
            "frozen=, the function with BatchNorm on running statistics"
        )
    require_trainable(recipe, where)
    return schedule.phases(recipe)


def require_trainable(recipe: Recipe, where: str) -> None:
    """Raises for rules that training does not support."""
    for rule in recipe:
        if rule.requantize is not None:
            raise ValueError(
                f"{where}: {rule!r}: integer results have no gradient; train without requantize"
            )
        if rule.encoder is not None and rule.encoder != rtn():
            raise ValueError(
                f"{where}: {rule!r}: {rule.encoder!r} encodes after training; in training weights "
                "are rounded to nearest: leave the encoder out"
            )
        if rule.observer is None:
            continue
        if rule.attention is not None and rule.activations is None:
            raise ValueError(
                f"{where}: {rule!r}: attention is trained with ranges found at run time; leave "
                "the observer out"
            )
        if not hasattr(rule.observer, "range"):
            raise ValueError(
                f"{where}: {rule!r}: {rule.observer!r} cannot follow activations under jit; use "
                "jq.observers.moving_average(), minmax() or absmax()"
            )
        if rule.observer.axis is not None:
            raise ValueError(
                f"{where}: {rule!r}: a scale for each channel of an activation is not trained; "
                "use an observer with axis=None and granularity=PerTensor()"
            )


def require_float(call: Call, where: str) -> None:
    """Raises if a parameter is already quantized."""
    for leaf, path in zip(call.leaves, call.paths, strict=True):
        if path is not None and is_qtensor(leaf):
            raise ValueError(
                f"{where}: {shown(path)}: expected float params, got {leaf!r}; "
                "train float params, then quantize them with jaxquant.convert"
            )


def plans_of(call: Call, recipe: Recipe) -> tuple[Plan, ...]:
    """The plan for each params leaf of a traced call."""
    leaves = [(p, x) for p, x in zip(call.paths, call.leaves, strict=True) if p is not None]
    return tuple(make_plans(leaves, recipe, sites_of(call))[0])


def _require_stateless(plans: Sequence[Plan], where: str) -> None:
    for plan in plans:
        reasons = []
        if plan.spec is not None and weight_estimator(plan).learns:
            reasons.append(f"{weight_estimator(plan)!r} learns")
        if learns_activations(plan) is not None:
            reasons.append(f"{learns_activations(plan)!r} learns")
        if observes(plan):
            reasons.append("its rule has an observer")
        gradients = None if plan.spec is None or plan.rule is None else plan.rule.gradients
        if gradients is not None and gradients.stochastic:
            reasons.append("gradients are rounded at random, by a key")
        if reasons:
            raise ValueError(f"{where}: {shown(plan.path)}: {reasons[0]}; {_ASK}")


def _require_alike(call: Call, other: Call, where: str) -> None:
    def kinds(call: Call) -> Any:
        return [(v.aval.shape, v.aval.dtype) for v in call.jaxpr.outvars]

    if call.out_tree != other.out_tree or kinds(call) != kinds(other):
        raise ValueError(
            f"{where}: frozen: expected a result like fn's, {call.out_tree} of {kinds(call)}, "
            f"got {other.out_tree} of {kinds(other)}"
        )


def observations(
    call: Call, recipe: Recipe, where: str, *, part: bool = False
) -> Observations | None:
    """The plan of a recipe's observers for a traced call, perhaps a part; `None` without any."""
    if all(rule.observer is None for rule in recipe):
        return None
    return plan_of(call, recipe, where, part=part)


def _step(
    call: Call,
    frozen: Call,
    phases: Sequence[Phase],
    schedule: Schedule | None,
    state: QuantState,
) -> tuple[Any, QuantState]:
    """One step with a state: the result, and the next state."""
    recipe = state.layout.recipe
    observer_plans = {
        id(c): observations(c, recipe, "fake_quantized", part=True) for c in (call, frozen)
    }
    for plan in observer_plans.values():
        unknown = [n for n in (plan.observed if plan else ()) if n not in state.ranges]
        if unknown:
            raise ValueError(
                f"fake_quantized: the call observes {unknown[0]!r}, for which the state has no "
                "range; make the state with an example of this call"
            )

    def branch(phase: Phase) -> Callable[[QuantState], Any]:
        chosen = frozen if phase.frozen else call

        def run(state: QuantState) -> Any:
            return _run(chosen, state.layout.plans, phase, state, observer_plans[id(chosen)])

        return run

    if len(phases) == 1:
        out, fresh = branch(phases[0])(state)
    else:
        starts = jnp.asarray([phase.start for phase in phases], jnp.int32)
        index = jnp.sum(starts <= state.step[None]) - 1
        out, fresh = lax.switch(index, [branch(phase) for phase in phases], state)
    ranges = {
        name: _merged(state, name, now, None if schedule is None else schedule.freeze)
        for name, now in fresh.items()
    }
    new = dataclasses.replace(state, ranges={**state.ranges, **ranges}, step=state.step + 1)
    return out, new


def _merged(state: QuantState, name: str, now: Any, freeze: int | None) -> Any:
    before = state.ranges[name]
    observer = _observer(state, name)
    after = observer.merge(before, lax.stop_gradient(now))
    if freeze is None:
        return after
    is_frozen = state.step >= freeze
    return jax.tree.map(lambda a, b: jnp.where(is_frozen, a, b), before, after)


def _observer(state: QuantState, name: str) -> Any:
    for plan in state.layout.plans:
        keys = {site.key for site in plan.sites}
        for key, entries in state.layout.seen:
            if key in keys and any(entry == name for _, entry in entries):
                assert plan.rule is not None
                return plan.rule.observer
    raise AssertionError(name)


def _run(
    call: Call,
    plans: Sequence[Plan],
    phase: Phase,
    state: QuantState | None,
    observer_plan: Observations | None,
) -> tuple[Any, dict[str, Any]]:
    """The result in one phase, and the states of its observers."""
    recipe = phase.recipe
    leaves = list(call.leaves)
    inner: Policy = InFloat()
    if recipe is not None:
        by_path = {plan.path: plan for plan in plans}
        for n, path in enumerate(call.paths):
            plan = None if path is None else by_path.get(path)
            if plan is not None and plan.spec is not None:
                leaves[n] = trained(leaves[n], plan, recipe, state, phase.bits)
        inner = Train(recipe.attention, None if state is None else key_of(state))
    if observer_plan is None:
        return call.run(Interpreter(inner, call.param_paths), leaves), {}
    slots = {
        name: statistics_slot(place.slot) for name, (place, _) in observer_plan.observed.items()
    }
    observers = {slots[name]: observer for name, (_, observer) in observer_plan.observed.items()}
    start = {name: entry.state for name, entry in observer_plan.start().entries.items()}
    values = SiteValues({slot: start[name] for name, slot in slots.items()}, updated=True)
    policy = Observe(inner, observers)
    out = call.run(Interpreter(policy, call.param_paths, values), leaves)
    return out, {name: values.values[slot] for name, slot in slots.items()}
