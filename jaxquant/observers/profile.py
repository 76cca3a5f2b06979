"""Everything a report on an activation needs, from one capture."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from jaxquant.observers.base import State, everywhere
from jaxquant.observers.histogram import Histogram


@dataclasses.dataclass(frozen=True, repr=False)
class Profile(Histogram):
    """The observer that `profile` makes.

    State: that of a histogram per tensor, and `channels`, float32 `[features]`, the largest
    magnitude at each index of the last axis.
    """

    name: ClassVar[str] = "profile"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axis is not None:
            raise ValueError(f"profile: expected axis=None (per tensor), got axis={self.axis!r}")

    def init(self, aval: Any) -> State:
        """See `Observer.init`."""
        return {**super().init(aval), "channels": jnp.zeros(aval.shape[-1:], jnp.float32)}

    def update(self, state: State, x: Array) -> State:
        """Counts the values and updates the ranges."""
        new = super().update(state, x)
        rows = tuple(range(x.ndim - 1))
        channels = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=rows, initial=0.0)
        channels = jnp.maximum(state["channels"], everywhere(channels))
        finite = new["bad"] == state["bad"]
        return {**new, "channels": jnp.where(finite, channels, state["channels"])}

    def merge(self, a: State, b: State) -> State:
        """Merges the histograms and takes the larger absmax of each channel."""
        channels = jnp.maximum(a["channels"], b["channels"])
        return {**super().merge(a, b), "channels": channels}


def profile(bins: int = 2048) -> Profile:
    """Observes a histogram, both ends and the absmax of each channel of the last axis at once.

    `finish` gives the range of `minmax`; `score` and `suggest` read the rest.

    Args:
      bins: a power of two; see `histogram`.

    >>> x = jnp.array([[1.0, -2.0], [3.0, 0.5]])
    >>> profile(bins=16).update(profile(bins=16).init(x), x)["channels"].tolist()
    [3.0, 2.0]
    """
    return Profile(None, bins)
