"""Contractions of a float activation, rounded to 15-bit integers, with int8 codes."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.numerics import is_nan, nearest_even, number, select
from jaxquant.ops import lowering
from jaxquant.ops.contract import contract, first_free, form_of, new_axis
from jaxquant.ops.cpu.fused_rows import fused_sums
from jaxquant.ops.operands import Operand, align
from jaxquant.ops.out_sharding import Sharding
from jaxquant.qtensor import largest_magnitude


def contract_limbs(
    x: Operand, w: Operand, sharding: Sharding | None = None, narrow: bool = False
) -> Array:
    """`contract` of a float `x` with an int8 `w`, `x` as two int8 limbs of 15 bits together.

    `x ~ S (128 q_hi + q_lo)` with one `S = absmax / 16319` for each row, so the error of a result
    is at most `S / 2 sum_k |w_k|`, about `2^-15 absmax sum_k |w_k|`.
    """
    v, over = x.values.astype(jnp.float32), (*x.groups, *x.inner)
    rows = lowering.static_size(x.values.shape, x.free)
    q, scale = _codes(v, over)
    if sharding is None and form_of(x, w, rows, narrow) == "fused":
        return fused_sums(dataclasses.replace(x, values=q.astype(jnp.int16), scale=scale), w)
    high = nearest_even(q / 128.0)
    limbs = [high.astype(jnp.int8), (q - 128.0 * high).astype(jnp.int8)]
    first, last = len(x.batch), len(x.batch) + len(x.free)
    if lowering.undivided(x.values, w.values):  # both limbs in one axis of twice the rows
        lead, rest = v.shape[:first], v.shape[last:]
        values = jnp.concatenate([a.reshape(*lead, rows, *rest) for a in limbs], axis=first)
        groups, inner = (tuple(a - len(x.free) + 1 for a in axes) for axes in (x.groups, x.inner))
        two = Operand(values, None, None, x.batch, (first,), groups, inner)
        total = contract(two, w, on_cpu=True, narrow=narrow)
        total = total.reshape(*lead, 2, *v.shape[first:last], *total.shape[first + 1 :])
    else:  # limbs in a new axis, which is not sharded
        two = dataclasses.replace(new_axis(x), values=jnp.stack(limbs, axis=first_free(x)))
        spec = sharding.one_more() if sharding else None
        total = contract(two, w, None, spec, on_cpu=True, narrow=narrow)
    high, low = (lax.index_in_dim(total, i, first, keepdims=False) for i in (0, 1))
    ungrouped = dataclasses.replace(x, groups=(), inner=over)
    return (128.0 * high + low) * align(scale, ungrouped, 0, len(w.free))


@functools.partial(jax.jit, static_argnums=1)
def _codes(v: Array, over: tuple[int, ...]) -> tuple[Array, Array]:
    """15-bit codes in float32, and the scale of each row, NaN if a value is not finite."""
    amax = largest_magnitude(v, over)
    tiny = number(float(jnp.finfo(v.dtype).tiny), v)
    scale = lax.max(lax.div(amax, number(16319, v)), tiny)
    scale = select(lax.eq(amax, number(0, v)), 1.0, scale)
    scale = select(lax.is_finite(amax), scale, jnp.nan)
    # not by a division: XLA may replace it by this or not, and sharded results would differ
    codes = nearest_even(lax.mul(v, lax.div(number(1, v), scale)))
    return select(is_nan(codes), 0.0, codes), scale
