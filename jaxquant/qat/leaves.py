"""From float params and a state to codes: the one place that training and serving share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.observers import Range, range_to_scale
from jaxquant.ops import grid_of
from jaxquant.params.plan import Plan
from jaxquant.qat.schedule import wide
from jaxquant.qat.state import QuantState
from jaxquant.qtensor import (
    Calibration,
    ContractionConfig,
    FakeQuantTensor,
    QSpec,
    QTensor,
    QuantParams,
    magnitude,
    storage_layout,
    with_contraction,
)
from jaxquant.recipe import Recipe
from jaxquant.ste import Estimator, straight_through


def weight_estimator(plan: Plan) -> Estimator:
    """How gradients pass the rounding of a leaf."""
    given = plan.rule.weight_estimator if plan.rule is not None else None
    if given is None or plan.spec is None:
        return straight_through()
    if "codebook" in given.learns and _looked_up_otherwise(plan):
        return straight_through()
    return given


def _looked_up_otherwise(plan: Plan) -> bool:
    """Whether a leaf has no codebook while its rule's weights have: it has a spec of its own."""
    weights = None if plan.rule is None else plan.rule.weights
    if plan.spec is None or weights is None:
        return False
    return weights.format.is_codebook and not plan.spec.format.is_codebook


def learns_activations(plan: Plan) -> Estimator | None:
    """What learns the range of what a leaf is contracted with, if anything does."""
    rule = plan.rule
    if plan.spec is None or rule is None or rule.activations is None:
        return None
    given = rule.activation_estimator
    return given if given is not None and given.learns and contracted(plan) else None


def observes(plan: Plan) -> bool:
    """Whether the range of what a leaf is contracted with is observed."""
    rule = plan.rule
    if plan.spec is None or rule is None or rule.activations is None or not contracted(plan):
        return False
    return rule.observer is not None


def contracted(plan: Plan) -> bool:
    """Whether a leaf takes part in a contraction, and not in lookups alone."""
    return any(site.primitive != "gather" for site in plan.sites)


def encoded(
    leaf: Array,
    plan: Plan,
    recipe: Recipe,
    state: QuantState | None,
    bits: int = 0,
    *,
    turned: bool = True,
) -> QTensor:
    """The codes of a leaf as they are served; traced or not.

    Args:
      leaf: the float array.
      plan: what is done with it.
      recipe: the whole recipe.
      state: what belongs to it; `None` where nothing does.
      bits: the least bits of integer formats, see `Schedule`.
      turned: store contracted axes last, which serves few rows; else what makes no difference to
        sums stays as it lies: integers that meet integers, in whole bytes.
    """
    assert plan.rule is not None
    spec, learned, storage_last_axes = given(leaf, plan, state, bits, turned)
    activations = wide(plan.rule.activations, bits)
    q = weight_estimator(plan).encode(
        leaf, learned, spec, storage_last_axes=storage_last_axes, batch_axes=plan.batch_axes
    )
    attention = tuple((pattern, wide(s, bits)) for pattern, s in recipe.attention)
    return with_contraction(q, ContractionConfig(activations, attention))


def with_grid(q: QTensor, plan: Plan, state: QuantState | None) -> QTensor:
    """The codes of a leaf with the grid of what it is contracted with, where that is known."""
    spec = q.contraction.activations
    grid = None if state is None or spec is None else grid_for(plan, state, spec)
    if grid is None:
        return q
    return dataclasses.replace(q, calibration=Calibration(input=grid))


def at_bits(plan: Plan, state: QuantState | None, bits: int) -> tuple[QSpec, dict[str, Array]]:
    """A leaf's spec, and what is learned with it, at so many bits."""
    assert plan.spec is not None
    learned = {} if state is None else state.of_weight(plan.path)
    spec = wide(plan.spec, bits)
    assert spec is not None
    if spec != plan.spec and learned:
        learned = weight_estimator(plan).rescaled(learned, plan.spec, spec)
    return spec, learned


def given(
    leaf: Array, plan: Plan, state: QuantState | None, bits: int, turned: bool
) -> tuple[QSpec, dict[str, Array], tuple[int, ...]]:
    """Spec, what is learned, and axes to store last, for `encode`; `turned` as for `encoded`."""
    assert plan.rule is not None
    spec, learned = at_bits(plan, state, bits)
    activations = wide(plan.rule.activations, bits)
    exact = spec.format.is_integer and activations is not None and activations.format.is_integer
    if turned or not exact or spec.format.packed:
        return spec, learned, plan.storage_last_axes
    # what is learned lies as scales are stored
    core, lead = leaf.shape[plan.batch_axes :], plan.batch_axes
    stored, own = (
        storage_layout(core, spec, m, "float32").axes for m in (plan.storage_last_axes, ())
    )
    if set(stored) != set(own):
        return spec, learned, plan.storage_last_axes if learned else ()
    order = [*range(lead), *(lead + stored.index(axes) for axes in own)]
    return spec, {name: jnp.transpose(a, order) for name, a in learned.items()}, ()


def grid_for(plan: Plan, state: QuantState, spec: QSpec) -> QuantParams | None:
    """The grid of what a leaf is contracted with, `[*layers]`; `None` where it is dynamic."""
    estimator = learns_activations(plan)
    if estimator is not None:
        learned = lax.stop_gradient(activation_at(plan, state, spec))
        scale, zero = estimator.grid(learned, spec)
        return grid_of(_unless(_finite(learned, scale.ndim), scale), zero, spec)
    if not observes(plan):
        return None
    return grid_of(*range_to_scale(_range(plan, state), spec), spec)


def activation_at(plan: Plan, state: QuantState, spec: QSpec) -> dict[str, Array]:
    """What is learned of an activation, for a spec of perhaps other bits than the rule's."""
    estimator = learns_activations(plan)
    assert estimator is not None and plan.rule is not None and plan.rule.activations is not None
    learned = state.of_activation(plan.path)
    if spec == plan.rule.activations:
        return learned
    return estimator.rescaled(learned, plan.rule.activations, spec)


def _range(plan: Plan, state: QuantState) -> Range:
    """The range observed at all sites of a leaf."""
    assert plan.rule is not None and plan.rule.observer is not None
    seen = dict(state.layout.seen)
    keys = [site.key for site in plan.sites if site.primitive != "gather"]
    entries = dict.fromkeys(entry for key in keys for _, entry in seen.get(key, ()))
    states = [state.ranges[entry] for entry in entries]
    return lax.stop_gradient(_merged_range(plan.rule.observer, states))


# Compiled by itself, so that ranges found outside of a program are those found within one.
@functools.partial(jax.jit, static_argnums=0)
def _merged_range(observer: Any, states: list[dict[str, Any]]) -> Range:
    found: Range = observer.range(functools.reduce(observer.merge, states))
    return found


def trained(
    leaf: Array, plan: Plan, recipe: Recipe, state: QuantState | None, bits: int = 0
) -> FakeQuantTensor:
    """A leaf as training computes with it: its codes, and the floats that gradients go to."""
    assert plan.rule is not None
    q = with_grid(encoded(leaf, plan, recipe, state, bits, turned=False), plan, state)
    _, learned, _ = given(leaf, plan, state, bits, turned=False)
    if learned and not weight_estimator(plan).constants:
        # given steps, codes tell nothing of values that are not finite
        sound = jnp.isfinite(jnp.max(magnitude(lax.stop_gradient(leaf)), initial=0.0))
        q = dataclasses.replace(q, scale=_unless(sound & _finite(learned), q.scale))
    # codes are computed once, and not anew in everything that reads them
    q = lax.optimization_barrier(q)
    estimator = weight_estimator(plan)
    if estimator == straight_through() and (q.spec.format.min < 0 or not q.spec.symmetric):
        estimator = straight_through(clip=False)  # scales are those of this leaf: none is outside
    values = estimator.values(leaf, learned, q)
    fields = {f.name: getattr(q, f.name) for f in dataclasses.fields(QTensor)}
    activation = None
    if learns_activations(plan) is not None:
        assert state is not None and q.contraction.activations is not None
        activation = activation_at(plan, state, q.contraction.activations)
    return FakeQuantTensor(
        **fields,
        values=values,
        learned=activation,
        estimator=plan.rule.activation_estimator,
        gradients=plan.rule.gradients,
    )


def _finite(learned: dict[str, Array], lead: int = 0) -> Array:
    """Whether all that is learned is finite, apart for each of `lead` leading axes."""
    ok = [jnp.isfinite(a).all(axis=tuple(range(lead, a.ndim))) for a in learned.values()]
    return functools.reduce(jnp.logical_and, ok)


def _unless(sound: Array, scale: Array) -> Array:
    """Scales, NaN where something is not sound, so that it is seen in the result."""
    return jnp.where(sound, scale, jnp.asarray(jnp.nan, scale.dtype))


def key_of(state: QuantState) -> Array:
    """Key data at the state's step, uint32 `[2]`."""
    key = jax.random.wrap_key_data(state.key, impl="threefry2x32")
    return jax.random.key_data(jax.random.fold_in(key, state.step))
