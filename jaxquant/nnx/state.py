"""A `QuantState` as variables of an NNX module."""

from __future__ import annotations

from typing import Any

from flax import nnx

from jaxquant.qat import QuantState


class LearnedParam(nnx.Param[Any]):
    """A learned value of an estimator: a parameter to optimizers and to `nnx.grad`."""


class QuantStat(nnx.Variable[Any]):
    """State that is not learned, like an `nnx.BatchStat`: constants, ranges, step, key."""


class QuantVariables(nnx.Module):
    """The arrays of a `QuantState` as variables, in nested `nnx.Dict`s with its names.

    In evaluation mode (`eval`, or `use_running_average=True` as for a BatchNorm) they are only
    read.

    Attributes:
      learned: `LearnedParam`s.
      constants: `QuantStat`s, as are `ranges`, `step` and `key`.
      ranges: states of observers.
      step: number of calls in training mode.
      key: data of a PRNG key.
      layout: static layout of the state.
      use_running_average: whether this is evaluation mode.
    """

    def __init__(self, state: QuantState) -> None:
        self.learned = _variables(state.learned, LearnedParam)
        self.constants = _variables(state.constants, QuantStat)
        self.ranges = _variables(state.ranges, QuantStat)
        self.step = QuantStat(state.step)
        self.key = QuantStat(state.key)
        self.layout = state.layout
        self.use_running_average = False

    def state(self) -> QuantState:
        """Returns the variables as a `QuantState`, as functions take it."""
        return QuantState(
            _arrays(self.learned),
            _arrays(self.constants),
            _arrays(self.ranges),
            self.step.get_raw_value(),
            self.key.get_raw_value(),
            self.layout,
        )

    def moved_on(self, state: QuantState) -> None:
        """Stores the step and ranges after a call, unless in evaluation mode."""
        if self.use_running_average:
            return
        self.step.set_value(state.step)
        _assign(self.ranges, state.ranges)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Used by `nnx.view`.

        Args:
          use_running_average: whether the state is only read.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


def _variables(tree: Any, kind: type[nnx.Variable[Any]]) -> Any:
    if isinstance(tree, dict):
        return nnx.Dict({name: _variables(value, kind) for name, value in tree.items()})
    return kind(tree)


def _arrays(tree: Any) -> Any:
    if isinstance(tree, nnx.Dict):
        return {name: _arrays(tree[name]) for name in tree}
    return tree.get_raw_value()


def _assign(tree: Any, values: Any) -> None:
    if not isinstance(tree, nnx.Dict):
        tree.set_value(values)
        return
    for name in tree:
        _assign(tree[name], values[name])
