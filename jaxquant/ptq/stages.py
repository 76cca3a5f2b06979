"""The stages of `ptq`: each takes a `State` and returns the next one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from jaxquant.capture import activation_report, capture
from jaxquant.interpret.serve import serve
from jaxquant.interpret.sites import Sites
from jaxquant.numerics import compute_dtype
from jaxquant.params import apply_recipe
from jaxquant.ptq.calibrate import encoded_by_inputs
from jaxquant.ptq.channels import divided
from jaxquant.ptq.fuse import fused, with_offsets
from jaxquant.ptq.state import State
from jaxquant.ptq.static import calibrated, check_observers, check_sites
from jaxquant.qtensor import is_qtensor
from jaxquant.recipe import Recipe, attention_spec
from jaxquant.report import Event


def gather(state: State) -> State:
    """Gathers statistics for, rewrites and encodes leaves whose rules look at inputs."""
    if not state.gathers:
        return state
    if state.stats is not None:
        check_sites(state.sites, state.stats)
    encoded, params, absorbed = encoded_by_inputs(state)
    return dataclasses.replace(state, encoded=encoded, params=params, absorbed=absorbed)


def observe(state: State) -> State:
    """Finds ranges of the float function's activations; per-channel factors move into weights.

    If weights are rewritten, `calibrate` finds the ranges instead, after the rewrites.
    """
    if not state.observes or state.gathers:
        return state
    stats = _statistics(state, state.params)
    check_sites(state.sites, stats)
    check_observers(state.recipe, state.sites, stats)
    params, factors = divided(state.params, state.recipe, state.sites, stats)
    return dataclasses.replace(state, stats=stats, params=params, divided=factors)


def encode(state: State) -> State:
    """Encodes all other leaves, and reports on each leaf."""
    qparams, report = apply_recipe(
        state.params,
        state.recipe,
        sites=state.sites,
        key=state.options.key,
        encoded=state.encoded,
        planned=state.planned,
    )
    report = report.with_leaf_notes(state.absorbed)
    return dataclasses.replace(state, qparams=qparams, report=report)


def calibrate(state: State) -> State:
    """Stores scales and zero points of static activations with the weights they meet."""
    if not state.observes:
        return state
    stats = _statistics(state, state.qparams) if state.gathers else state.stats
    assert stats is not None
    qparams = calibrated(state.qparams, state.recipe, state.sites, stats, state.divided)
    report = dataclasses.replace(
        state.report, activations=activation_report(stats, state.recipe, state.sites)
    )
    qparams = with_offsets(qparams, state.sites)
    return dataclasses.replace(state, stats=stats, qparams=qparams, report=report)


def fuse(state: State) -> State:
    """Keeps results integer from one contraction to the next where rules have `requantize`."""
    if not state.observes:
        return state
    qparams, edges = fused(state.qparams, state.quantized_call, state.recipe, state.sites)
    report = dataclasses.replace(state.report, edges=edges)
    return dataclasses.replace(state, qparams=qparams, report=report)


def describe(state: State) -> State:
    """Adds to the report what `quantized(fn)` will do, without running it."""
    attention = _attention(state.sites, state.qparams, state.recipe)
    report = dataclasses.replace(state.report, attention=attention)
    events = [*_replay(state), *_dtypes(state.qparams, state.platforms)]
    return dataclasses.replace(state, report=report.with_events(events))


STAGES = (gather, observe, encode, calibrate, fuse, describe)
"""In the order in which `ptq` runs them."""


def _statistics(state: State, params: Any) -> Any:
    """Returns the caller's statistics of activations, or gathers them over all batches."""
    if state.batches is None:
        return state.stats
    progress = state.options.progress
    return capture(state.fn, params, state.recipe, batches=state.batches, progress=progress)


def _replay(state: State) -> tuple[Event, ...]:
    """Returns the events that `quantized(fn)` will report."""
    call, events = state.quantized_call, list[Event]()

    def run(leaves: list[Any]) -> None:
        inner = dataclasses.replace(call, leaves=leaves)
        events[:] = serve(inner, state.recipe, audit=True)[1]

    jax.eval_shape(run, call.leaves)
    return tuple(events)


def _attention(sites: Sites, qparams: Any, recipe: Recipe) -> tuple[tuple[str, str | None], ...]:
    """Returns the sites without a parameter and the format `quantized(fn)` computes them in."""
    leaves = jax.tree.leaves(qparams, is_leaf=is_qtensor)
    # leaves quantized earlier may carry the rules of an earlier recipe
    carried = {q.contraction.attention for q in leaves if is_qtensor(q) and q.contraction.attention}
    rules = next(iter(carried)) if len(carried) == 1 else recipe.attention
    specs = [
        (site.key, attention_spec(rules, site.key)) for site in sites.sites if site.param is None
    ]
    return tuple((key, None if spec is None else spec.format.name) for key, spec in specs)


def _dtypes(qparams: Any, platforms: Sequence[str]) -> list[Event]:
    """Reports platforms that compute float contractions in another dtype than the model's."""
    leaves = [q for q in jax.tree.leaves(qparams, is_leaf=is_qtensor) if is_qtensor(q)]
    events = []
    for platform in platforms:
        for dtype in sorted({q.dtype for q in leaves if q.contraction.activations is None}):
            used_dtype, reason = compute_dtype(dtype, platform)
            if reason is not None:
                message = f"{dtype} contractions are computed in {used_dtype.name}: {reason}"
                events.append(Event("compute dtype", platform, "", message))
    return events
