"""`ptq`: a float params tree into a quantized one, by a recipe, with a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array

from jaxquant.interpret.calls import trace_call
from jaxquant.interpret.record import sites_of
from jaxquant.interpret.serve import serve
from jaxquant.numerics import compute_dtype
from jaxquant.params import quantize_params
from jaxquant.qtensor import is_qtensor
from jaxquant.recipe import Recipe
from jaxquant.report import Event, Report


def ptq(
    fn: Callable[..., Any],
    params: Any,
    recipe: Recipe,
    *args: Any,
    key: Array | None = None,
    platforms: Sequence[str] | None = None,
    **kwargs: Any,
) -> tuple[Any, Report]:
    """Quantizes the params of `fn(params, *args, **kwargs)` by a recipe.

    Sites come from tracing `fn` once; every leaf that a rule matches and a contraction or a
    lookup uses is encoded with one scale per kept index or group of contracted values. Nothing
    is run: `args` may be `jax.ShapeDtypeStruct`s.

    Args:
      fn: any traceable function whose first argument is a params pytree.
      params: its float parameters; the tree itself is not changed.
      recipe: rules on key paths, such as `jaxquant.w8a8()`.
      *args: the other arguments to trace with.
      key: PRNG key for encoders that round stochastically.
      platforms: platforms to check for missing dtypes, by default the current one.
      **kwargs: keyword arguments of `fn`.

    Returns:
      The quantized params, which `quantized(fn)` takes, and a report on every leaf.

    Raises:
      ValueError: a rule matches nothing, nothing is quantized, a leaf is not finite or cannot be
        quantized as its rule says, or `fn` does not fit `params`.

    >>> import jax, jax.numpy as jnp, jaxquant as jq
    >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    >>> up, down = (jax.random.normal(jax.random.key(s), (64, 64)) for s in (0, 1))
    >>> qparams, report = jq.ptq(
    ...     fn, {"up": up, "down": down}, jq.w4a16(group=32), jnp.ones((1, 64))
    ... )
    >>> report["up"].bits_per_weight
    5.0
    """
    call = trace_call(fn, params, args, kwargs)
    sites = sites_of(call)
    if not sites.sites:
        raise ValueError(
            "ptq: the function contracts nothing with its params, so there is nothing to quantize; "
            f"params: {', '.join(call.param_paths) or 'none'}"
        )
    qparams, report = quantize_params(params, recipe, sites=sites, key=key)
    events = _replay(fn, qparams, args, kwargs, recipe)
    return qparams, report.with_events([*events, *_dtypes(qparams, platforms)])


def _replay(
    fn: Callable[..., Any], qparams: Any, args: Sequence[Any], kwargs: Any, recipe: Recipe
) -> tuple[Event, ...]:
    """What `quantized(fn)` will report, found without running it."""
    call = trace_call(fn, qparams, tuple(args), kwargs)
    events: list[Event] = []

    def run(leaves: list[Any]) -> None:
        inner = dataclasses.replace(call, leaves=leaves)
        events[:] = serve(inner, recipe, audit=True)[1]

    jax.eval_shape(run, call.leaves)
    return tuple(events)


def _dtypes(qparams: Any, platforms: Sequence[str] | None) -> list[Event]:
    """Where a platform computes float contractions in another dtype than the model's."""
    leaves = [q for q in jax.tree.leaves(qparams, is_leaf=is_qtensor) if is_qtensor(q)]
    events = []
    for platform in platforms or (jax.default_backend(),):
        for dtype in sorted({q.dtype for q in leaves if q.use.activations is None}):
            instead, reason = compute_dtype(dtype, platform)
            if reason is not None:
                message = f"{dtype} contractions are computed in {instead.name}: {reason}"
                events.append(Event("compute dtype", platform, "", message))
    return events
