"""The state that the stages of a quantization pass on, and its options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict

import jax
from jax import Array

from jaxquant.capture import Statistics
from jaxquant.interpret.calls import Call
from jaxquant.interpret.sites import Sites
from jaxquant.params import Encoded, Plan
from jaxquant.ptq.saved import Path
from jaxquant.ptq.static import Divided
from jaxquant.qtensor import is_qtensor
from jaxquant.recipe import Recipe
from jaxquant.report import Report


class PTQKeywords(TypedDict, total=False):
    """The keywords of `jaxquant.ptq` that its Flax versions take as well."""

    kwargs: Mapping[str, Any] | None
    batches: Iterable[Any] | None
    stats: Statistics | Path | None
    key: Array | None
    platforms: str | Sequence[str] | None
    sequential: bool
    budget: int | None
    offload: bool
    progress: bool | None
    save: Path | None
    resume: Path | None


@dataclasses.dataclass(frozen=True)
class PTQOptions:
    """Options for quantizing layers with their inputs; see `jaxquant.ptq`."""

    sequential: bool = True
    budget: int | None = None
    offload: bool = False
    progress: bool | None = None
    save: Path | None = None
    resume: Path | None = None
    key: Array | None = None

    def __post_init__(self) -> None:
        if isinstance(self.budget, bool) or not isinstance(self.budget, int | None):
            raise ValueError(f"ptq: budget: expected a number of bytes, got {self.budget!r}")


@dataclasses.dataclass(frozen=True)
class State:
    """A quantization before, between and after its stages.

    Attributes:
      fn: the function of params and the arguments in a batch.
      params: its float params, changed by rewrites.
      recipe: the rules.
      call: `fn`, traced once.
      sites: its sites.
      planned: the result of `make_plans`: how each leaf is encoded, and general notes.
      batches: calibration samples, or `None`.
      stats: statistics of activations, or `None`.
      options: options for quantizing layers with their inputs.
      platforms: the platforms to check for missing dtypes.
      encoded: by path, leaves that are encoded with their inputs.
      absorbed: by path, notes on leaves that absorbed factors of others.
      divided: by path, per-channel factors that moved from an activation into a weight.
      qparams: quantized params, from the stage `encode` on.
      report: the report, from the stage `encode` on.
    """

    fn: Callable[..., Any]
    params: Any
    recipe: Recipe
    call: Call
    sites: Sites
    planned: tuple[list[Plan], list[str]]
    batches: Iterable[Any] | None
    stats: Statistics | None
    options: PTQOptions
    platforms: tuple[str, ...]
    encoded: Mapping[str, Encoded] = dataclasses.field(default_factory=dict)
    absorbed: Mapping[str, list[str]] = dataclasses.field(default_factory=dict)
    divided: Mapping[str, Divided] = dataclasses.field(default_factory=dict)
    qparams: Any = None
    report: Report = dataclasses.field(default_factory=lambda: Report(()))

    @property
    def observes(self) -> bool:
        """Whether some rule has an observer, so that activations are static."""
        return any(rule.observer is not None for rule in self.recipe.rules)

    @property
    def gathers(self) -> bool:
        """Whether some encoder or rewrite looks at the inputs of weights."""
        return any(rule.gathers is not None for rule in self.recipe.rules)

    @property
    def quantized_call(self) -> Call:
        """The call with the quantized params; tracing with float params covers them too."""
        return self.call.with_params(jax.tree.leaves(self.qparams, is_leaf=is_qtensor))
