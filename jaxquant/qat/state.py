"""`QuantState`: what training with quantization keeps beside the params, as a pytree."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxquant.capture.statistics import Sites as Seen
from jaxquant.interpret.calls import Call
from jaxquant.interpret.sites import path_str
from jaxquant.params.plan import Plan
from jaxquant.recipe import Recipe
from jaxquant.report import shown

Learned = dict[str, dict[str, dict[str, Array]]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a state was made for: static, and compared whenever the state is used.

    Attributes:
      recipe: the recipe.
      plans: what is done with each leaf.
      leaves: path, shape and dtype of each.
      seen: for each site that is observed, the names of its entries; as `Statistics.sites`.
      lead: for each entry, the layers that its states are stacked over.
      learned: path and shape of each array that is learned.
    """

    recipe: Recipe
    plans: tuple[Plan, ...]
    leaves: tuple[tuple[str, tuple[int, ...], str], ...]
    seen: Seen = ()
    lead: tuple[tuple[str, tuple[int, ...]], ...] = ()
    learned: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __repr__(self) -> str:
        name = self.recipe.title or f"{len(self.recipe)} rules"
        count = sum(plan.spec is not None for plan in self.plans)
        return f"Layout({name}, {count} of {len(self.plans)} leaves)"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantState:
    """What quantization-aware training keeps beside the params; goes in and comes out.

    A pytree: `jit`, checkpoints and `jax.tree` take it. Only `learned` is for an optimizer.

    Attributes:
      learned: what estimators learn, float32, by `"weights"` or `"activations"`, then by the
        parameter's key path; for an activation that is the parameter it is contracted with.
      constants: what estimators keep fixed, likewise by parameter.
      ranges: states of observers, by entry.
      step: int32 `[]`, how often the state was used.
      key: uint32 `[2]`, data of the PRNG key from which gradients are rounded at random.
      layout: what it was made for.
    """

    learned: Learned
    constants: dict[str, dict[str, Array]]
    ranges: dict[str, dict[str, Any]]
    step: Array
    key: Array
    layout: Layout = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        counts = {name: len(found) for name, found in self.learned.items()}
        made = ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "nothing"
        step = self.step if jnp.ndim(self.step) or isinstance(self.step, jax.core.Tracer) else None
        at = "" if step is not None else f"step {self.step}, "
        return f"QuantState({at}learned of {made}, {len(self.ranges)} ranges, {self.layout!r})"

    def of_weight(self, path: str) -> dict[str, Array]:
        """What belongs to the rounding of one parameter."""
        return {**self.learned["weights"].get(path, {}), **self.constants.get(path, {})}

    def of_activation(self, path: str) -> dict[str, Array]:
        """What belongs to the rounding of what one parameter is contracted with."""
        return self.learned["activations"].get(path, {})


def leaves_of(call: Call) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    """Path, shape and dtype of the params of a traced call."""
    return tuple(
        (path, tuple(jnp.shape(leaf)), str(jnp.result_type(leaf)))
        for path, leaf in zip(call.paths, call.leaves, strict=True)
        if path is not None
    )


def kinds_of(leaves: Sequence[tuple[str, Any]]) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    """Path, shape and dtype of the arrays among leaves."""
    arrays = [(p, x) for p, x in leaves if hasattr(x, "shape") and hasattr(x, "dtype")]
    return tuple((p, tuple(jnp.shape(x)), str(jnp.result_type(x))) for p, x in arrays)


def shapes_of(learned: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Path and shape of each array."""
    flat = jax.tree.leaves_with_path(learned)
    return tuple((path_str(path), tuple(jnp.shape(leaf))) for path, leaf in flat)


def require_same(
    state: Any, recipe: Recipe, leaves: tuple[tuple[str, tuple[int, ...], str], ...], where: str
) -> None:
    """Raises unless a state was made for this recipe and these params."""
    if not isinstance(state, QuantState):
        raise ValueError(
            f"{where}: quant_state: expected what jaxquant.init_quant_state returns, "
            f"got {type(state).__name__}"
        )
    made = state.layout
    if made.recipe.rules != recipe.rules:
        pairs = zip(made.recipe.rules, recipe.rules, strict=False)
        first = next((f"{b!r} instead of {a!r}" for a, b in pairs if a != b), None)
        counts = f"{len(recipe.rules)} rules instead of {len(made.recipe.rules)}"
        raise ValueError(
            f"{where}: the state was made for another recipe: got {first or counts}; "
            "what is trained by one recipe cannot be served by another"
        )
    expected, got = ({p: (s, d) for p, s, d in kinds} for kinds in (made.leaves, leaves))
    wrong = [f"{shown(p)} is missing" for p in expected if p not in got]
    wrong += [f"{shown(p)} is unknown" for p in got if p not in expected]
    wrong += [
        f"{shown(p)}: expected {d}{list(s)}, got {got[p][1]}{list(got[p][0])}"
        for p, (s, d) in expected.items()
        if p in got and got[p] != (s, d)
    ]
    if not wrong and made.learned:
        held = dict(shapes_of(state.learned))
        lost = [f"learned/{p} is missing" for p, _ in made.learned if p not in held]
        lost += [
            f"learned/{p}: expected {list(s)}, got {list(held[p])}"
            for p, s in made.learned
            if p in held and held[p] != s
        ]
        if lost:
            raise ValueError(f"{where}: quant_state is not whole: {'; '.join(lost[:3])}")
    if wrong:
        raise ValueError(
            f"{where}: the state was made for other params: {'; '.join(wrong[:3])}"
            f"{f'; and {len(wrong) - 3} more' if len(wrong) > 3 else ''}"
        )
