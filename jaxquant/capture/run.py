"""`capture`: runs a function once per batch and gathers statistics of its activations."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any, Required, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.capture.batches import Alike, arguments, keywords_bound, lists_told, require_iterable
from jaxquant.capture.plan import Observing, Plan, observed_call, plan_of
from jaxquant.capture.progress import Progress
from jaxquant.capture.statistics import Statistics
from jaxquant.capture.storage import Path, described, require_folder
from jaxquant.interpret.calls import is_traced, trace_call
from jaxquant.observers import Observer
from jaxquant.qtensor import is_qtensor
from jaxquant.recipe import RecipeLike, as_recipe

_SAVE_EVERY = 5.0  # seconds


class CaptureKeywords(TypedDict, total=False):
    """The keywords of `capture`, for functions that pass them on."""

    batches: Required[Iterable[Any]]
    kwargs: Mapping[str, Any] | None
    resume: Statistics | Path | None
    save: Path | None
    progress: bool | None


class CaptureError(ValueError):
    """An unusable batch; `statistics` has the statistics of all batches before it."""

    def __init__(self, message: str, statistics: Statistics) -> None:
        super().__init__(message)
        self.statistics = statistics


def capture(
    fn: Callable[..., Any],
    params: Any,
    recipe: RecipeLike | Observer,
    *,
    batches: Iterable[Any],
    kwargs: Mapping[str, Any] | None = None,
    resume: Statistics | Path | None = None,
    save: Path | None = None,
    progress: bool | None = None,
) -> Statistics:
    """Runs `fn(params, *batch)` for every batch and gathers statistics of its activations.

    The observers of the recipe's rules see the operands of the contractions that those rules make
    static: the activation of a contraction with a parameter, both operands of one without
    (`attention=`). One compiled step per batch updates their states, in memory that does not grow
    with batches; the result of `fn` is not computed. In a `scan` over layers each layer has
    separate statistics; the steps of other loops share them.

    Args:
      fn: any traceable function whose first argument is a params pytree.
      params: its parameters, float; with `QTensor`s among them, `fn` computes as `quantized(fn)`.
      recipe: rules with `observer=`, or if there are none, rules whose encoders or rewrites look at
        inputs; or one observer, for all contractions.
      batches: any iterable, iterated once. A batch is a tuple of the arguments after params, or a
        single argument. All have the structure, shapes and dtypes of the first.
      kwargs: keyword arguments of `fn`, such as `{"train": False}`, the same for every batch.
      resume: statistics of an interrupted capture, or their file: the batches that they have seen
        are skipped, and the result equals that of one uninterrupted capture. If it is the file of
        `save`, it need not exist yet, so that the same command starts and resumes a capture.
      save: a file for the statistics, in a folder that exists: written every few seconds, at the
        end, and when an error ends the capture.
      progress: a progress bar, on standard error; by default if that is a terminal and the work
        takes more than a few seconds.

    Returns:
      The statistics, for `jaxquant.ptq(..., stats=...)`.

    Raises:
      CaptureError: a batch differs from the first, an activation is not finite, or no batch reaches
        some site; it has the statistics up to then.
      ValueError: there are no batches; no rule has an observer, or a rule with one matches no site;
        `resume` has statistics of other sites, or of more batches than there are.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> from jaxquant.observers import absmax
    >>> fn = lambda p, x: jnp.maximum(x @ p["up"], 0) @ p["down"]
    >>> params = {"up": 2 * jnp.eye(3), "down": jnp.eye(3)}
    >>> batches = (jnp.full((4, 3), v) for v in (1.0, -3.0))
    >>> print(capture(fn, params, absmax(), batches=batches))
    site  operand  observer  range    updates
    up    lhs      absmax()  -3 .. 3  2
    down  lhs      absmax()  -2 .. 2  2
    """
    return capture_with(
        *("capture", fn, params, (), recipe),
        batches=batches,
        kwargs=kwargs,
        resume=resume,
        save=save,
        progress=progress,
    )


def capture_with(
    where: str,
    fn: Callable[..., Any],
    params: Any,
    fixed: tuple[Any, ...],
    recipe: RecipeLike | Observing,
    *,
    batches: Iterable[Any],
    kwargs: Mapping[str, Any] | None = None,
    resume: Statistics | Path | None = None,
    save: Path | None = None,
    progress: bool | None = None,
) -> Statistics:
    """`capture` for a function `fn(params, *fixed, *batch)`; `where` names it in errors."""
    chosen = as_observing(recipe, where, params)
    if not callable(fn):
        raise ValueError(f"{where}: expected a function of params first, got {type(fn).__name__}")
    fn, _ = keywords_bound(fn, kwargs, where)
    if save is not None:
        require_folder(save, where)
    before = _before(resume, save)
    require_iterable(batches, where)
    total = len(batches) if isinstance(batches, Sized) else None
    run: _Run | None = None
    alike = Alike()
    # copy to the device once, not at every step
    arrays = [jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in _leaves((params, *fixed))]
    try:
        for index, batch in enumerate(batches):
            args = arguments(batch)
            difference = alike.difference(args)
            if run is None:
                with lists_told(args):
                    call = trace_call(fn, params, (*fixed, *args), {})
                plan = plan_of(call, chosen, where)
                if save is not None:
                    _require_storable(plan, where)
                run = _Run(where, plan, before, save, Progress(progress, total))
            if difference is not None:
                raise run.error(f"batch {index}: {difference}")
            run.feed(index, [*arrays, *_leaves(args)])
        if run is None:
            raise ValueError(f"{where}: no batches; expected at least one")
        run.require_complete(index + 1)
        return run.statistics()
    finally:
        if run is not None:
            run.close()


class _Run:
    """A capture in progress."""

    def __init__(
        self,
        where: str,
        plan: Plan,
        before: Statistics | None,
        save: Path | None,
        progress: Progress,
    ) -> None:
        self.where, self.plan, self.progress = where, plan, progress
        start = plan.start()
        if before is not None:
            plan.check(before, f"{where}: resume")
            start = before
        self.skip = self.batches = int(start.batches)
        # copies, each in a separate buffer, because the step donates its states
        self.states = {
            name: {k: jnp.array(v, copy=True) for k, v in seen.state.items()}
            for name, seen in start.entries.items()
        }
        self.entries, self.sites = start.entries, start.sites
        self.consts = plan.call.consts
        self.step = _step(plan)
        self.save = save
        self.saved = time.monotonic()

    def feed(self, index: int, leaves: list[Any]) -> None:
        """Runs the step on one batch, unless the resumed statistics include it."""
        self.progress.step()
        if index < self.skip:
            return
        self.states, bad = self.step(self.states, leaves, self.consts)
        indices = np.flatnonzero(jax.device_get(bad))
        if indices.size:
            raise self._not_finite(index, indices)
        self.batches += 1
        if self.save is not None and time.monotonic() - self.saved > _SAVE_EVERY:
            self.statistics().save(self.save)
            self.saved = time.monotonic()

    def error(self, message: str) -> CaptureError:
        """Returns the error for a problem after the batches so far."""
        file = "" if self.save is None else f" and in {os.fspath(self.save)!r}"
        return CaptureError(
            f"{self.where}: {message}; the statistics of {_counted(self.batches)} are kept in this "
            f"error's `statistics`{file}",
            self.statistics(),
        )

    def _not_finite(self, index: int, indices: np.ndarray) -> CaptureError:
        names = list(self.plan.observed)
        sites = [
            f"{key!r} ({operand})"
            for key, operands in self.sites
            for operand, entry in operands
            if entry in [names[i] for i in indices]
        ]
        first = names[indices[0]]
        key, operand = next((k, o) for k, ops in self.sites for o, e in ops if e == first)
        others = f", and thereby at {len(sites) - 1} more" if len(sites) > 1 else ""
        return self.error(
            f"batch {index}: NaN or infinity in the activation of {key!r} ({operand}){others}"
        )

    def statistics(self) -> Statistics:
        """Returns the statistics so far."""
        entries = {
            name: dataclasses.replace(seen, state=dict(self.states[name]))
            for name, seen in self.entries.items()
        }
        return Statistics(entries, self.batches, self.sites)

    def require_complete(self, count: int) -> None:
        """Raises if batches or updates of a site are missing at the end."""
        if count < self.skip:
            raise ValueError(
                f"{self.where}: resume holds statistics of {_counted(self.skip)}, and there "
                f"{'is' if count == 1 else 'are'} only {count}"
            )
        missing = self.statistics().unseen()
        if missing:
            raise self.error(
                f"no batch reaches {', '.join(missing)}; add samples that do, or put a rule "
                "without an observer in front"
            )

    def close(self) -> None:
        """Writes the file; also after an error, unless a failed step deleted its donated states."""
        self.progress.close()
        intact = not any(v.is_deleted() for v in jax.tree.leaves(self.states))
        if self.save is not None and intact and self.batches:
            self.statistics().save(self.save)


def batch_step(
    fn: Callable[..., Any], params: Any, args: tuple[Any, ...], recipe: Any
) -> Callable[[], list[bool]]:
    """Prepares the step of `capture` for one batch, to be repeated for timing.

    Returns:
      A function that runs the step and returns for each activation whether it was not finite.

    >>> import jax.numpy as jnp
    >>> from jaxquant.observers import absmax
    >>> batch_step(lambda p, x: x @ p, jnp.eye(2), (jnp.ones((1, 2)),), absmax())()
    [False]
    """
    plan = plan_of(trace_call(fn, params, args, {}), as_observing(recipe, "batch_step"), "capture")
    step, leaves = _step(plan), _leaves((params, *args))
    start = {name: seen.state for name, seen in plan.start().entries.items()}
    states = [jax.tree.map(lambda a: jnp.array(a, copy=True), start)]

    def again() -> list[bool]:
        states[0], bad = step(states[0], leaves, plan.call.consts)
        return np.asarray(jax.device_get(bad)).tolist()

    return again


def _step(plan: Plan) -> Callable[..., tuple[dict[str, Any], jax.Array]]:
    """Compiles the step: new states after one batch, and for each whether it saw NaN or infinity.

    If any did, all states stay unchanged.
    """

    def step(states: Any, leaves: list[Any], consts: list[Any]) -> Any:
        new = observed_call(plan, states, leaves, consts)[1]
        bad = jnp.stack([jnp.any(new[k]["bad"] > states[k]["bad"]) for k in new])
        # without a barrier XLA recomputes all flags for every array that depends on them
        fine = lax.optimization_barrier(~bad.any())
        return jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, states), bad

    return jax.jit(step, donate_argnums=0)


def _counted(batches: int) -> str:
    return f"{batches} batch{'' if batches == 1 else 'es'}"


def _leaves(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_qtensor) if is_traced(leaf)]


def as_observing(recipe: Any, where: str, params: Any = None) -> Observing:
    """Returns an observer or observers by path unchanged, and anything else as a recipe."""
    if isinstance(recipe, Mapping):
        return recipe
    if isinstance(recipe, Observer) and not isinstance(recipe, type):
        return recipe
    return as_recipe(recipe, where, params)


def _require_storable(plan: Plan, where: str) -> None:
    for _, observer in plan.observed.values():
        try:
            described(observer)
        except ValueError as error:
            raise ValueError(f"{where}: save: {error}") from None


def _before(resume: Statistics | Path | None, save: Path | None) -> Statistics | None:
    """Returns the statistics to resume from."""
    if not isinstance(resume, (str, os.PathLike)):
        return resume
    same = save is not None and os.path.abspath(resume) == os.path.abspath(save)
    if same and not os.path.exists(resume):
        return None
    return Statistics.load(resume)
