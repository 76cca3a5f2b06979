"""The observer protocol: a monoid that accumulates the range of an array over batches."""

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
    """The range of values to represent: `[low, high]`, with `low <= 0 <= high`.

    Attributes:
      low, high: float32, `[]` per tensor, or in the shape of the kept axes.
    """

    low: Array
    high: Array


@runtime_checkable
class Observer(Protocol):
    """A hashable value (a frozen dataclass) that accumulates statistics of one array.

    `init` is the identity of `merge`, `merge` is associative, and merged shards give the result of
    one pass over all data: exactly, except for the float rounding of `moving_average`. Memory does
    not grow with the number of batches.

    A state is a flat dict of arrays of fixed shapes and dtypes, among them

    - `updates`, int32 `[]`: the number of updates;
    - `bad`, int32 `[]`: the number of updates with NaN or infinity, which changed nothing else.

    States of several layers may be stacked along leading axes: `merge` takes stacked states,
    `finish_stacked` finishes them one by one.

    Attributes:
      axis: the axes of the array with separate ranges ("per channel"); `None`: per tensor.
    """

    @property
    def axis(self) -> int | tuple[int, ...] | None:
        """See above."""
        ...

    @property
    def sees_rows(self) -> bool:
        """Whether `update` takes activations unfolded to rows, as multiplied with the weight."""
        return False

    def init(self, aval: Any) -> State:
        """The state before any update, for arrays of the shape of `aval`."""
        ...

    def update(self, state: State, x: Array) -> State:
        """The state after one more array `x` of any float dtype; traceable."""
        ...

    def merge(self, a: State, b: State) -> State:
        """The state after the updates of `a`, then those of `b`; traceable."""
        ...

    def finish(self, state: State, spec: QSpec) -> Range:
        """The range to quantize with by `spec`; for concrete states only.

        Raises:
          ValueError: there was no update, or one was not finite.
        """
        ...


def range_to_scale(range: Range, spec: QSpec) -> tuple[Array, Array | None]:
    """The scale and zero point of a range under `spec`, by the rules of `quantize`.

    Symmetric: `S = max(-low, high) / (qmax + 1/2)`, or by the spec's other rules. Asymmetric:
    `S = (high - low) / (2^b - 1)`, `Z = qmin - round(low / S)`.

    Args:
      range: float32 arrays of one shape.
      spec: format and range rule; its granularity is ignored.

    Returns:
      `(scale, zero point)` of that shape, float32 and int32; `None` for a symmetric spec.

    >>> scale, zero = range_to_scale(
    ...     Range(jnp.float32(-1.0), jnp.float32(4.0)), QSpec("uint8", symmetric=False)
    ... )
    >>> round(float(scale), 4), int(zero)
    (0.0196, 51)
    """
    return _to_scale(range, spec)


# Compiled like `quantize`, so that both round the same; also, one call serves many candidates.
@functools.partial(jax.jit, static_argnums=1)
def _to_scale(range: Range, spec: QSpec) -> tuple[Array, Array | None]:
    low, high = (jnp.asarray(v, jnp.float32) for v in range)
    scale, zero, total = scales_of_range(low, high, jnp.maximum(-low, high), spec)
    scale = scale.astype(jnp.float32)
    if total is not None:
        scale = scale * total
    return scale, None if zero is None else zero.astype(jnp.int32)


def finish_stacked(observer: Observer, state: State, spec: QSpec, lead: int) -> Range:
    """Applies `observer.finish` to each of the states stacked along `lead` leading axes.

    Args:
      observer: the observer of the states.
      state: arrays `[*layers, ...]`.
      spec: see `Observer.finish`.
      lead: the number of leading axes; 0 for a single state.

    Returns:
      The ranges, stacked along the same axes.

    Raises:
      ValueError: as `finish`, naming the layer.

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
    # in NumPy: XLA would compile the comparison, and read subnormal ends as zero
    low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
    return Range(jnp.asarray(np.minimum(low, 0)), jnp.asarray(np.maximum(high, 0)))


# --------------------------------------------------------------------------------------------------
# Shared by all observers


def kept_axes(axis: int | tuple[int, ...] | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes with separate ranges, ascending and non-negative.

    Raises:
      ValueError: an axis out of range, or named twice.

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
    """The axes that share a range: all but `kept_axes`."""
    kept = kept_axes(axis, shape)
    return tuple(a for a in range(len(shape)) if a not in kept)


def kept_shape(axis: int | tuple[int, ...] | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the axes with separate ranges."""
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
    """`a` replicated over its mesh, if that has explicit axes: states are never sharded."""
    sharding = jax.typeof(a).sharding
    if all(part is None for part in sharding.spec):
        return a
    return jax.sharding.reshard(a, NamedSharding(sharding.mesh, P(*(None,) * a.ndim)))


def ends(x: Array, shared: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """Minimum and maximum of float32 `x` and 0 over the axes `shared`; whether `x` is finite.

    NaN counts as infinity: XLA's minimum and maximum over many values lose NaN on a CPU, and a
    separate pass would cost as much as both.
    """
    nan = jnp.isnan(x)
    low = everywhere(jnp.min(jnp.where(nan, -jnp.inf, x), axis=shared, initial=0.0))
    high = everywhere(jnp.max(jnp.where(nan, jnp.inf, x), axis=shared, initial=0.0))
    return low, high, jnp.isfinite(low).all() & jnp.isfinite(high).all()


def require_seen(state: State) -> None:
    """Raises unless the state is a single one, with updates that were all finite."""
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
    """The base of most observers: the field `axis`, its check, and a `repr` in call syntax."""

    name: ClassVar[str] = ""
    sees_rows: ClassVar[bool] = False

    axis: int | tuple[int, ...] | None = None

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)
        shown = [f for f in fields if f.default != getattr(self, f.name) and f.name != "bins"]
        return f"{self.name}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    def __post_init__(self) -> None:
        if isinstance(self.axis, list):
            raise ValueError(f"observer: expected axis as an int or a tuple, got {self.axis!r}")
