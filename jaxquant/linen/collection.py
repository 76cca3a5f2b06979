"""The `quant` collection: states of observers as Linen variables.

`{"batches": number, "sites": {site key: {operand: state}}}`; sites that contract the same array
share one entry, under the key of the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxquant.capture import Plan, Statistics, observed_call, plan_of, require_observers
from jaxquant.interpret.calls import Call
from jaxquant.recipe import Recipe

NAME = "quant"
_FIELDS = {"batches", "sites"}


def records(mutable: Any, recipe: Recipe | None) -> bool:
    """Whether a call records: `mutable` names the collection, and some rule has an observer."""
    return _named(mutable) and recipe is not None and any(r.observer is not None for r in recipe)


def _named(mutable: Any) -> bool:
    return mutable == NAME or (
        isinstance(mutable, (list, tuple, set, frozenset)) and NAME in mutable
    )


def require_recorded(mutable: Any, recipe: Recipe | None, collections: Mapping[str, Any]) -> None:
    """Raises if `mutable` names the collection but no rule observes and the model has none."""
    if _named(mutable) and recipe is not None and not collections.get(NAME):
        require_observers(recipe, f"linen: mutable: {NAME!r}")


def parted(variables: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """Splits off the collection; a model's own collection named `quant` stays."""
    quant = variables.get(NAME)
    if not isinstance(quant, Mapping) or set(quant) != _FIELDS:
        return variables, None
    return {k: v for k, v in variables.items() if k != NAME}, quant


def recorded(
    call: Call, recipe: Recipe, quant: Mapping[str, Any] | None
) -> tuple[Any, dict[str, Any]]:
    """Evaluates a call; returns its result and the updated collection.

    Raises:
      ValueError: as `jaxquant.capture` for the recipe, or the collection is of another model.
    """
    plan = plan_of(call, recipe, "linen")
    before = plan.start() if quant is None else statistics_of(plan, quant)
    states = {name: seen.state for name, seen in before.entries.items()}
    result, states = observed_call(plan, states, call.leaves, call.consts)
    sites: dict[str, dict[str, Any]] = {}
    for name, (place, _) in plan.observed.items():
        sites.setdefault(place.keys[0], {})[place.slot.name] = states[name]
    return result, {"batches": before.batches + 1, "sites": sites}


def statistics_of(plan: Plan, quant: Mapping[str, Any]) -> Statistics:
    """Converts the collection to statistics.

    Raises:
      ValueError: it has other sites, or states of other observers.
    """
    empty = jax.eval_shape(plan.start)
    sites = quant["sites"]
    names = {f"{key}:{operand}" for key, operands in sites.items() for operand in operands}
    differences = [f"{n!r} is missing" for n in empty.entries if n not in names]
    differences += [f"{n!r} is unknown" for n in sorted(names) if n not in empty.entries]
    entries = {}
    for name, (place, _) in plan.observed.items() if not differences else ():
        state, like = dict(sites[place.keys[0]][place.slot.name]), empty.entries[name]
        kinds, expected = ({k: _kind(v) for k, v in s.items()} for s in (state, like.state))
        if kinds != expected:
            differences.append(f"{name!r}: expected {expected}, got {kinds}")
        entries[name] = dataclasses.replace(like, state=state)
    if differences:
        raise ValueError(
            f"linen: the {NAME!r} collection has statistics of other sites: "
            f"{'; '.join(differences[:3])}"
        )
    return Statistics(entries, quant["batches"], plan.sites)


def _kind(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"


def require_sound(stats: Statistics) -> None:
    """Raises where `capture` would have raised: sites not reached, or values not finite."""
    for name, seen in stats.entries.items():
        bad = int(np.max(seen.state["bad"]))
        if bad:
            raise ValueError(f"linen: {name!r} had NaN or infinity in {bad} of its updates")
    missing = stats.unseen()
    if missing:
        raise ValueError(f"linen: no batch reaches {', '.join(missing)}")
