"""Contractions of few rows with packed codes: one loop that unpacks, multiplies and sums."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from jaxquant.ops.nibbles import halves
from jaxquant.ops.operands import Operand


def fuses(x: Operand, w: Operand) -> bool:
    """Whether `fused_sums` can be asked for: packed codes in groups along one axis, no batch."""
    n, m = x.values.ndim, w.values.ndim
    placed = (x.groups, x.inner, w.groups, w.inner) == ((n - 2,), (n - 1,), (m - 2,), (m - 1,))
    if w.packed is None or x.batch or x.zero is not None or not placed:
        return False
    return _factors(w.values.shape[-1]) is not None


def fused_sums(x: Operand, w: Operand) -> Array:
    """`contract` of few rows, int8 or int16, with packed codes: multiplied as they are unpacked.

    One loop over the packed weight; no unpacked copy of it is made. A product of 16-bit numbers is
    summed in pairs by one instruction, so that 15 bits of an activation cost no more than 7.
    """
    # what makes the codes would else be computed again for each row of the weight
    x = dataclasses.replace(x, values=lax.optimization_barrier(x.values))
    (x0, w0), (x1, w1) = halves(x, w, shifted=False)
    factors = _factors(w.values.shape[-1])
    assert factors is not None
    groups = w.values.shape[-2]
    rows, outs = len(x.free), len(w.free)

    def cut(a: Array, before: int, after: int) -> Array:
        shape = (*(1,) * before, *a.shape[:-2], *(1,) * after, groups, *factors)
        return a.reshape(shape).astype(jnp.int16).astype(jnp.int32)

    def product(x: Operand, w: Operand) -> Array:
        return cut(x.values, 0, outs) * cut(w.values, rows, 0)

    last = tuple(range(rows + outs + 1, rows + outs + 1 + len(factors)))
    total = jnp.sum(product(x0, w0) + product(x1, w1), axis=last)  # [free of x, free of w, groups]
    out = total.astype(jnp.float32)

    def spread(a: Array, before: int, after: int) -> Array:
        a = a[..., 0]
        return a.reshape(*(1,) * before, *a.shape[:-1], *(1,) * after, a.shape[-1])

    if w.zero is not None:
        sums = jnp.sum(x.values, axis=-1, keepdims=True, dtype=jnp.int32)
        by = spread(sums, 0, outs).astype(jnp.float32)
        out = out - by * spread(w.zero, rows, 0).astype(jnp.float32)
    if w.scale is not None:
        out = out * spread(w.scale, rows, 0)
    if x.scale is not None:
        out = out * spread(x.scale, 0, outs)
    return jnp.sum(out, axis=-1)


def _factors(size: int) -> tuple[int, ...] | None:
    """`size` as a product of numbers up to 32: sums along longer axes XLA makes in parts."""
    if size <= 32:
        return (size,)
    rest = _factors(size // 32) if size % 32 == 0 else None
    return None if rest is None else (*rest, 32)
