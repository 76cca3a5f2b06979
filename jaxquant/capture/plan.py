"""Plans which activations of a call are observed by which observer, and runs the observed call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.capture.statistics import Observed, Sites, Statistics, check_same
from jaxquant.interpret.calls import Call
from jaxquant.interpret.evaluate import Interpreter
from jaxquant.interpret.observe import Observe, Place, places_of, statistics_slot
from jaxquant.interpret.policy import Policy
from jaxquant.interpret.serve import attention_grids, policy_of
from jaxquant.interpret.slots import SiteValues
from jaxquant.observers import Observer
from jaxquant.recipe import Recipe, Rule

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The observed activations of one traced call.

    Attributes:
      call: the call.
      observed: by entry name, the first place of an activation and its observer.
      sites: for each site key, its operands and their entry names.
    """

    call: Call
    observed: dict[str, tuple[Place, Observer]]
    sites: Sites

    def start(self) -> Statistics:
        """Returns the statistics before the first batch. May be traced."""
        entries = {}
        for name, (place, observer) in self.observed.items():
            state = {
                k: jnp.broadcast_to(v, (*place.lead, *v.shape)).astype(v.dtype)
                for k, v in observer.init(place.seen(observer)).items()
            }
            shape, dtype = tuple(place.aval.shape), str(place.aval.dtype)
            entries[name] = Observed(state, observer, shape, dtype, place.lead)
        return Statistics(entries, jnp.zeros((), jnp.int32), self.sites)

    def check(self, stats: Statistics, where: str) -> None:
        """Raises unless statistics have the sites and observers of this plan."""
        check_same(jax.eval_shape(self.start), stats, where)


Observing = Recipe | Observer | Mapping[str, Observer]


def plan_of(call: Call, recipe: Observing, where: str, *, part: bool = False) -> Plan:
    """Finds the activations that a recipe's observers observe; spends no FLOPs.

    Args:
      call: the call, its params float or quantized.
      recipe: rules with observers; or one observer, for all contracted activations; or observers by
        path of the parameter.
      where: name of the calling function, for errors.
      part: the call may be of a part of the model, where some rules, or all, match no site.

    Raises:
      ValueError: the recipe has no observer; a rule with one matches no site; a site is inside an
        operation that cannot return statistics.
    """
    require_observers(recipe, where)
    observed: dict[str, tuple[Place, Observer]] = {}
    sites: dict[str, dict[str, str]] = {}
    known: dict[Any, str] = {}
    used: set[Rule] = set()
    places = places_of(call)
    for place in places:
        chosen = _observer(recipe, place, used)
        if chosen is None:
            continue
        if place.shut is not None:
            raise ValueError(
                f"{where}: {place.keys[0]!r} is inside {place.shut}, out of which statistics "
                "cannot be carried; put a rule without an observer in front of its own"
            )
        rows = place.reading.key if place.reading is not None and chosen.sees_rows else None
        kind = (place.array, chosen, place.lead, rows)
        if kind not in known:
            known[kind] = f"{place.keys[0]}:{place.slot.name}"
            observed[known[kind]] = place, chosen
        for key in place.keys:
            sites.setdefault(key, {})[place.slot.name] = known[kind]
    if not part:
        _require_used(recipe, used, places, where)
    if not observed and not part:
        raise ValueError(
            f"{where}: the function contracts no activations, so there is nothing to observe"
        )
    return Plan(call, observed, tuple((key, tuple(ops.items())) for key, ops in sites.items()))


def observed_call(
    plan: Plan, states: Mapping[str, State], leaves: Sequence[Any], consts: Sequence[Any]
) -> tuple[Any, dict[str, State]]:
    """Evaluates the plan's call on other leaves, and updates the observers' states.

    Args:
      plan: the activations to observe.
      states: states by entry name.
      leaves: replace `plan.call.leaves`.
      consts: replace `plan.call.consts`.

    Returns:
      The function's result and the new states. May be traced.
    """
    call = dataclasses.replace(plan.call, leaves=list(leaves), consts=list(consts))
    slots = {name: statistics_slot(place.slot) for name, (place, _) in plan.observed.items()}
    observers = {slots[name]: observer for name, (_, observer) in plan.observed.items()}
    slot_values = attention_grids(call).values  # if the params are calibrated already
    slot_values.update({slot: states[name] for name, slot in slots.items()})
    values = SiteValues(slot_values, updated=True)
    policy = Observe(policy_of(call) or Policy(), observers)
    out = call.run(Interpreter(policy, call.param_paths, values))
    return out, {name: values.values[slot] for name, slot in slots.items()}


def _observer(recipe: Observing, place: Place, used: set[Rule]) -> Observer | None:
    """Returns the observer of an activation; adds the rule that decides it to `used`."""
    if isinstance(recipe, Mapping):
        return next((recipe[path] for path in place.params if path in recipe), None)
    if not isinstance(recipe, Recipe):
        return recipe if place.params or not recipe.sees_rows else None
    for rule in _deciding(recipe, place):
        if rule.observer is not None:
            used.add(rule)
            return rule.observer
    if all(rule.observer is None for rule in recipe):
        for path in place.params:  # no ranges: the statistics for encoders and rewrites
            matched = recipe.match(path)
            if matched is not None and matched.gathers is not None:
                return matched.gathers
    return None


def _deciding(recipe: Recipe, place: Place) -> Iterator[Rule]:
    """Yields the rules that quantize an activation, one for each parameter of the site."""
    for path in place.params:
        rule = recipe.match(path)
        if rule is not None and rule.activations is not None:
            yield rule
    if not place.params:
        rules = (r for r in recipe if (r.attention is not None or r.skip))
        yield from [r for r in rules if r.matches(place.keys[0])][:1]


def require_observers(recipe: Observing, where: str) -> None:
    """Raises unless some rule of a recipe has an observer."""
    observes = isinstance(recipe, Recipe) and any(rule.observer or rule.gathers for rule in recipe)
    if isinstance(recipe, Recipe) and not observes:
        raise ValueError(
            f"{where}: no rule of {recipe!r} has an observer; expected one as in "
            "jq.Rule('**', weights=jq.int8(), activations=..., observer=jq.observers.mse())"
        )


def _require_used(recipe: Observing, used: set[Rule], places: Sequence[Place], where: str) -> None:
    for rule in recipe if isinstance(recipe, Recipe) else ():
        if rule.observer is None or rule in used:
            continue
        if any(rule.matches(key) for place in places for key in (*place.keys, *place.params)):
            reason = "decides no site: earlier rules take all that it matches"
            if rule.activations is None:
                reason = "decides no contraction of two activations"
        else:
            keys = dict.fromkeys(key for place in places for key in place.keys)
            reason = f"matches no site; there are: {', '.join(keys) or 'none'}"
        raise ValueError(f"{where}: rule {rule.key!r} has an observer and {reason}")
