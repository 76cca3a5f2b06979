"""The contraction of two operands: integer sums, then zero points, then scales."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from jaxquant.ops import lowering
from jaxquant.ops.operands import Operand, align


def contract(x: Operand, w: Operand, precision: lax.PrecisionLike = None) -> Array:
    """`sum_k s_x (q_x - z_x) s_w (q_w - z_w)`, float32 `[batch, free of x, free of w]`.

    With int8 values each group's sum is an int32, exact, zero points included:
    `sum q_x q_w - z_w sum q_x - z_x sum q_w + n z_x z_w`. Then come the scales, and the sum over
    groups. Float values (zero points applied already) are summed in float32.
    """
    if _is_integer(x) and _one_row(x):
        return contract(_two_rows(x), w, precision)[_rows(x, 0)]
    if len(x.groups) == 1 and _is_integer(x):
        rows = lowering.static_size(x.values.shape, x.free)
        if lowering.loop_over_groups(rows):
            return lowering.by_platform(
                cpu=lambda: _loop(x, w, precision), default=lambda: _batched(x, w, precision)
            )
    return _batched(x, w, precision)


def limbs(x: Operand) -> Operand:
    """A float operand as two int8 ones on a new first free axis: `x = S (128 q_hi + q_lo)`.

    One scale `S = amax / 16319` for each row: the error of each value is at most `S / 2`,
    2^-15 of the row's largest magnitude. `join` adds the products up.
    """
    v = x.values.astype(jnp.float32)
    amax = jnp.max(jnp.abs(v), axis=(*x.groups, *x.inner), keepdims=True, initial=0.0)
    tiny = float(jnp.finfo(jnp.float32).tiny)
    scale = jnp.where(amax == 0, 1.0, jnp.maximum(amax / 16319.0, tiny))
    q = jnp.round(v / jnp.where(jnp.isfinite(amax), scale, jnp.inf))
    high = jnp.round(q / 128.0)
    scale = jnp.where(jnp.isfinite(amax), scale, jnp.nan)
    at = len(x.batch)

    def moved(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(a + (a >= at) for a in axes)

    return Operand(
        jnp.stack([high.astype(jnp.int8), (q - 128.0 * high).astype(jnp.int8)], axis=at),
        jnp.expand_dims(scale, at),
        None,
        x.batch,
        (at, *moved(x.free)),
        moved(x.groups),
        moved(x.inner),
    )


def contract_limbs(x: Operand, w: Operand) -> Array:
    """`contract` of a float `x` with an int8 `w`, to about 15 bits of `x`."""
    two = limbs(x)
    scaled = dataclasses.replace(two, scale=None)
    product = contract(scaled, w)
    high, low = (lax.index_in_dim(product, i, len(x.batch), keepdims=False) for i in (0, 1))
    assert two.scale is not None
    scale = lax.index_in_dim(two.scale, 0, len(x.batch), keepdims=False)
    whole = dataclasses.replace(x, groups=(), inner=(*x.groups, *x.inner))
    return (128.0 * high + low) * align(scale, whole, 0, len(w.free))


def _is_integer(x: Operand) -> bool:
    return x.values.dtype == jnp.int8


def _one_row(x: Operand) -> bool:
    return lowering.static_size(x.values.shape, (*x.batch, *x.free)) == 1


def _two_rows(x: Operand) -> Operand:
    """A row of zeros added, on a new first free axis: CPUs are 20 times slower with one row."""
    at = len(x.batch)

    def moved(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(a + (a >= at) for a in axes)

    def new(a: Array | None) -> Array | None:
        return None if a is None else jnp.expand_dims(a, at)

    values = jnp.stack([x.values, jnp.zeros_like(x.values)], axis=at)
    return Operand(
        values, new(x.scale), new(x.zero), x.batch, (at, *moved(x.free)), moved(x.groups),
        moved(x.inner),
    )  # fmt: skip


def _rows(x: Operand, index: int) -> tuple[slice | int, ...]:
    return (*(slice(None) for _ in x.batch), index)


def _batched(x: Operand, w: Operand, precision: lax.PrecisionLike) -> Array:
    """Groups as batch dimensions of one `dot_general`."""
    numbers = ((x.inner, w.inner), (x.batch + x.groups, w.batch + w.groups))
    kind = jnp.int32 if _is_integer(x) else jnp.float32
    total = lax.dot_general(
        x.values, w.values, numbers, precision=precision, preferred_element_type=kind
    )
    total = total.astype(kind)
    before, after = len(x.free), len(w.free)

    def of_x(a: Array) -> Array:
        return align(a, x, 0, after)

    def of_w(a: Array) -> Array:
        return align(a, w, before, 0)

    def summed(op: Operand) -> Array:
        return jnp.sum(op.values, axis=op.inner, keepdims=True, dtype=kind)

    if w.zero is not None:
        total = total - of_w(w.zero) * of_x(summed(x))
    if x.zero is not None:
        total = total - of_x(x.zero) * of_w(summed(w))
    if w.zero is not None and x.zero is not None:
        terms = lowering.static_size(x.values.shape, x.inner)
        total = total + terms * of_x(x.zero) * of_w(w.zero)
    out = total.astype(jnp.float32)
    if w.scale is not None:
        out = out * of_w(w.scale)
    if x.scale is not None:
        out = out * of_x(x.scale)
    first = len(x.batch)
    return jnp.sum(out, axis=tuple(range(first, first + len(x.groups)))) if x.groups else out


def _loop(x: Operand, w: Operand, precision: lax.PrecisionLike) -> Array:
    """Groups one after the other: each product is a plain matrix product of few terms."""
    count = x.values.shape[x.groups[0]]

    def step(total: Array, i: Array) -> tuple[Array, None]:
        return total + _batched(_group(x, i), _group(w, i), precision), None

    first = _batched(_group(x, 0), _group(w, 0), precision)
    return lax.scan(step, first, jnp.arange(1, count))[0]


def _group(op: Operand, index: Array | int) -> Operand:
    """One group of an operand."""
    (at,) = op.groups

    def moved(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(a - (a > at) for a in axes)

    def one(a: Array | None) -> Array | None:
        if a is None:
            return None
        return lax.dynamic_index_in_dim(a, 0 if a.shape[at] == 1 else index, at, keepdims=False)

    values = one(op.values)
    assert values is not None
    return Operand(
        values, one(op.scale), one(op.zero), moved(op.batch), moved(op.free), (), moved(op.inner)
    )
