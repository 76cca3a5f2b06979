"""Contractions with outlier columns in float; calibration or each call finds the columns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.numerics import decode
from jaxquant.ops.activations import fake, quantize_activation
from jaxquant.ops.operands import Operand, Placement
from jaxquant.qtensor import (
    Outliers,
    QSpec,
    QTensor,
    largest_magnitude,
    magnitude,
    storage_codes,
    storage_scale,
)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Columns that stay in float.

    Attributes:
      index: int32 `[*batch, capacity]`, positions along the flattened contracted axes.
      chosen: bool `[*batch, K]`, True for these columns.
      valid: bool like `index`, False for unused places.
    """

    index: Array
    chosen: Array
    valid: Array


def columns_of(x: Array, lead: int, outliers: Outliers, fixed: Array | None = None) -> Columns:
    """The outlier columns of `x` `[*batch, *rows, K]`, `lead` batch axes.

    Args:
      x: float array.
      lead: number of leading axes, each index of which has its own columns.
      outliers: threshold and capacity.
      fixed: int32 `[capacity]`, the calibrated columns, -1 for none; `None` finds them in `x`.

    >>> found = columns_of(jnp.array([[1.0, -8.0, 2.0]]), 0, Outliers(6.0, capacity=2))
    >>> found.index.tolist(), found.valid.tolist(), found.chosen.tolist()
    ([1, 2], [True, False], [False, True, False])
    """
    size = x.shape[-1]
    if fixed is None:
        peak = jnp.max(magnitude(x), axis=tuple(range(lead, x.ndim - 1)), initial=0.0)
        top, index = lax.top_k(peak, outliers.columns(size))
        valid = top >= outliers.threshold
    else:
        index, valid = jnp.maximum(fixed, 0), fixed >= 0
    each = index[..., None] == lax.broadcasted_iota(
        jnp.int32, (1,) * index.ndim + (size,), index.ndim
    )
    return Columns(index, jnp.any(each & valid[..., None], axis=-2), valid)


def split(
    x: Operand, spec: QSpec, outliers: Outliers, fixed: Array | None = None
) -> tuple[Operand, Array, Columns]:
    """Codes of an activation without its outlier columns, and these columns in float.

    With `range="qmax"`, `q = round(x 127 / max |x|)` over each row, the maximum without outlier
    values: the codes of bitsandbytes' `int8_vectorwise_quant`.

    Args:
      x: float activation as `arranged` lays it out, `[*batch, *free, *contracted]`.
      spec: symmetric, an integer format of at most 8 bits.
      outliers: threshold and capacity.
      fixed: as for `columns_of`.

    Returns:
      `(codes, floats, columns)`, floats `[*batch, *free, capacity]` float32.
    """
    lead, rank = len(x.batch), len(x.batch) + len(x.free)
    v = x.values.astype(jnp.float32).reshape(*x.values.shape[:rank], -1)
    columns = columns_of(v, lead, outliers, fixed)
    chosen = lax.expand_dims(columns.chosen, range(lead, rank))
    rest = jnp.where(chosen & (magnitude(v) >= outliers.threshold), 0.0, v)
    if spec.range == "qmax" and spec.format.qmax == 127:
        amax = largest_magnitude(rest, (rest.ndim - 1,))
        finite = jnp.isfinite(amax)
        some = finite & (amax > 127 * float(jnp.finfo(jnp.float32).tiny))
        unit = 127.0 / jnp.where(some, amax, 1.0)
        codes = jnp.round(jnp.where(some, rest, 0.0) * unit).astype(jnp.int8)
        scale = jnp.where(finite, jnp.where(some, amax, 127.0) / 127.0, jnp.nan)
    else:
        codes, scale, _ = quantize_activation(rest, spec, (v.ndim - 1,))
    codes = jnp.where(chosen, jnp.int8(0), codes).reshape(x.values.shape)
    scale = scale.reshape(*scale.shape[:rank], *(1,) * (x.values.ndim - rank))
    index = lax.expand_dims(columns.index, range(lead, rank))
    picked = jnp.take_along_axis(v, jnp.broadcast_to(index, (*v.shape[:rank], index.shape[-1])), -1)
    floats = jnp.where(lax.expand_dims(columns.valid, range(lead, rank)), picked, 0.0)
    return dataclasses.replace(x, values=codes, scale=scale, zero=None), floats, columns


def product(floats: Array, q: QTensor, at: Placement, columns: Columns) -> Array:
    """Outlier columns times the dequantized rows of a weight, `[*batch, *free, *kept]` float32.

    Only the rows of these columns are dequantized.
    """
    order = (*at.batch, *at.keep, *at.contract)
    nb, nk = len(at.batch), len(at.keep)

    def selected(a: Array, sizes: Sequence[int], index: Array) -> Array:
        """From `[storage]` to `[*batch, *kept, capacity]`; `sizes` are those of contracted axes."""
        a = jnp.transpose(a, order) if order != tuple(range(a.ndim)) else a
        a = a.reshape(*a.shape[: nb + nk], math.prod(sizes))

        def take(a: Array, i: Array) -> Array:
            return jnp.take(a, i, axis=-1, mode="clip")

        for _ in range(nb):
            take = jax.vmap(take)
        return take(a, index)

    def shared(a: Array) -> Array:
        """The same for an array with one value per group."""
        for s in (*at.batch, *at.keep):
            if at.groups[s] != at.padded[s]:
                a = jnp.repeat(a, at.block(s), axis=s, total_repeat_length=at.padded[s])
        where = jnp.unravel_index(columns.index, [at.padded[s] for s in at.contract])
        sizes = [at.groups[s] for s in at.contract]
        group = jnp.zeros_like(columns.index)
        for i, s in zip(where, at.contract, strict=True):
            group = group * at.groups[s] + i // at.block(s)
        return selected(a, sizes, group)

    padded = [at.padded[s] for s in at.contract]
    values = decode(selected(storage_codes(q), padded, columns.index), q.spec.format)
    if q.zero_point is not None:
        values = values - shared(q.zero_point.astype(jnp.float32))
    rows = values * shared(storage_scale(q))
    batch = tuple(range(nb))
    return lax.dot_general(
        floats,
        rows,
        (((floats.ndim - 1,), (nb + nk,)), (batch, batch)),
        preferred_element_type=jnp.float32,
    )


def fake_with_outliers(
    x: Array,
    spec: QSpec,
    contracted: Sequence[int],
    batch: Sequence[int],
    outliers: Outliers,
    fixed: Array | None = None,
) -> Array:
    """An activation rounded to `spec`, except its outlier columns.

    `fixed` is as for `columns_of`, positions along the flattened axes `contracted`.
    """
    free = [a for a in range(x.ndim) if a not in contracted and a not in batch]
    perm = [*batch, *free, *contracted]
    transposed = jnp.transpose(x, perm)
    lead = len(batch) + len(free)
    flat = transposed.reshape(*transposed.shape[:lead], -1).astype(jnp.float32)
    columns = columns_of(flat, len(batch), outliers, fixed)
    chosen = lax.expand_dims(columns.chosen, range(len(batch), lead))
    chosen = jnp.broadcast_to(chosen, flat.shape).reshape(transposed.shape)
    chosen = jnp.transpose(chosen, [perm.index(a) for a in range(x.ndim)])
    out = chosen & (magnitude(x) >= outliers.threshold)  # as in `split`
    rest = jnp.where(out, jnp.zeros((), x.dtype), x)
    return jnp.where(chosen, x, fake(rest, spec, contracted))


def in_order(fixed: Array, over: Sequence[int], q: QTensor, axes: Sequence[int]) -> Array:
    """Positions along the flattened core axes `over` as positions along the flattened `axes`."""
    place = _places(fixed, over, q)
    out = jnp.zeros_like(fixed)
    for a in axes:
        out = out * q.shape[a] + place[a]
    return jnp.where(fixed >= 0, out, -1)


def _places(fixed: Array, over: Sequence[int], q: QTensor) -> dict[int, Array]:
    names = [a + q.ndim for a in over]
    where = jnp.unravel_index(jnp.maximum(fixed, 0), [q.shape[a] for a in names])
    return dict(zip(names, where, strict=True))


def in_storage(fixed: Array, over: Sequence[int], q: QTensor, at: Placement) -> Array:
    """Positions along the flattened core axes `over` as positions in storage."""
    place = _places(fixed, over, q)
    out = jnp.zeros_like(fixed)
    for s in at.contract:
        inside = jnp.zeros_like(fixed)
        for a in at.members[s]:
            inside = inside * q.shape[a] + place[a]
        out = out * at.padded[s] + inside
    return jnp.where(fixed >= 0, out, -1)
