"""`QuantState`: the state of quantization-aware training beside the params, as a pytree."""

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
    """The recipe and params that a state was made for: static, compared at each use.

    Attributes:
      recipe: the recipe.
      plans: the plan of each leaf.
      leaves: path, shape and dtype of each leaf.
      seen: for each observed site, the names of its entries; as `Statistics.sites`.
      lead: for each entry, the sizes of the layer axes that its states are stacked along.
      learned: path and shape of each learned array.
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
    """The state of quantization-aware training; each call takes one and returns the next.

    A pytree: `jit`, checkpoints and `jax.tree` take it. Only `learned` is for an optimizer.

    Attributes:
      learned: the arrays that estimators learn, float32, by `"weights"` or `"activations"`, then by
        key path of a parameter; for an activation, of the parameter it is contracted with.
      constants: the arrays that estimators keep fixed, by key path of a parameter.
      ranges: states of observers, by entry.
      step: int32 `[]`, the number of calls with the state.
      key: uint32 `[2]`, data of the PRNG key for random rounding of gradients.
      layout: the recipe and params it was made for.
    """

    learned: Learned
    constants: dict[str, dict[str, Array]]
    ranges: dict[str, dict[str, Any]]
    step: Array
    key: Array
    layout: Layout = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        counts = {name: len(arrays) for name, arrays in self.learned.items()}
        made = ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "nothing"
        step = self.step if jnp.ndim(self.step) or isinstance(self.step, jax.core.Tracer) else None
        at = "" if step is not None else f"step {self.step}, "
        return f"QuantState({at}learned of {made}, {len(self.ranges)} ranges, {self.layout!r})"

    def of_weight(self, path: str) -> dict[str, Array]:
        """The learned arrays and constants for rounding one parameter."""
        return {**self.learned["weights"].get(path, {}), **self.constants.get(path, {})}

    def of_activation(self, path: str) -> dict[str, Array]:
        """The learned arrays for rounding the activation that one parameter is contracted with."""
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
    layout = state.layout
    if layout.recipe.rules != recipe.rules:
        pairs = zip(layout.recipe.rules, recipe.rules, strict=False)
        first = next((f"{b!r} instead of {a!r}" for a, b in pairs if a != b), None)
        counts = f"{len(recipe.rules)} rules instead of {len(layout.recipe.rules)}"
        raise ValueError(
            f"{where}: the state was made for another recipe: got {first or counts}; "
            "what is trained by one recipe cannot be served by another"
        )
    expected, got = ({p: (s, d) for p, s, d in kinds} for kinds in (layout.leaves, leaves))
    wrong = [f"{shown(p)} is missing" for p in expected if p not in got]
    wrong += [f"{shown(p)} is unknown" for p in got if p not in expected]
    wrong += [
        f"{shown(p)}: expected {d}{list(s)}, got {got[p][1]}{list(got[p][0])}"
        for p, (s, d) in expected.items()
        if p in got and got[p] != (s, d)
    ]
    if not wrong and layout.learned:
        shapes = dict(shapes_of(state.learned))
        lost = [f"learned/{p} is missing" for p, _ in layout.learned if p not in shapes]
        lost += [
            f"learned/{p}: expected {list(s)}, got {list(shapes[p])}"
            for p, s in layout.learned
            if p in shapes and shapes[p] != s
        ]
        if lost:
            raise ValueError(f"{where}: quant_state is incomplete: {'; '.join(lost[:3])}")
    if wrong:
        raise ValueError(
            f"{where}: the state was made for other params: {'; '.join(wrong[:3])}"
            f"{f'; and {len(wrong) - 3} more' if len(wrong) > 3 else ''}"
        )
