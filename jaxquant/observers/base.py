"""What an observer is: a monoid that gathers the range of an array over many batches."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant.qtensor import QSpec
from jaxquant.qtensor.scales import scales_of_range

State = dict[str, Array]


class Range(NamedTuple):
    """The values to be represented: `[low, high]`, with `low <= 0 <= high`.

    Attributes:
      low, high: float32, `[]` per tensor, or of the shape of the axes kept.
    """

    low: Array
    high: Array


@runtime_checkable
class Observer(Protocol):
    """A hashable value (a frozen dataclass) that gathers statistics of one array.

    `init` is the identity of `merge`, `merge` is associative, and a pass over shards that are
    merged gives what one pass over all of them gives: exactly, except for the float rounding of
    `moving_average`. Memory is constant however many batches come.

    A state is a flat dict of arrays of fixed shapes and dtypes, among them

    - `updates`, int32 `[]`: how many updates it has seen;
    - `bad`, int32 `[]`: how many of those held NaN or infinity, and so changed nothing else.

    States of several layers may be stacked along leading axes: `merge` takes them as they are,
    `finish_stacked` finishes them one by one.

    Attributes:
      axis: the axes of the array that have ranges of their own ("per channel"); `None`: per tensor.
    """

    @property
    def axis(self) -> int | tuple[int, ...] | None:
        """See above."""
        ...

    @property
    def sees_rows(self) -> bool:
        """Whether it is given activations as rows of the matrix that a weight is multiplied by."""
        return False

    def init(self, aval: Any) -> State:
        """The state before any update, for arrays that have the `shape` of `aval`."""
        ...

    def update(self, state: State, x: Array) -> State:
        """The state after one more array `x` of any float dtype; may be traced."""
        ...

    def merge(self, a: State, b: State) -> State:
        """The state after what `a` has seen, then what `b` has seen; may be traced."""
        ...

    def finish(self, state: State, spec: QSpec) -> Range:
        """The range with which `spec` is to quantize; on concrete states only.

        Raises:
          ValueError: no update was seen, or one that was not finite.
        """
        ...


def range_to_scale(range: Range, spec: QSpec) -> tuple[Array, Array | None]:
    """The scale and zero point with which `spec` represents a range, by the rules of `quantize`.

    Symmetric: `S = max(-low, high) / (qmax + 1/2)`, or by the spec's other rules. Asymmetric:
    `S = (high - low) / (2^b - 1)`, `Z = qmin - round(low / S)`.

    Args:
      range: float32 arrays of one shape.
      spec: format and range rule; its granularity is not looked at.

    Returns:
      `(scale, zero point)` of that shape, float32 and int32; `None` for a symmetric spec.

    >>> scale, zero = range_to_scale(
    ...     Range(jnp.float32(-1.0), jnp.float32(4.0)), QSpec("uint8", symmetric=False)
    ... )
    >>> round(float(scale), 4), int(zero)
    (0.0196, 51)
    """
    return _to_scale(range, spec)


# Compiled as `quantize` is, so that both round alike; a pass over candidates is one call, too.
@functools.partial(jax.jit, static_argnums=1)
def _to_scale(range: Range, spec: QSpec) -> tuple[Array, Array | None]:
    low, high = (jnp.asarray(v, jnp.float32) for v in range)
    scale, zero, total = scales_of_range(low, high, jnp.maximum(-low, high), spec)
    scale = scale.astype(jnp.float32)
    if total is not None:
        scale = scale * total
    return scale, None if zero is None else zero.astype(jnp.int32)


def finish_stacked(observer: Observer, state: State, spec: QSpec, lead: int) -> Range:
    """`observer.finish` on each of the states stacked along `lead` leading axes.

    Args:
      observer: made the states.
      state: arrays `[*layers, ...]`.
      spec: see `Observer.finish`.
      lead: the number of leading axes; 0 for a single state.

    Returns:
      The ranges, stacked alike.

    Raises:
      ValueError: as `finish` does, naming the layer.

    >>> import jax
    >>> from jaxquant.observers import minmax
    >>> x = jnp.array([[1.0, -2.0], [3.0, 4.0]])
    >>> def seen(row):
    ...     return minmax().update(minmax().init(row), row)
    >>> finish_stacked(minmax(), jax.vmap(seen)(x), QSpec("int8"), 1).high.tolist()
    [1.0, 4.0]
    """
    if not lead:
        return observer.finish(state, spec)
    host: dict[str, Any] = {name: np.asarray(value) for name, value in state.items()}
    shape = host["updates"].shape[:lead]
    ranges = []
    for index in np.ndindex(*shape):
        try:
            ranges.append(observer.finish({k: v[index] for k, v in host.items()}, spec))
        except ValueError as error:
            raise ValueError(f"layer {', '.join(map(str, index))}: {error}") from None
    low, high = (np.stack([np.asarray(r[end]) for r in ranges]) for end in (0, 1))
    return as_range(low.reshape(*shape, *low.shape[1:]), high.reshape(*shape, *high.shape[1:]))


def as_range(low: Any, high: Any) -> Range:
    """A range of float32 arrays, widened to contain 0."""
    # through NumPy: a comparison in XLA would read subnormal ends as zero, and compiles
    low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
    return Range(jnp.asarray(np.minimum(low, 0)), jnp.asarray(np.maximum(high, 0)))


# --------------------------------------------------------------------------------------------------
# What all observers share


def kept_axes(axis: int | tuple[int, ...] | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that have ranges of their own, ascending and counted from the front.

    Raises:
      ValueError: an axis that the array does not have, or one named twice.

    >>> kept_axes(-1, (8, 3)), kept_axes(None, (8, 3))
    ((1,), ())
    """
    named = () if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    for a in named:
        if not -len(shape) <= a < len(shape):
            raise ValueError(f"observer: axis {a} of an array of shape {list(shape)}")
    kept = sorted(a % len(shape) for a in named)
    if len(set(kept)) != len(kept):
        raise ValueError(f"observer: an axis is named twice in {named}")
    return tuple(kept)


def other_axes(axis: int | tuple[int, ...] | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that share a range: those that `kept_axes` leaves out."""
    kept = kept_axes(axis, shape)
    return tuple(a for a in range(len(shape)) if a not in kept)


def kept_shape(axis: int | tuple[int, ...] | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the axes that have ranges of their own."""
    return tuple(shape[a] for a in kept_axes(axis, shape))


def no_updates() -> State:
    """The two counters of every state, at zero."""
    return {"updates": jnp.zeros((), jnp.int32), "bad": jnp.zeros((), jnp.int32)}


def counted(state: State, finite: Array) -> State:
    """The two counters after one more update."""
    bad = jnp.logical_not(finite).astype(jnp.int32)
    return {"updates": state["updates"] + 1, "bad": state["bad"] + bad}


def counted_both(a: State, b: State) -> State:
    """The two counters of two states merged."""
    return {"updates": a["updates"] + b["updates"], "bad": a["bad"] + b["bad"]}


def everywhere(a: Array) -> Array:
    """`a` on every device of its mesh, if that has explicit axes: states are never sharded."""
    sharding = jax.typeof(a).sharding
    if all(part is None for part in sharding.spec):
        return a
    return jax.sharding.reshard(a, NamedSharding(sharding.mesh, P(*(None,) * a.ndim)))


def ends(x: Array, shared: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """Least and largest value of float32 `x` (and 0) over the axes `shared`; whether `x` is finite.

    NaN counts as infinity: on a CPU XLA's minimum and maximum over many values lose it, and a pass
    of its own would cost as much as both.
    """
    nan = jnp.isnan(x)
    low = everywhere(jnp.min(jnp.where(nan, -jnp.inf, x), axis=shared, initial=0.0))
    high = everywhere(jnp.max(jnp.where(nan, jnp.inf, x), axis=shared, initial=0.0))
    return low, high, jnp.isfinite(low).all() & jnp.isfinite(high).all()


def require_seen(state: State) -> None:
    """Raises unless the state is a single one that has seen batches, all of them finite."""
    updates, bad = np.asarray(state["updates"]), np.asarray(state["bad"])
    if updates.ndim:
        raise ValueError(
            f"finish: expected one state, got {list(updates.shape)} of them: use finish_stacked"
        )
    if updates == 0:
        raise ValueError("no batches seen")
    if bad > 0:
        raise ValueError(f"non-finite values in {int(bad)} of {int(updates)} batches")


@dataclasses.dataclass(frozen=True, repr=False)
class Axis:
    """The field that all observers have, its check, and how they print: as they are called."""

    name: ClassVar[str] = ""
    sees_rows: ClassVar[bool] = False

    axis: int | tuple[int, ...] | None = None

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)
        given = [f for f in fields if f.default != getattr(self, f.name) and f.name != "bins"]
        return f"{self.name}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"

    def __post_init__(self) -> None:
        if isinstance(self.axis, list):
            raise ValueError(f"observer: expected axis as an int or a tuple, got {self.axis!r}")
