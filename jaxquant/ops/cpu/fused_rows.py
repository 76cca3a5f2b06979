"""Contractions of few rows: one loop reads the weight, multiplies and sums."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax import Array, lax

from jaxquant.ops.cpu.nibbles import halves
from jaxquant.ops.operands import Operand, integer_range

# Partial sums per vector: XLA splits longer vectors.
_LANES = 32

# More steps are slow: at 4096 x 4096 a loop of 16 takes 2 to 4 times as long as a product. A sum
# then has at most 2,304 terms. An int32 holds sums of products of bytes, and each lane's sum of
# 15-bit codes times bytes, but not always the total of the latter.
_STEPS = 9

_WIDE = 16319  # the largest 15-bit code of an activation


def fuses(x: Operand, w: Operand) -> bool:
    """Whether `fused_sums` supports the operands: one contracted axis, grouped or not; no batch."""
    n, m, by_groups = x.values.ndim, w.values.ndim, len(w.groups)
    if x.batch or x.zero is not None or by_groups > 1 or len(x.groups) != by_groups:
        return False
    if (x.inner, w.inner) != ((n - 1,), (m - 1,)):
        return False
    if by_groups and (x.groups, w.groups) != ((n - 2,), (m - 2,)):
        return False
    cut = _cut(w.values.shape[-1], w.packed is not None)
    return cut is not None and cut[0] <= _STEPS


def fused_sums(x: Operand, w: Operand) -> Array:
    """`contract` of few rows of int8 or int16: the weight is unpacked and multiplied as it is read.

    No unpacked copy of the weight is written. One instruction multiplies 16-bit numbers and sums
    pairs of products, so that 15 bits of an activation cost no more than 7.
    """
    rows, outs = len(x.free), len(w.free)

    def spread(a: Array, before: int, after: int) -> Array:
        a = a[..., 0] if x.groups else a
        return a.reshape(*(1,) * before, *a.shape[:-1], *(1,) * after, a.shape[-1])

    out = fused_totals(x, w)
    if w.zero is not None:
        sums = jnp.sum(x.values, axis=-1, keepdims=True, dtype=jnp.int32)
        integer = out.dtype == jnp.int32 and jnp.issubdtype(w.zero.dtype, jnp.integer)
        kind = jnp.int32 if integer else jnp.float32
        by = spread(sums, 0, outs).astype(kind) * spread(w.zero, rows, 0).astype(kind)
        out = out.astype(kind) - by
    out = out.astype(jnp.float32)
    if w.scale is not None:
        out = out * spread(w.scale, rows, 0)
    if x.scale is not None:
        out = out * spread(x.scale, 0, outs)
    return jnp.sum(out, axis=-1)


def fused_totals(x: Operand, w: Operand) -> Array:
    """`sum_k q_x q_w`, `[free of x, free of w, groups]`: int32, or float32 if that may overflow.

    The term of an 8-bit zero point is included in that bound. The 32 lanes are always int32 sums.
    """
    # keeps XLA from computing the codes again for each row of the weight
    x = dataclasses.replace(x, values=lax.optimization_barrier(x.values))
    pairs = [(x, w)] if w.packed is None else halves(x, w, shifted=False)
    size = w.values.shape[-1]
    cut = _cut(size, w.packed is not None)
    assert cut is not None
    steps, parts, lanes = cut
    rows, outs, groups = len(x.free), len(w.free), w.values.shape[-2] if w.groups else 1

    def parted(op: Operand, before: int, after: int) -> list[Array]:
        free = op.values.shape[: len(op.free)]
        shape = (*(1,) * before, *free, *(1,) * after, groups, steps, parts, lanes)
        split = op.values.reshape(shape)
        each = (lax.index_in_dim(split, i, split.ndim - 2, keepdims=False) for i in range(parts))
        return [a.astype(jnp.int16).astype(jnp.int32) for a in each]

    products = [
        a * b
        for left, right in pairs
        for a, b in zip(parted(left, 0, outs), parted(right, rows, 0), strict=True)
    ]
    total = sum(products[1:], start=products[0])  # [free of x, free of w, groups, steps, lanes]
    if steps > 1:  # keeps XLA from merging the two sums into one that it would not vectorise
        total = lax.optimization_barrier(jnp.sum(total, axis=-2, dtype=jnp.int32))
    else:
        total = lax.squeeze(total, (total.ndim - 2,))
    most = size * len(pairs) * _WIDE * (_most(w) + (0 if w.zero is None else 255))
    if x.values.dtype == jnp.int16 and most >= 2**31:
        total = total.astype(jnp.float32)
    return jnp.sum(total, axis=-1, dtype=total.dtype)


def _most(w: Operand) -> int:
    """The greatest magnitude of the weight's codes."""
    if w.packed is None:
        return 128
    low, high, _ = integer_range(w.packed) or (-128, 127, 1.0)
    return max(-low, high)


def _cut(size: int, packed: bool) -> tuple[int, int, int] | None:
    """`size` as steps, parts and lanes: parts are summed in registers, at most eight products."""
    if size <= _LANES:
        return (1, 1, size)
    if size % _LANES:
        return None
    parts = math.gcd(size // _LANES, 4 if packed else 8)
    return (size // _LANES // parts, parts, _LANES)
