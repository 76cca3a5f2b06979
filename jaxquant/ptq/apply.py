"""`ptq`: quantizes a float params tree by a recipe and reports on it."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax import Array

from jaxquant.capture import Statistics, arguments
from jaxquant.capture.batches import Alike, keywords_bound, lists_told, require_iterable
from jaxquant.interpret.calls import trace_call
from jaxquant.interpret.record import sites_of
from jaxquant.interpret.sites import path_str
from jaxquant.params import make_plans
from jaxquant.ptq.stages import STAGES
from jaxquant.ptq.state import PTQOptions, State
from jaxquant.qtensor import is_qtensor
from jaxquant.recipe import Recipe, RecipeLike, as_recipe
from jaxquant.report import Report, shown

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def ptq(
    fn: Callable[..., Any],
    params: Any,
    recipe: RecipeLike,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    batches: Iterable[Any] | None = None,
    stats: Statistics | str | os.PathLike[str] | None = None,
    key: Array | None = None,
    platforms: str | Sequence[str] | None = None,
    sequential: bool = True,
    budget: int | None = None,
    offload: bool = False,
    progress: bool | None = None,
    save: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> tuple[Any, Report]:
    """Quantizes the params of `fn(params, *args, **kwargs)` by a recipe.

    Sites come from tracing `fn` once; every leaf that a rule matches and a contraction or a
    lookup uses is encoded with one scale per kept index or group of contracted values. Without
    `batches` nothing is run: `args` may be `jax.ShapeDtypeStruct`s.

    Rules with an `observer` make activations static: their ranges come from running `fn` on every
    batch, or from `stats`. If they also have `requantize`, results stay integers from one
    contraction to the next; `report.edges` lists where.

    Encoders and rewrites that look at inputs (`gptq`, `awq`, `smoothquant`) need samples as well.
    By default layers are quantized in execution order, each with the inputs it receives when all
    earlier layers compute with quantized weights: the function is cut in front of each layer, and
    the values that cross a cut are kept for all batches. Layers of a `scan` are processed one by
    one. Parameters used by several sites or in other loops are quantized beforehand, with inputs
    of the float function. Activations stay float during this calibration.

    Args:
      fn: any traceable function whose first argument is a params pytree.
      params: its float parameters; the tree itself is not changed.
      recipe: rules on key paths, such as `jaxquant.w8a8()`; or one rule, or a sequence of rules.
      *args: the other arguments to trace with; by default those of the first batch.
      kwargs: keyword arguments of `fn`, such as `{"train": False}`, for every call of it.
      batches: calibration samples, each the tuple of `fn`'s arguments after the params (or the one
        argument); any iterable, gone through once.
      stats: statistics from `jaxquant.capture` with the observers of this recipe, or their file;
        instead of `batches`.
      key: PRNG key for encoders that round stochastically.
      platforms: platforms to check for missing dtypes: `cpu`, `cuda`, `rocm` and `tpu` (`gpu` is
        `cuda` and `rocm`); by default the current one.
      sequential: quantize layers in order; `False` gathers statistics of all layers of the float
        function, in as many passes over the batches as the budget requires.
      budget: bytes of input statistics in memory at once; 1 GiB by default.
      offload: keep activations in the host's memory between layers, not on the device.
      progress: a progress bar, on standard error; by default if that is a terminal and the work
        takes more than a few seconds.
      save: a folder that receives each layer once it is quantized with its inputs.
      resume: a folder that `save` wrote, to continue from: the result equals that of an
        uninterrupted run bit for bit. It may be the folder of `save` and need not exist then.

    Returns:
      The quantized params, for `quantized(fn)`, and a report on every leaf.

    Raises:
      ValueError: `recipe` is not a recipe, a platform is unknown, a rule matches nothing, nothing
        is quantized, a leaf is not finite or its rule does not apply to it, or `fn` does not fit
        `params`; a rule has an observer and there are neither batches nor statistics, or the
        statistics are of another model or observer; `jaxquant.capture` raises.

    >>> import jax, jax.numpy as jnp, jaxquant as jq
    >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    >>> up, down = (jax.random.normal(jax.random.key(s), (64, 64)) for s in (0, 1))
    >>> qparams, report = jq.ptq(
    ...     fn, {"up": up, "down": down}, jq.w4a16(group=32), jnp.ones((1, 64))
    ... )
    >>> report["up"].bits_per_weight
    5.0
    """
    recipe = as_recipe(recipe, "ptq", params)
    names = _named(platforms)
    if not callable(fn):
        raise ValueError(f"ptq: expected a function of params first, got a {type(fn).__name__}")
    _check_calibration(recipe, batches, stats)
    if isinstance(stats, (str, os.PathLike)):
        stats = Statistics.load(stats)
    fn, kwargs = keywords_bound(fn, kwargs, "ptq", bind=batches is not None)
    trace_args = args
    if batches is not None:
        args, batches = _first(args, batches)
    with lists_told(args if batches is not None else ()):
        call = trace_call(fn, params, args, kwargs)
    sites = sites_of(call)
    if not sites.sites:
        raise ValueError(
            "ptq: the function contracts nothing with its params, so there is nothing to quantize; "
            f"params: {', '.join(map(shown, call.param_paths)) or 'none'}"
        )
    flat = jax.tree.leaves_with_path(params, is_leaf=is_qtensor)
    planned = make_plans([(path_str(path), leaf) for path, leaf in flat], recipe, sites)
    options = PTQOptions(sequential, budget, offload, progress, save, resume, key)
    state = State(fn, params, recipe, call, sites, planned, batches, stats, options, names)
    if state.gathers and batches is not None:
        batches = list(batches)
        if batches and trace_args:
            _require_alike(trace_args, batches)
        state = dataclasses.replace(state, batches=batches)
    for stage in STAGES:
        state = stage(state)
    return state.qparams, state.report


def _check_calibration(recipe: Recipe, batches: Any, stats: Any) -> None:
    observes = any(rule.observer is not None for rule in recipe.rules)
    gathers = any(rule.gathers is not None for rule in recipe.rules)
    names = [name for name, x in (("batches", batches), ("stats", stats)) if x is not None]
    if len(names) == 2:
        raise ValueError("ptq: give batches or stats, not both")
    if (observes or gathers) and not names:
        kind = "an observer" if observes else "an encoder or a rewrite that looks at inputs"
        raise ValueError(
            f"ptq: the recipe has {kind}, so it needs calibration samples: pass batches=[...], or "
            "stats= from jaxquant.capture"
        )
    if names and not (observes or gathers):
        raise ValueError(
            f"ptq: {names[0]} given, but no rule of the recipe has an observer that would look at "
            "them; activations are quantized at run time"
        )
    if observes and gathers and stats is not None:
        raise ValueError(
            "ptq: some rules have an observer and others look at inputs, so give batches, not "
            "stats: ranges are found after rewrites, with quantized weights"
        )


def _first(args: tuple[Any, ...], batches: Any) -> tuple[tuple[Any, ...], Iterable[Any]]:
    """Returns the arguments to trace with, and all batches."""
    require_iterable(batches, "ptq")
    if args:
        return args, batches
    walk = iter(batches)  # only once: a loader may restart at each iter()
    first = list(itertools.islice(walk, 1))
    if not first:
        raise ValueError("ptq: no batches; expected at least one")
    if not isinstance(batches, Sequence):
        batches = itertools.chain(first, walk)
    return arguments(first[0]), batches


def _require_alike(args: tuple[Any, ...], batches: Sequence[Any]) -> None:
    alike = Alike()
    alike.difference(arguments(batches[0]))
    difference = alike.difference(args)
    if difference is not None:
        raise ValueError(
            f"ptq: arguments to trace with: {difference}; where a rule looks at inputs they must "
            "match the batches: leave them out"
        )


def _named(platforms: str | Sequence[str] | None) -> tuple[str, ...]:
    if platforms is None:
        return (jax.default_backend(),)
    given = (platforms,) if isinstance(platforms, str) else tuple(platforms)
    names = [n for name in given for n in (("cuda", "rocm") if name == "gpu" else (name,))]
    for name in names:
        if name not in _PLATFORMS:
            raise ValueError(
                f"ptq: platforms: unknown platform {name!r}; known: {', '.join(_PLATFORMS)}, "
                "and gpu for cuda and rocm"
            )
    return tuple(dict.fromkeys(names))
