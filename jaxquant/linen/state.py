"""The `quant` collection of training: a `QuantState`'s arrays as ordinary Linen variables.

`{"learned": ..., "constants": ..., "ranges": ..., "step": ..., "key": ..., "made_for": ...}`: the
fields of a `QuantState` except its layout, which tracing recomputes. `made_for` is uint32 `[2]`,
checksums of the recipe and of the params' shapes.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.interpret.sites import path_str
from jaxquant.linen.collection import NAME
from jaxquant.qat import QuantState, Schedule
from jaxquant.recipe import Recipe
from jaxquant.report import shown

_ARRAYS = ("learned", "constants", "ranges", "step", "key")
_FIELDS = {*_ARRAYS, "made_for"}


ASK = "make one with init, or for existing variables with with_state(variables, x)"


def require_none_needed(recipe: Recipe, schedule: Schedule | None, where: str) -> None:
    """Raises if the recipe or the schedule needs the collection."""
    if schedule is not None or _needs_state(recipe):
        owner = "recipe needs a state" if schedule is None else "schedule counts steps"
        raise ValueError(
            f"{where}: the {owner}, and the variables have no {NAME!r} collection; {ASK}"
        )


def _needs_state(recipe: Recipe) -> bool:
    """Whether some rule learns, observes, or rounds gradients stochastically."""
    for rule in recipe:
        estimators = (rule.weight_estimator, rule.activation_estimator)
        if rule.observer is not None or any(e is not None and e.learns for e in estimators):
            return True
        if rule.gradients is not None and rule.gradients.stochastic:
            return True
    return False


def parted(
    variables: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """Splits off the collection.

    Raises:
      ValueError: `variables` is not a mapping, or its `quant` collection has other fields.
    """
    if not isinstance(variables, Mapping):
        raise ValueError(
            f"{where}: expected variables, a dict of collections, got {type(variables).__name__}"
        )
    plain = {name: value for name, value in variables.items() if name != NAME}
    quant = variables.get(NAME)
    if quant is not None and (not isinstance(quant, Mapping) or set(quant) != _FIELDS):
        fields = sorted(quant) if isinstance(quant, Mapping) else type(quant).__name__
        raise ValueError(
            f"{where}: expected a {NAME!r} collection as init makes it, got one of {fields}"
        )
    return plain, quant


def collection(state: QuantState) -> dict[str, Any]:
    """Returns the collection of a state."""
    arrays = {name: getattr(state, name) for name in _ARRAYS}
    return {**arrays, "made_for": jnp.asarray(_made_for(state))}


def state_of(quant: Mapping[str, Any], like: QuantState, where: str) -> QuantState:
    """Returns the state in a collection.

    Args:
      quant: the collection.
      like: shapes and layout of a state for the same call; the collection may have more leaves.
      where: prefix of error messages.

    Raises:
      ValueError: it was made for another recipe or other params.
    """
    made_for = quant["made_for"]
    if not isinstance(made_for, jax.core.Tracer):
        same = np.asarray(made_for) == _made_for(like)
        if not same.all():
            words = "params of other shapes" if same[0] else "another recipe"
            raise ValueError(
                f"{where}: the {NAME!r} collection was made for {words}; continue and convert "
                "with the recipe of its training"
            )
    plain = {name: _dicts(quant[name]) for name in _ARRAYS}
    kinds = {path_str(path): _kind(leaf) for path, leaf in jax.tree.leaves_with_path(plain)}
    differences = []
    for path, leaf in jax.tree.leaves_with_path({name: getattr(like, name) for name in _ARRAYS}):
        name, expected = path_str(path), _kind(leaf)
        if name not in kinds:
            differences.append(f"{shown(name)} is missing")
        elif kinds[name] != expected:
            differences.append(f"{shown(name)}: expected {expected}, got {kinds[name]}")
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(
            f"{where}: the {NAME!r} collection was made for another model or recipe: "
            f"{'; '.join(differences[:3])}{more}"
        )
    return dataclasses.replace(like, **plain)


def _dicts(tree: Any) -> Any:
    """Replaces frozen dicts by plain ones."""
    if isinstance(tree, Mapping):
        return {name: _dicts(value) for name, value in tree.items()}
    return tree


def _kind(array: Any) -> str:
    return f"{jnp.result_type(array)}{list(jnp.shape(array))}"


def _made_for(state: QuantState) -> np.ndarray:
    params = [leaf for leaf in state.layout.leaves if leaf[0].startswith("params/")]
    facts = (_facts(state.layout.recipe.rules), params)
    return np.array([zlib.crc32(repr(fact).encode()) for fact in facts], np.uint32)


def _facts(x: Any) -> Any:
    """Returns a value that identifies rules and has the same `repr` in every process."""
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        fields = {f.name: _facts(getattr(x, f.name)) for f in dataclasses.fields(x)}
        return type(x).__name__, fields
    if isinstance(x, (tuple, list)):
        return [_facts(item) for item in x]
    return re.sub(r" at 0x[0-9a-f]+", "", repr(x))
