"""The training schedule: when rounding starts, with how many bits, and when ranges freeze."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Mapping

from jaxquant.numerics import FORMATS, Format
from jaxquant.qtensor import QSpec
from jaxquant.recipe import Recipe, Rule


@dataclasses.dataclass(frozen=True)
class Phase:
    """The computation from one step on.

    Attributes:
      start: the first step.
      recipe: the recipe to round by; `None` computes in float.
      frozen: whether BatchNorm uses its running statistics.
      bits: minimum bits of integer formats.
    """

    start: int
    recipe: Recipe | None
    frozen: bool
    bits: int = 0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Changes in the course of training, by the step that a `QuantState` counts.

    Attributes:
      start: the first step that rounds; before it, the function is computed in float, and observers
        follow its activations.
      bits: `(step, bits)` in ascending order, the first at `start`: from each step on, integer
        formats have at least that many bits. The last entry must not widen any format.
      freeze: the first step at which observed ranges no longer change; learned arrays still do (an
        optimizer's mask stops that).
      freeze_batchnorm: the first step at which BatchNorm uses its running statistics and no longer
        updates them, so that weights are trained as they are served.

    Raises:
      ValueError: a negative step; `bits` or ranges that end or freeze before `start`; steps that
        do not ascend; bits outside 2 to 8, or not descending.

    Source: rounding after a delay, and BatchNorm frozen towards the end: Krishnamoorthi,
    "Quantizing deep convolutional networks for efficient inference" (2018), section 3.2.

    >>> Schedule(start=100, bits=((100, 8), (300, 4)), freeze=500).starts
    (0, 100, 300)
    >>> Schedule(start=100, freeze=50)
    Traceback (most recent call last):
    ...
    ValueError: Schedule: ranges freeze at step 50, before rounding starts at step 100
    """

    start: int = 0
    bits: tuple[tuple[int, int], ...] = ()
    freeze: int | None = None
    freeze_batchnorm: int | None = None

    def __post_init__(self) -> None:
        entries = self.bits.items() if isinstance(self.bits, Mapping) else self.bits
        try:
            pairs = tuple((operator.index(s), operator.index(b)) for s, b in entries)
            object.__setattr__(self, "bits", pairs)
        except TypeError:
            raise ValueError(
                "Schedule: bits: expected pairs of step and bits, as ((0, 8), (1000, 4)), "
                f"got {self.bits!r}"
            ) from None
        for name in ("start", "freeze", "freeze_batchnorm"):
            step = getattr(self, name)
            if step is None and name != "start":
                continue
            integral = hasattr(step, "__index__") and not isinstance(step, bool)
            if not integral or operator.index(step) < 0:
                raise ValueError(f"Schedule: {name}: expected a step, 0 or more, got {step!r}")
            object.__setattr__(self, name, operator.index(step))
        if self.freeze is not None and self.freeze < self.start:
            raise ValueError(
                f"Schedule: ranges freeze at step {self.freeze}, before rounding starts at step "
                f"{self.start}"
            )
        steps, widths = [s for s, _ in self.bits], [b for _, b in self.bits]
        if any(b <= a for a, b in itertools.pairwise(steps)):
            raise ValueError(f"Schedule: bits: expected steps that ascend, got {self.bits}")
        if any(not 2 <= b <= 8 for b in widths):
            raise ValueError(f"Schedule: bits: expected 2 to 8 bits, got {self.bits}")
        if any(b >= a for a, b in itertools.pairwise(widths)):
            raise ValueError(f"Schedule: bits: expected fewer bits at each step, got {self.bits}")
        if steps and steps[-1] < self.start:
            raise ValueError(
                f"Schedule: bits end at step {steps[-1]}, before rounding starts at step "
                f"{self.start}"
            )
        if steps and steps[0] != self.start:
            raise ValueError(
                f"Schedule: bits: expected the first at step {self.start}, where rounding starts, "
                f"got {self.bits}"
            )

    @property
    def starts(self) -> tuple[int, ...]:
        """The first step of each phase, beginning with 0."""
        marks = {0, self.start, *(s for s, _ in self.bits if s > self.start)}
        marks |= set() if self.freeze_batchnorm is None else {self.freeze_batchnorm}
        return tuple(sorted(marks))

    def phases(self, recipe: Recipe) -> tuple[Phase, ...]:
        """The phases of training by a recipe.

        Raises:
          ValueError: the last of `bits` exceeds the bits of a format of the recipe, or no format
            has fewer than the first; `freeze` without an observer.
        """
        if self.freeze is not None and all(rule.observer is None for rule in recipe):
            raise ValueError(
                f"Schedule: freeze={self.freeze}: the recipe has no observer whose ranges could "
                "freeze"
            )
        if self.bits and widened(recipe, self.bits[0][1]).rules == recipe.rules:
            raise ValueError(
                f"Schedule: bits={self.bits}: no integer format of the recipe has fewer bits"
            )
        if self.bits:
            last = self.bits[-1][1]
            narrow = min(
                (s.format.bits for rule in recipe for s in _specs(rule) if s.format.is_integer),
                default=8,
            )
            if last > narrow:
                raise ValueError(
                    f"Schedule: bits end at {last}, and the recipe has {narrow}: what is trained "
                    f"would not be what is served; add ({self.bits[-1][0] + 1}, {narrow}) or later"
                )
        return tuple(self._phase(step, recipe) for step in self.starts)

    def _phase(self, step: int, recipe: Recipe) -> Phase:
        frozen = self.freeze_batchnorm is not None and step >= self.freeze_batchnorm
        if step < self.start:
            return Phase(step, None, frozen)
        bits = [0, *(b for s, b in self.bits if s <= step)][-1]
        return Phase(step, widened(recipe, bits), frozen, bits)


def _specs(rule: Rule) -> list[QSpec]:
    specs = (rule.weights, rule.activations, rule.attention, rule.lookup)
    return [spec for spec in specs if spec is not None]


def widened(recipe: Recipe, bits: int) -> Recipe:
    """The recipe with integer formats widened to at least `bits` bits.

    >>> import jaxquant as jq
    >>> widened(jq.w4a8(), 6).rules[0].weights.format.name
    'int6'
    """
    if not bits:
        return recipe
    rules = [
        dataclasses.replace(
            rule,
            weights=wide(rule.weights, bits),
            activations=wide(rule.activations, bits),
            attention=wide(rule.attention, bits),
            lookup=wide(rule.lookup, bits),
        )
        for rule in recipe
    ]
    return Recipe(rules, recipe.name, recipe.added)


def wide(spec: QSpec | None, bits: int) -> QSpec | None:
    """The spec with its integer format widened to at least `bits` bits."""
    if spec is None or not spec.format.is_integer or spec.format.bits >= bits:
        return spec
    fmt = FORMATS[f"{'' if spec.format.signed else 'u'}int{bits}"]
    assert isinstance(fmt, Format)
    return dataclasses.replace(spec, format=fmt)
