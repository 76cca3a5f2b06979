"""Training loops that stop at a loss which is not finite, and their curves as a picture."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure


class NonFiniteLoss(RuntimeError):
    """A loss was infinite or NaN.

    Attributes:
      step: the step that found it, from 0.
      state: the newest state whose loss was finite.
      losses: of the steps before.
    """

    def __init__(self, name: str, step: int, loss: float, state: Any, losses: list[float]) -> None:
        super().__init__(f"{name}: the loss of step {step} is {loss}; training stops")
        self.step, self.state, self.losses = step, state, losses


def run_steps(
    name: str,
    step: Callable[..., tuple[Any, jax.Array]],
    state: Any,
    batches: Iterable[tuple[Any, ...]],
    step_done: Callable[[float], Any] = lambda loss: None,
) -> tuple[Any, list[float]]:
    """The state after all batches, and each step's loss.

    A loss belongs to the state that went into its step. One that is not finite so condemns that
    state, and the one before it is kept; the last state is looked at itself.

    Args:
      name: of what is trained, for errors.
      step: `(state, *batch)` to the next state and the loss; its arguments are not donated.
      state: where to begin.
      batches: the arguments of each step.
      step_done: told of each loss.

    Raises:
      NonFiniteLoss: a loss is not finite, or the last state is not.
    """
    good, losses, loss = state, [], float("nan")
    for batch in batches:
        new, found = step(state, *batch)
        loss = float(found)
        if not np.isfinite(loss):
            raise NonFiniteLoss(name, len(losses), loss, good, losses)
        losses.append(loss)
        good, state = state, new
        step_done(loss)
    if not _all_finite(state):
        raise NonFiniteLoss(name, len(losses), float("nan"), good, losses)
    return state, losses


def _all_finite(tree: Any) -> bool:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    return all(bool(jnp.isfinite(x).all()) for x in floats)


def save_state(path: pathlib.Path, state: Any) -> None:
    """The arrays of a pytree as `.npz`, each under its key path."""
    flat, _ = jax.tree.flatten_with_path(state)
    arrays = {}
    for keys, leaf in flat:
        is_key = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
        arrays[jax.tree_util.keystr(keys)] = jax.random.key_data(leaf) if is_key else leaf
    with path.open("wb") as file:
        np.savez(file, **{name: np.asarray(array) for name, array in arrays.items()})


def smoothed(losses: Sequence[float], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean of the `width` losses up to each; fewer losses give their mean."""
    width = max(1, min(width, len(losses)))
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(losses, np.float64))])
    return np.arange(width, len(losses) + 1), (sums[width:] - sums[:-width]) / width


def panels(count: int, columns: int, title: str) -> tuple[Figure, list[Axes]]:
    """A figure with as many panels, left to right; it needs no display."""
    rows = -(-count // columns)
    figure = Figure(figsize=(4.4 * columns, 3.4 * rows), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=13)
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


def draw_losses(
    axes: Axes, curves: Mapping[str, Sequence[float]], title: str, width: int, ylabel: str
) -> None:
    """Training losses of several variants in one panel, each a mean over `width` steps."""
    for name, losses in curves.items():
        axes.plot(*smoothed(losses, width), label=name, linewidth=1.6)
    axes.set(title=title, xlabel="step", ylabel=ylabel)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.margins(y=0.12 * len(curves))  # room for the names
        axes.legend(loc="upper right", framealpha=0.7, edgecolor="none")
