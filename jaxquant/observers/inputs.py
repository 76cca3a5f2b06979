"""Second moments of a weight's inputs, for encoders and rewrites that use data.

With `X` the input rows `[n, K]` of a weight `[K, N]`, an error `D` of the weight causes an output
error of `|X D|^2 / n = tr(D^T H D)`, `H = X^T X / n`. So GPTQ needs only `H` of the data, and
activation-aware scaling only the mean or the largest magnitude of each column.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxquant.observers.base import (
    Range,
    State,
    as_range,
    counted,
    counted_both,
    everywhere,
    no_updates,
    require_seen,
)
from jaxquant.qtensor import QSpec

# Strips of columns in `_square`: more strips save little, and each product gets smaller.
_STRIPS = 4


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("rows", "absmax", "absmean", "hessian"),
    meta_fields=("axes", "batched"),
)
@dataclasses.dataclass(frozen=True)
class InputStats:
    """Second moments of a weight's inputs.

    `[*batch]` are the sizes of the weight's batch axes, then those of `batched`. `K` is the product
    of the sizes of the contracted axes.

    Attributes:
      rows: float32 `[*batch]`, the number of rows that are not all zeros.
      absmax: float32 `[*batch, K]`, `max |x_k|`.
      absmean: float32 `[*batch, K]`, mean of `|x_k|` over those rows.
      hessian: float32 `[*batch, K, K]`, `X^T X / n`; `None` if not accumulated.
      axes: core axes (negative) of the weight that `K` runs over, flattened in this order.
      batched: core axes (negative) of the weight with separate moments, such as experts.
    """

    rows: Array
    absmax: Array
    absmean: Array
    hessian: Array | None
    axes: tuple[int, ...]
    batched: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The observer that `inputs` makes.

    It takes rows `[*batched, rows, K]`, see `jaxquant.ops.unfold`. State, beside the counters:
    `rows`, float32 `[*batched]`; `absmax` and `abssum`, float32 `[*batched, K]`; `hessian`, float32
    `[*batched, K, K]`, the sum of `x x^T`, only if `hessian` is set.

    Attributes:
      hessian: whether to accumulate `X^T X`.
    """

    sees_rows: ClassVar[bool] = True
    """Whether activations must be unfolded into rows first."""

    hessian: bool = True

    def __repr__(self) -> str:
        return "inputs()" if self.hessian else "inputs(hessian=False)"

    @property
    def axis(self) -> None:
        """Its range is per tensor."""
        return None

    def init(self, aval: Any) -> State:
        """See `Observer.init`; `aval` has the shape `[*batched, rows, K]`."""
        if len(aval.shape) < 2:
            raise ValueError(f"inputs: expected rows [..., rows, K], got {list(aval.shape)}")
        *batched, _, k = aval.shape
        zeros = jnp.zeros((*batched, k), jnp.float32)
        state = {
            "rows": jnp.zeros(tuple(batched), jnp.float32),
            "absmax": zeros,
            "abssum": zeros,
            **no_updates(),
        }
        if self.hessian:
            state["hessian"] = jnp.zeros((*batched, k, k), jnp.float32)
        return state

    def update(self, state: State, x: Array) -> State:
        """Adds `x^T x`, `|x|` and the number of rows; rows of zeros are not counted."""
        x = x.astype(jnp.float32)
        size = jnp.abs(x)
        absmax = everywhere(jnp.max(size, axis=-2, initial=0.0))
        abssum = everywhere(jnp.sum(size, axis=-2))
        rows = everywhere(jnp.sum((size > 0).any(axis=-1), axis=-1, dtype=jnp.float32))
        finite = jnp.isfinite(abssum).all()  # a sum keeps NaN, which a maximum may lose
        new = {
            "rows": state["rows"] + rows,
            "absmax": jnp.maximum(state["absmax"], absmax),
            "abssum": state["abssum"] + abssum,
        }
        if self.hessian:
            square = everywhere(_square(x))
            finite &= jnp.isfinite(jnp.trace(square, axis1=-2, axis2=-1)).all()  # may overflow
            new["hessian"] = state["hessian"] + square
        accepted = {name: jnp.where(finite, value, state[name]) for name, value in new.items()}
        return {**accepted, **counted(state, finite)}

    def merge(self, a: State, b: State) -> State:
        """Adds the sums and takes the larger `absmax`."""
        summed = [name for name in a if name in ("rows", "abssum", "hessian")]
        sums = {name: a[name] + b[name] for name in summed}
        return {**sums, "absmax": jnp.maximum(a["absmax"], b["absmax"]), **counted_both(a, b)}

    def range(self, state: State) -> Range:
        """`[-max |x|, max |x|]` so far; traceable."""
        every = tuple(range(state["updates"].ndim, state["absmax"].ndim))
        amax = jnp.max(state["absmax"], axis=every, initial=0.0)
        return Range(-amax, amax)

    def finish(self, state: State, spec: QSpec) -> Range:
        """`[-max |x|, max |x|]` over all columns, for every spec."""
        require_seen(state)
        amax = np.max(np.asarray(state["absmax"]), initial=0.0)
        return as_range(-amax, amax)


def _square(x: Array) -> Array:
    """`x^T x`, `[..., rows, K] -> [..., K, K]`.

    Many columns are computed in strips from the diagonal on, which saves a third of the products.
    """
    lead, k = tuple(range(x.ndim - 2)), x.shape[-1]
    over = (((x.ndim - 2,), (x.ndim - 2,)), (lead, lead))

    def product(a: Array, b: Array) -> Array:
        return lax.dot_general(a, b, over, precision=lax.Precision.HIGHEST)

    sharded = any(part is not None for part in jax.typeof(x).sharding.spec)
    if k < _STRIPS * 128 or sharded:  # slices of a sharded array would move data
        return product(x, x)
    starts = [k * i // _STRIPS for i in range(_STRIPS)]
    ends = [*starts[1:], k]
    strips = [
        jnp.pad(
            product(x[..., start:end], x[..., start:]),
            [(0, 0)] * (x.ndim - 1) + [(start, 0)],
        )
        for start, end in zip(starts, ends, strict=True)
    ]
    upper = jnp.concatenate(strips, axis=-2)
    row, column = (lax.broadcasted_iota(jnp.int32, upper.shape, upper.ndim - a) for a in (2, 1))
    return jnp.where(row <= column, upper, jnp.swapaxes(upper, -1, -2))


def inputs(hessian: bool = True) -> Inputs:
    """Observes a weight's inputs: `X^T X`, and the magnitudes of each column.

    `n = sum_r [x_r != 0]`, `H = sum_r x_r x_r^T`, `m_k = max_r |x_rk|`, `a_k = sum_r |x_rk|`, in
    float32; `input_stats` divides by `n`. Rows of zeros are not counted, since a row routed to
    another expert arrives as zeros. A batch with NaN or infinity is counted as bad and changes
    nothing else.

    Args:
      hessian: whether to accumulate `X^T X`, `4 K^2` bytes.

    Source: Frantar et al., "GPTQ" (arXiv 2210.17323), section 3.

    >>> x = jnp.array([[1.0, 2.0], [3.0, 0.0]])
    >>> state = inputs().update(inputs().init(x), x)
    >>> state["hessian"].tolist(), state["absmax"].tolist()
    ([[10.0, 2.0], [2.0, 4.0]], [3.0, 2.0])
    """
    return Inputs(hessian)


def input_stats(
    state: State, axes: tuple[int, ...] = (-2,), batched: tuple[int, ...] = ()
) -> InputStats:
    """The means of a state of `inputs`; leading layer axes allowed.

    Args:
      state: of `inputs`, one or several stacked along leading axes.
      axes: core axes (negative) of the weight that form the columns, in the order flattened.
      batched: core axes (negative) of the weight with separate moments.

    Raises:
      ValueError: there was no batch, or one was not finite (unchecked under a trace).

    >>> x = jnp.array([[1.0, 2.0], [3.0, 0.0]])
    >>> input_stats(inputs().update(inputs().init(x), x)).hessian.tolist()
    [[5.0, 1.0], [1.0, 2.0]]
    """
    if not any(isinstance(state[name], jax.core.Tracer) for name in ("updates", "bad")):
        updates, bad = np.asarray(state["updates"]), np.asarray(state["bad"])
        if not updates.size or np.any(updates == 0):
            raise ValueError("input_stats: no batches seen")
        if np.any(bad > 0):
            raise ValueError(
                f"input_stats: non-finite values in {int(bad.max())} of {int(updates.max())} "
                "batches"
            )
    return _means(state, tuple(axes), tuple(batched))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _means(state: State, axes: tuple[int, ...], batched: tuple[int, ...]) -> InputStats:
    count = jnp.maximum(state["rows"], 1.0)
    hessian = state.get("hessian")
    return InputStats(
        rows=state["rows"],
        absmax=state["absmax"],
        absmean=state["abssum"] / count[..., None],
        hessian=None if hessian is None else hessian / count[..., None, None],
        axes=axes,
        batched=batched,
    )
