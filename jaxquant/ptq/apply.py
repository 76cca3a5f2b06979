"""`ptq`: a float params tree into a quantized one, by a recipe, with a report."""

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

    Where rules have an `observer`, activations are static: `fn` is run on every batch to find
    their ranges, or `stats` brings them. Where they also have `requantize`, results stay integers
    from one contraction to the next, and `report.edges` tells where.

    Where rules have an encoder or a rewrite that looks at inputs (`gptq`, `awq`, `smoothquant`),
    samples are needed as well. By default layers are quantized in the order of execution, each by
    the inputs that arrive when all before it compute with their quantized weights: the function is
    cut in front of them, and what the parts hand on is kept for all batches. Layers of a `scan` are
    walked one by one. Parameters that several sites use, or that other loops use, are quantized
    beforehand by inputs of the float function. Activations stay float throughout.

    Args:
      fn: any traceable function whose first argument is a params pytree.
      params: its float parameters; the tree itself is not changed.
      recipe: rules on key paths, such as `jaxquant.w8a8()`; a rule or several make one.
      *args: the other arguments to trace with; by default those of the first batch.
      kwargs: keyword arguments of `fn`, such as `{"train": False}`, for every call of it.
      batches: calibration samples, each the tuple of `fn`'s arguments after the params (or the one
        argument); any iterable, gone through once.
      stats: what `jaxquant.capture` found with the observers of this recipe, or the file it is in;
        in place of `batches`.
      key: PRNG key for encoders that round stochastically.
      platforms: platforms to check for missing dtypes, of `cpu`, `cuda`, `rocm` and `tpu` (`gpu` is
        both of the middle); by default the current one.
      sequential: quantize layers in order; `False` gathers statistics of all at once, of the float
        function, in as many passes over the batches as the budget asks for.
      budget: bytes of statistics of inputs held at once; 1 GiB by default.
      offload: keep activations in the host's memory between layers, not on the device.
      progress: a progress bar, on standard error; by default if that is a terminal and the work
        takes more than a few seconds.
      save: a folder to keep every layer in once it is quantized by its inputs.
      resume: such a folder, to go on from: the result is that of one uninterrupted run, bit for
        bit. It may be that of `save`, which then need not exist yet.

    Returns:
      The quantized params, which `quantized(fn)` takes, and a report on every leaf.

    Raises:
      ValueError: `recipe` is none, a platform is unknown, a rule matches nothing, nothing is
        quantized, a leaf is not finite or cannot be quantized as its rule says, or `fn` does not
        fit `params`; a rule has an observer and there are neither batches nor statistics, or
        statistics of another model or by another observer; what `jaxquant.capture` refuses.

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
    given = args
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
        if batches and given:
            _require_alike(given, batches)
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
        what = "an observer" if observes else "an encoder or a rewrite that looks at inputs"
        raise ValueError(
            f"ptq: the recipe has {what}, so it needs calibration samples: pass batches=[...], or "
            "stats= from jaxquant.capture"
        )
    if names and not (observes or gathers):
        raise ValueError(
            f"ptq: {names[0]} given, but no rule of the recipe has an observer that would look at "
            "them; activations are quantized at run time"
        )
    if observes and gathers and stats is not None:
        raise ValueError(
            "ptq: with rules that have an observer and others that look at inputs, give "
            "batches, not stats: ranges are those of activations as rewrites and quantized "
            "weights leave them"
        )


def _first(args: tuple[Any, ...], batches: Any) -> tuple[tuple[Any, ...], Iterable[Any]]:
    """Arguments to trace with, and all batches."""
    require_iterable(batches, "ptq")
    if args:
        return args, batches
    walk = iter(batches)  # once: a loader may start afresh each time
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
            f"ptq: arguments to trace with: {difference}; where a rule looks at inputs they are "
            "those of the batches: leave them out"
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
