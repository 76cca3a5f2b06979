"""Observers that store only ranges: absmax, min-max, moving average.

They use `jnp.min` and `jnp.max`: one variadic `lax.reduce` for both ends is up to 15 times slower
on XLA's CPU backend, which does not vectorize it. A table of times is in `histogram.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxquant.observers.base import (
    Axis,
    Range,
    State,
    as_range,
    counted,
    counted_both,
    ends,
    everywhere,
    kept_shape,
    no_updates,
    other_axes,
    require_seen,
)
from jaxquant.qtensor import QSpec, magnitude


@dataclasses.dataclass(frozen=True, repr=False)
class AbsMax(Axis):
    """The observer that `absmax` makes. State: `amax`, float32 in the shape of the kept axes."""

    name: ClassVar[str] = "absmax"

    def init(self, aval: Any) -> State:
        """See `Observer.init`."""
        return {"amax": jnp.zeros(kept_shape(self.axis, aval.shape), jnp.float32), **no_updates()}

    def update(self, state: State, x: Array) -> State:
        """`amax <- max(amax, max |x|)`."""
        x = magnitude(x.astype(jnp.float32))
        amax = everywhere(jnp.max(x, axis=other_axes(self.axis, x.shape), initial=0.0))
        finite = jnp.isfinite(amax).all()
        amax = jnp.where(finite, jnp.maximum(state["amax"], amax), state["amax"])
        return {"amax": amax, **counted(state, finite)}

    def merge(self, a: State, b: State) -> State:
        """The larger `amax`."""
        return {"amax": jnp.maximum(a["amax"], b["amax"]), **counted_both(a, b)}

    def range(self, state: State) -> Range:
        """`[-amax, amax]` so far; traceable."""
        return Range(-state["amax"], state["amax"])

    def finish(self, state: State, spec: QSpec) -> Range:
        """`[-amax, amax]`, for every spec."""
        require_seen(state)
        amax = np.asarray(state["amax"])
        return as_range(-amax, amax)


@dataclasses.dataclass(frozen=True, repr=False)
class MinMax(Axis):
    """The observer that `minmax` makes. State: `min` and `max`, float32, shaped as kept axes."""

    name: ClassVar[str] = "minmax"

    def init(self, aval: Any) -> State:
        """See `Observer.init`."""
        zeros = jnp.zeros(kept_shape(self.axis, aval.shape), jnp.float32)
        return {"min": zeros, "max": zeros, **no_updates()}

    def update(self, state: State, x: Array) -> State:
        """`min <- min(min, min x)`, `max` likewise; both include 0."""
        low, high, finite = ends(x.astype(jnp.float32), other_axes(self.axis, x.shape))
        return {
            "min": jnp.where(finite, jnp.minimum(state["min"], low), state["min"]),
            "max": jnp.where(finite, jnp.maximum(state["max"], high), state["max"]),
            **counted(state, finite),
        }

    def merge(self, a: State, b: State) -> State:
        """The union of both ranges."""
        low, high = jnp.minimum(a["min"], b["min"]), jnp.maximum(a["max"], b["max"])
        return {"min": low, "max": high, **counted_both(a, b)}

    def range(self, state: State) -> Range:
        """`[min, max]` so far; traceable."""
        return Range(state["min"], state["max"])

    def finish(self, state: State, spec: QSpec) -> Range:
        """`[min, max]`."""
        require_seen(state)
        return as_range(state["min"], state["max"])


@dataclasses.dataclass(frozen=True, repr=False)
class MovingAverage(Axis):
    """The observer that `moving_average` makes. State: uncorrected averages `low` and `high`.

    Attributes:
      decay: `d`, at least 0 and less than 1.
    """

    name: ClassVar[str] = "moving_average"

    decay: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise ValueError(f"moving_average: expected 0 <= decay < 1, got {self.decay}")

    def init(self, aval: Any) -> State:
        """See `Observer.init`."""
        zeros = jnp.zeros(kept_shape(self.axis, aval.shape), jnp.float32)
        return {"low": zeros, "high": zeros, **no_updates()}

    def update(self, state: State, x: Array) -> State:
        """`v <- d v + (1 - d) min x`, likewise for the maximum."""
        low, high, finite = ends(x.astype(jnp.float32), other_axes(self.axis, x.shape))
        new = {"low": low, "high": high}
        for name, end in new.items():
            # barrier: for d = 1/2 XLA would add before it multiplies, which may overflow
            faded, end = lax.optimization_barrier(
                (self.decay * state[name], (1 - self.decay) * end)
            )
            new[name] = jnp.where(finite, faded + end, state[name])
        return {**new, **counted(state, finite)}

    def merge(self, a: State, b: State) -> State:
        """`v <- d^n_b v_a + v_b`, `n_b` the number of finite updates of `b`."""
        later = (b["updates"] - b["bad"]).astype(jnp.float32)
        faded = jnp.power(jnp.float32(self.decay), later)
        faded = faded.reshape(later.shape + (1,) * (a["low"].ndim - later.ndim))
        new = {name: faded * a[name] + b[name] for name in ("low", "high")}
        return {**new, **counted_both(a, b)}

    def range(self, state: State) -> Range:
        """`v / (1 - d^n)` at each end so far, `n` the number of finite updates; traceable."""
        count = (state["updates"] - state["bad"]).astype(jnp.float32)
        weight = 1 - jnp.power(jnp.float32(self.decay), count)
        weight = jnp.where(count > 0, weight, 1.0)
        weight = weight.reshape(count.shape + (1,) * (state["low"].ndim - count.ndim))
        return Range(state["low"] / weight, state["high"] / weight)

    def finish(self, state: State, spec: QSpec) -> Range:
        """`v / (1 - d^n)` at each end."""
        require_seen(state)
        weight = 1 - float(self.decay) ** int(state["updates"])
        low, high = (np.asarray(state[name], np.float64) / weight for name in ("low", "high"))
        return as_range(low, high)


def absmax(axis: int | tuple[int, ...] | None = None) -> AbsMax:
    """Observes the largest magnitude: `range = [-max |x|, max |x|]`.

    Args:
      axis: axes with separate ranges; `None`: one range per tensor.

    >>> x = jnp.array([[1.0, -2.0], [3.0, 0.5]])
    >>> observer = absmax(axis=-1)
    >>> observer.finish(observer.update(observer.init(x), x), QSpec("int8")).high.tolist()
    [3.0, 2.0]
    """
    return AbsMax(axis)


def minmax(axis: int | tuple[int, ...] | None = None) -> MinMax:
    """Observes both ends: `range = [min(x, 0), max(x, 0)]`.

    Args:
      axis: axes with separate ranges; `None`: one range per tensor.

    >>> x = jnp.array([1.0, -2.0, 3.0])
    >>> range = minmax().finish(minmax().update(minmax().init(x), x), QSpec("int8"))
    >>> float(range.low), float(range.high)
    (-2.0, 3.0)
    """
    return MinMax(axis)


def moving_average(decay: float = 0.9, axis: int | tuple[int, ...] | None = None) -> MovingAverage:
    """Averages the ends of the batches, with more weight on later batches.

    After batches `1 ... n`, `low = (1 - d) sum_i d^(n - i) min(x_i) / (1 - d^n)`, and `high`
    likewise: an exponential moving average, corrected for its start as in Adam. Shards count in
    the order of merging; the result is that of one pass up to float rounding.

    Args:
      decay: `d`, at least 0 (the last batch alone) and less than 1.
      axis: axes with separate ranges; `None`: one range per tensor.

    Raises:
      ValueError: `decay` outside that interval.

    Sources: the correction, Kingma and Ba, "Adam" (2015), section 3; ranges averaged over batches,
    Jacob et al. (arXiv 1712.05877), section 3.1.

    >>> observer = moving_average(decay=0.5)
    >>> state = observer.init(jnp.zeros(1))
    >>> for batch in (jnp.array([4.0]), jnp.array([1.0])):
    ...     state = observer.update(state, batch)
    >>> observer.finish(state, QSpec("int8")).high.tolist()
    2.0
    """
    return MovingAverage(axis, decay)
