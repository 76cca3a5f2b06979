"""The `quant` collection: states of observers as Linen variables.

`{"batches": number, "sites": {site key: {operand: state}}}`, where sites that contract one and the
same array have one entry between them, under the key of the first.
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
    """Whether a call is to record: the collection is mutable by name, and the recipe observes."""
    return _named(mutable) and recipe is not None and any(r.observer is not None for r in recipe)


def _named(mutable: Any) -> bool:
    return mutable == NAME or (
        isinstance(mutable, (list, tuple, set, frozenset)) and NAME in mutable
    )


def require_recorded(mutable: Any, recipe: Recipe | None, found: Mapping[str, Any]) -> None:
    """Raises where the collection was asked for and neither recorded nor the model's own."""
    if _named(mutable) and recipe is not None and not found.get(NAME):
        require_observers(recipe, f"linen: mutable: {NAME!r}")


def parted(variables: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """Variables without the collection, and the collection; a model's own `quant` stays."""
    held = variables.get(NAME)
    if not isinstance(held, Mapping) or set(held) != _FIELDS:
        return variables, None
    return {k: v for k, v in variables.items() if k != NAME}, held


def recorded(
    call: Call, recipe: Recipe, held: Mapping[str, Any] | None
) -> tuple[Any, dict[str, Any]]:
    """A call's result, and the collection after it.

    Raises:
      ValueError: as `jaxquant.capture` for the recipe, or the collection is another model's.
    """
    plan = plan_of(call, recipe, "linen")
    before = plan.start() if held is None else statistics_of(plan, held)
    states = {name: seen.state for name, seen in before.entries.items()}
    result, states = observed_call(plan, states, call.leaves, call.consts)
    sites: dict[str, dict[str, Any]] = {}
    for name, (place, _) in plan.observed.items():
        sites.setdefault(place.keys[0], {})[place.slot.name] = states[name]
    return result, {"batches": before.batches + 1, "sites": sites}


def statistics_of(plan: Plan, held: Mapping[str, Any]) -> Statistics:
    """The collection as statistics.

    Raises:
      ValueError: it has other sites, or states of other observers.
    """
    empty = jax.eval_shape(plan.start)
    sites = held["sites"]
    found = {f"{key}:{operand}" for key, operands in sites.items() for operand in operands}
    wrong = [f"{n!r} is missing" for n in empty.entries if n not in found]
    wrong += [f"{n!r} is unknown" for n in sorted(found) if n not in empty.entries]
    entries = {}
    for name, (place, _) in plan.observed.items() if not wrong else ():
        state, like = dict(sites[place.keys[0]][place.slot.name]), empty.entries[name]
        kinds, expected = ({k: _kind(v) for k, v in s.items()} for s in (state, like.state))
        if kinds != expected:
            wrong.append(f"{name!r}: expected {expected}, got {kinds}")
        entries[name] = dataclasses.replace(like, state=state)
    if wrong:
        raise ValueError(
            f"linen: the {NAME!r} collection holds statistics of other sites: "
            f"{'; '.join(wrong[:3])}"
        )
    return Statistics(entries, held["batches"], plan.sites)


def _kind(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"


def require_sound(stats: Statistics) -> None:
    """Raises for what `capture` itself would have refused: sites not reached, or not finite."""
    for name, seen in stats.entries.items():
        bad = int(np.max(seen.state["bad"]))
        if bad:
            raise ValueError(f"linen: {name!r} held NaN or infinity in {bad} of its updates")
    missing = stats.unseen()
    if missing:
        raise ValueError(f"linen: no batch reaches {', '.join(missing)}")
