"""Codes from float params and a state: the code that training and `convert` share."""

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
    """The estimator by which gradients pass the rounding of a leaf."""
    estimator = plan.rule.weight_estimator if plan.rule is not None else None
    if estimator is None or plan.spec is None:
        return straight_through()
    if "codebook" in estimator.learns and _looked_up_otherwise(plan):
        return straight_through()
    return estimator


def _looked_up_otherwise(plan: Plan) -> bool:
    """Whether a leaf has a spec without codebook, while its rule's weights have a codebook."""
    weights = None if plan.rule is None else plan.rule.weights
    if plan.spec is None or weights is None:
        return False
    return weights.format.is_codebook and not plan.spec.format.is_codebook


def learns_activations(plan: Plan) -> Estimator | None:
    """The estimator that learns the range of a leaf's inputs, if any."""
    rule = plan.rule
    if plan.spec is None or rule is None or rule.activations is None:
        return None
    estimator = rule.activation_estimator
    return estimator if estimator is not None and estimator.learns and contracted(plan) else None


def observes(plan: Plan) -> bool:
    """Whether the range of a leaf's inputs is observed."""
    rule = plan.rule
    if plan.spec is None or rule is None or rule.activations is None or not contracted(plan):
        return False
    return rule.observer is not None


def contracted(plan: Plan) -> bool:
    """Whether a leaf takes part in a contraction, not only in lookups."""
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
    """The codes of a leaf as they are served; traceable.

    Args:
      leaf: the float array.
      plan: its plan.
      recipe: the full recipe.
      state: the training state; `None` if the rule needs none.
      bits: minimum bits of integer formats, see `Schedule`.
      turned: store contracted axes last, which is faster for few rows. If false, codes whose sums
        are exact in any order (unpacked integers, contracted with integers) keep the leaf's axes.
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
    """The codes of a leaf with the grid of its inputs, if that is static."""
    spec = q.contraction.activations
    grid = None if state is None or spec is None else grid_for(plan, state, spec)
    if grid is None:
        return q
    return dataclasses.replace(q, calibration=Calibration(input=grid))


def at_bits(plan: Plan, state: QuantState | None, bits: int) -> tuple[QSpec, dict[str, Array]]:
    """A leaf's spec with at least `bits` bits, and its learned arrays, rescaled to that spec."""
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
    """Spec, learned arrays and axes to store last, for `encode`; `turned` as in `encoded`."""
    assert plan.rule is not None
    spec, learned = at_bits(plan, state, bits)
    activations = wide(plan.rule.activations, bits)
    exact = spec.format.is_integer and activations is not None and activations.format.is_integer
    if turned or not exact or spec.format.packed:
        return spec, learned, plan.storage_last_axes
    # learned arrays are in the storage order of scales
    core, lead = leaf.shape[plan.batch_axes :], plan.batch_axes
    stored, original = (
        storage_layout(core, spec, m, "float32").axes for m in (plan.storage_last_axes, ())
    )
    if set(stored) != set(original):
        return spec, learned, plan.storage_last_axes if learned else ()
    order = [*range(lead), *(lead + stored.index(axes) for axes in original)]
    return spec, {name: jnp.transpose(a, order) for name, a in learned.items()}, ()


def grid_for(plan: Plan, state: QuantState, spec: QSpec) -> QuantParams | None:
    """The grid of a leaf's inputs, `[*layers]`; `None` if it is dynamic."""
    estimator = learns_activations(plan)
    if estimator is not None:
        learned = lax.stop_gradient(activation_at(plan, state, spec))
        scale, zero = estimator.grid(learned, spec)
        return grid_of(_unless(_finite(learned, scale.ndim), scale), zero, spec)
    if not observes(plan):
        return None
    return grid_of(*range_to_scale(_range(plan, state), spec), spec)


def activation_at(plan: Plan, state: QuantState, spec: QSpec) -> dict[str, Array]:
    """The learned arrays of an activation, rescaled if `spec` has other bits than the rule's."""
    estimator = learns_activations(plan)
    assert estimator is not None and plan.rule is not None and plan.rule.activations is not None
    learned = state.of_activation(plan.path)
    if spec == plan.rule.activations:
        return learned
    return estimator.rescaled(learned, plan.rule.activations, spec)


def _range(plan: Plan, state: QuantState) -> Range:
    """The range observed at all sites of a leaf."""
    assert plan.rule is not None and plan.rule.observer is not None
    site_entries = dict(state.layout.seen)
    keys = [site.key for site in plan.sites if site.primitive != "gather"]
    entries = dict.fromkeys(entry for key in keys for _, entry in site_entries.get(key, ()))
    states = [state.ranges[entry] for entry in entries]
    return lax.stop_gradient(_merged_range(plan.rule.observer, states))


# Compiled separately, so that ranges are equal inside and outside of a compiled function.
@functools.partial(jax.jit, static_argnums=0)
def _merged_range(observer: Any, states: list[dict[str, Any]]) -> Range:
    merged: Range = observer.range(functools.reduce(observer.merge, states))
    return merged


def trained(
    leaf: Array, plan: Plan, recipe: Recipe, state: QuantState | None, bits: int = 0
) -> FakeQuantTensor:
    """A leaf for training: its codes, and the float values that receive gradients."""
    assert plan.rule is not None
    q = with_grid(encoded(leaf, plan, recipe, state, bits, turned=False), plan, state)
    _, learned, _ = given(leaf, plan, state, bits, turned=False)
    if learned and not weight_estimator(plan).constants:
        # with learned steps, codes do not show non-finite values
        sound = jnp.isfinite(jnp.max(magnitude(lax.stop_gradient(leaf)), initial=0.0))
        q = dataclasses.replace(q, scale=_unless(sound & _finite(learned), q.scale))
    # codes are computed once, instead of in every operation that reads them
    q = lax.optimization_barrier(q)
    estimator = weight_estimator(plan)
    if estimator == straight_through() and (q.spec.format.min < 0 or not q.spec.symmetric):
        estimator = straight_through(clip=False)  # scales come from this leaf: nothing clips
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
    """Whether all learned arrays are finite, for each index of `lead` leading axes."""
    ok = [jnp.isfinite(a).all(axis=tuple(range(lead, a.ndim))) for a in learned.values()]
    return functools.reduce(jnp.logical_and, ok)


def _unless(sound: Array, scale: Array) -> Array:
    """Scales, or NaN where not `sound`, so that results show it."""
    return jnp.where(sound, scale, jnp.asarray(jnp.nan, scale.dtype))


def key_of(state: QuantState) -> Array:
    """Key data at the state's step, uint32 `[2]`."""
    key = jax.random.wrap_key_data(state.key, impl="threefry2x32")
    return jax.random.key_data(jax.random.fold_in(key, state.step))
