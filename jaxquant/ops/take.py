"""Lookups of rows of a QTensor: only these rows are dequantized."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxquant.ops.backward import constant
from jaxquant.ops.operands import members
from jaxquant.qtensor import QTensor, dequantize, with_plain_scales


def gather(
    q: QTensor,
    indices: Array,
    *,
    dimension_numbers: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
    mode: Any = None,
    fill_value: Any = None,
    **_: Any,
) -> Array | None:
    """`lax.gather` of full slices of a QTensor, as in embedding lookups.

    `out[i, :] = S[index_i] (q[index_i, :] - Z[index_i])`: codes and scales of the rows are
    gathered, and nothing else is dequantized.

    Args:
      q: QTensor `[vocabulary, features]`, or any with leading batch axes and several core axes.
      indices: integers `[..., n]`, `n` indexed axes.
      dimension_numbers: as for `lax.gather`.
      slice_sizes: 1 for each indexed axis, which must be collapsed, and the size of all others.
      mode: as for `lax.gather`; rows out of bounds are filled, or indices are clipped.
      fill_value: value of rows out of bounds; `None` is NaN.

    Returns:
      The array, or `None` for other lookups (slices of several rows, an indexed axis that is in
      groups, merged with another or packed): then dequantize first.

    Raises:
      TypeError: `q` is differentiated.

    >>> import jax, jaxquant as jq
    >>> table = jax.random.normal(jax.random.key(0), (100, 8))
    >>> q = jq.quantize(table, jq.QSpec("int8", jq.PerChannel(0)))
    >>> rows = lax.GatherDimensionNumbers((1,), (0,), (0,))
    >>> gather(q, jnp.array([[7], [3]]), dimension_numbers=rows, slice_sizes=(1, 8)).shape
    (2, 8)
    """
    indexed = tuple(dimension_numbers.start_index_map)
    parts = members(q)
    if not _rows_only(q, dimension_numbers, slice_sizes):
        return None
    lead = len(q.batch)
    where = [parts.index((a,)) for a in indexed]
    rows = indices.shape[:-1]
    limit = jnp.array([q.shape[a] for a in indexed], indices.dtype)
    limit = jnp.broadcast_to(limit, indices.shape)
    q = constant(with_plain_scales(q))

    def take(a: Array, count: int) -> Array:
        """Rows of one leaf, `[*rows, *other axes]`; `count` is the number of its storage axes."""
        shared = [s for s in where if s < count and a.shape[s] == 1 and q.codes.shape[s] != 1]
        a = lax.squeeze(a, shared)
        columns = [i for i, s in enumerate(where) if s < count and s not in shared]
        if not columns:
            return jnp.broadcast_to(a.reshape((1,) * len(rows) + a.shape), rows + a.shape)
        at = tuple(where[i] - sum(s < where[i] for s in shared) for i in columns)
        numbers = lax.GatherDimensionNumbers(
            offset_dims=tuple(range(len(rows), len(rows) + a.ndim - len(at))),
            collapsed_slice_dims=tuple(sorted(at)),
            start_index_map=at,
        )
        sizes = tuple(1 if i in at else n for i, n in enumerate(a.shape))
        picked = indices
        if len(columns) != len(where):
            picked = jnp.stack([indices[..., i] for i in columns], axis=-1)
        return lax.gather(a, picked, numbers, sizes, mode="clip")

    total = len(parts)
    rank = len(q.core)
    collapsed = [a - lead for a in indexed if a >= lead]  # core axes from 0
    remaining = [a for a in range(rank) if a not in collapsed]
    renamed = {a - rank: i - len(remaining) for i, a in enumerate(remaining)}
    core = [s for s in range(len(q.axes)) if s + lead not in where]
    part = dataclasses.replace(
        q,
        codes=take(q.codes, total),
        scale=take(q.scale, total),
        zero_point=None if q.zero_point is None else take(q.zero_point, total),
        codebook=None
        if q.codebook is None
        else take(q.codebook, total if q.grouped_codebook else lead),
        global_scale=None if q.global_scale is None else take(q.global_scale, lead),
        core=tuple(q.core[a] for a in remaining),
        axes=tuple(tuple(renamed[a] for a in q.axes[s]) for s in core),
        blocks=tuple(q.blocks[s] for s in core),
    )
    out = dequantize(part)
    if lax.GatherScatterMode.from_any(mode) is lax.GatherScatterMode.FILL_OR_DROP:
        inside = jnp.all((indices >= 0) & (indices < limit), axis=-1)
        inside = inside.reshape(rows + (1,) * (out.ndim - len(rows)))
        out = jnp.where(
            inside, out, jnp.asarray(jnp.nan if fill_value is None else fill_value, out.dtype)
        )
    offset = dimension_numbers.offset_dims
    order = iter(range(len(rows)))
    slices = iter(range(len(rows), out.ndim))
    return jnp.transpose(out, [next(slices if i in offset else order) for i in range(out.ndim)])


def _rows_only(q: QTensor, numbers: lax.GatherDimensionNumbers, slice_sizes: Sequence[int]) -> bool:
    indexed = tuple(numbers.start_index_map)
    if getattr(numbers, "operand_batching_dims", ()) or not q.axes or 0 in q.shape:
        return False
    if set(indexed) != set(numbers.collapsed_slice_dims):
        return False
    parts, lead = members(q), len(q.batch)
    for a, size in enumerate(slice_sizes):
        if a not in indexed:
            if size != q.shape[a]:
                return False
        elif (a,) not in parts or size != 1:
            return False
    for a in indexed:
        s = parts.index((a,)) - lead
        if s < 0:
            continue
        shared = q.groups[s] == 1 and q.padded[s] == q.storage[s]
        if q.blocks[s] != 1 and not shared:
            return False
        if q.spec.format.packed and s == len(q.axes) - 1:
            return False
    return True
