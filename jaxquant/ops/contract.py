"""The contraction of two operands: integer sums, then zero points, then scales."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import chex
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.ops import lowering
from jaxquant.ops.cpu.fused_rows import fused_sums, fused_totals, fuses
from jaxquant.ops.cpu.nibbles import halves, low_then_high, reordered, unpacked
from jaxquant.ops.operands import Operand, align
from jaxquant.ops.out_sharding import Sharding


def contract(
    x: Operand,
    w: Operand,
    precision: Any = None,
    sharding: Sharding | None = None,
    on_cpu: bool = False,
    narrow: bool = False,
) -> Array:
    """`sum_k s_x (q_x - z_x) s_w (q_w - z_w)`, float32 `[batch, free of x, free of w]`.

    With int8 values each group's sum is an exact int32, zero points included:
    `sum q_x q_w - z_w sum q_x - z_x sum q_w + n z_x z_w`. The term of the remainder of a float
    `z_w`, rounded to int8, is subtracted in float32. Scales and the sum over groups follow. Float
    values are summed in float32. `on_cpu`: the caller is in a branch for CPUs; `narrow`: codes of
    `w` are stored in less than a byte each.
    """
    for op in (x, w):
        chex.assert_rank([a for a in (op.scale, op.zero) if a is not None], op.values.ndim)
    chex.assert_equal((len(x.batch), len(x.groups)), (len(w.batch), len(w.groups)))
    rows = lowering.static_size(x.values.shape, x.free)
    if not is_integer(x):
        if not x.groups or sharding is not None:
            return batched(x, w, precision, sharding)
        if on_cpu or lowering.batch_grows(rows, lowering.static_size(x.values.shape, x.inner)):
            return in_float(x, w, precision)
        return lowering.by_platform(
            cpu=lambda: in_float(x, w, precision),
            default=lambda: batched(x, w, precision),
        )
    choose = _on_cpu if on_cpu else lowering.by_platform
    form = "batch" if sharding is not None and x.groups else form_of(x, w, rows, narrow)
    if form == "fused" and sharding is None:
        return choose(
            cpu=lambda: fused_sums(x, w), default=lambda: batched(x, unpacked(w), precision)
        )
    if rows == 1:
        two = sharding.one_more() if sharding else None
        product = contract(_two_rows(x), w, precision, two, on_cpu, narrow)
        return lax.index_in_dim(product, 0, len(x.batch), keepdims=False)

    def default() -> Array:
        return batched(x, unpacked(w), precision, sharding)

    if form == "loop":
        return choose(cpu=lambda: loop(x, w), default=default)
    if form == "float":
        return choose(cpu=lambda: in_float(x, unpacked(w)), default=default)
    if form == "plain" and w.packed is not None:
        return choose(cpu=lambda: by_halves(x, w), default=default)
    return default()


def form_of(x: Operand, w: Operand, rows: int, narrow: bool) -> str:
    """The form of the sum on a CPU for these operands; `"plain"` is one product without groups."""
    whole = lowering.undivided(x.values, w.values)
    if whole and lowering.fused_wins(rows, bool(x.groups), narrow) and fuses(x, w):
        return "fused"
    if not x.groups:
        return "plain"
    group = lowering.static_size(x.values.shape, x.inner)
    form = lowering.group_form(rows, group, narrow, whole)
    return "batch" if form == "loop" and len(x.groups) > 1 else form


def _on_cpu(cpu: Callable[[], Array], default: Callable[[], Array]) -> Array:
    """`lowering.by_platform` inside a branch for CPUs."""
    return cpu()


def integer_sums(x: Operand, w: Operand) -> Array:
    """`sum_k q_x (q_w - z_w)` of int8 codes without groups or batch: int32, exact.

    `w` is not packed. The caller adds `-z_x sum_k (q_w - z_w)`, which does not depend on the codes
    of `x` and can be computed beforehand.
    """
    count = lowering.static_size(x.values.shape, x.free)
    fused = lowering.fused_wins(count, False, False) and fuses(x, w)
    fused = fused and lowering.undivided(x.values, w.values)
    if count == 1 and not fused:
        return lax.index_in_dim(integer_sums(_two_rows(x), w), 0, 0, keepdims=False)

    def plain() -> Array:
        return product(x, w)

    def one_loop() -> Array:
        return fused_totals(x, w)[..., 0]

    if fused:
        total = lowering.by_platform(cpu=one_loop, default=plain)
    else:
        total = plain()
    if w.zero is None:
        return total
    rows = jnp.sum(x.values, axis=x.inner, keepdims=True, dtype=jnp.int32)
    return total - align(w.zero, w, len(x.free), 0) * align(rows, x, 0, len(w.free))


def first_free(x: Operand) -> int:
    """The position at which a new axis precedes the free axes, in results too."""
    return min(x.free, default=len(x.batch))


def new_axis(x: Operand) -> Operand:
    """Adds a free axis of size 1, the first one."""
    at = first_free(x)

    def renumbered(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(a + (a >= at) for a in axes)

    def new(a: Array | None) -> Array | None:
        return None if a is None else jnp.expand_dims(a, at)

    return Operand(
        jnp.expand_dims(x.values, at),
        new(x.scale),
        new(x.zero),
        renumbered(x.batch),
        (at, *renumbered(x.free)),
        renumbered(x.groups),
        renumbered(x.inner),
    )


def _two_rows(x: Operand) -> Operand:
    """Adds a row of zeros: on a CPU a single row takes 20 times as long."""
    one = new_axis(x)
    pad = [(0, int(a == one.free[0])) for a in range(one.values.ndim)]
    return dataclasses.replace(one, values=jnp.pad(one.values, pad))


def is_integer(x: Operand) -> bool:
    """Whether values are int8, whose sums are exact."""
    return x.values.dtype == jnp.int8


def dequantized(x: Operand) -> Array:
    """`scale (values - zero)` in float32."""
    v = x.values.astype(jnp.float32)
    if x.zero is not None:
        v = v - x.zero.astype(jnp.float32)
    return v if x.scale is None else v * x.scale


def batched(
    x: Operand, w: Operand, precision: Any = None, sharding: Sharding | None = None
) -> Array:
    """One `dot_general` with groups as batch dimensions."""
    return _scaled(product(x, w, precision, sharding), x, w)


def product(
    x: Operand,
    w: Operand,
    precision: Any = None,
    sharding: Sharding | None = None,
    left: bool = False,
) -> Array:
    """The contraction of the values, `[batch, groups, free of x, free of w]`.

    With `left` the weight is the left operand, and its free axes come before those of `x`.
    """
    assert sharding is None or not left  # a sharding names the free axes of x first
    a, b = (w, x) if left else (x, w)
    return lax.dot_general(
        a.values,
        b.values,
        ((a.inner, b.inner), (a.batch + a.groups, b.batch + b.groups)),
        precision=None if is_integer(x) else precision,
        preferred_element_type=jnp.int32 if is_integer(x) else jnp.float32,
        out_sharding=None if sharding is None else sharding.of(len(x.groups)),
    )


def swapped(total: Array, first: int, outs: int) -> Array:
    """Moves `outs` axes, from `first` on, to the end."""
    rest = range(first + outs, total.ndim)
    return total.transpose((*range(first), *rest, *range(first, first + outs)))


def _scaled(total: Array, x: Operand, w: Operand, left: bool = False) -> Array:
    """Subtracts zero points from a product, scales it and sums groups; keeps its axis order."""
    kind = total.dtype

    def of_x(a: Array) -> Array:
        return align(a, x, len(w.free), 0) if left else align(a, x, 0, len(w.free))

    def of_w(a: Array) -> Array:
        return align(a, w, 0, len(x.free)) if left else align(a, w, len(x.free), 0)

    def summed(op: Operand) -> Array:
        return jnp.sum(op.values, axis=op.inner, keepdims=True, dtype=kind)

    zero, rest = _split_zero(w) if kind == jnp.int32 else (w.zero, None)
    sums: Array | None = None
    if zero is not None:
        sums = of_x(summed(x))
        total = total - of_w(zero) * sums
    if x.zero is not None:
        total = total - of_x(x.zero) * of_w(summed(w))
        if zero is not None and sums is not None:
            count = jnp.sum(jnp.ones([x.values.shape[a] for a in x.inner], kind), dtype=kind)
            sums = sums - count * of_x(x.zero)
            total = total + count * of_x(x.zero) * of_w(zero)
    out = lax.convert_element_type(total, jnp.float32)
    if rest is not None and sums is not None:
        out = out - of_w(rest) * sums.astype(jnp.float32)
    if w.scale is not None:
        out = lax.mul(out, of_w(w.scale))
    if x.scale is not None:
        out = lax.mul(out, of_x(x.scale))
    first = len(x.batch)
    if x.groups:
        out = jnp.sum(out, axis=tuple(range(first, first + len(x.groups))))
    return out


def _split_zero(w: Operand) -> tuple[Array | None, Array | None]:
    """A zero point as an int32 within int8, which keeps sums exact, and a float remainder."""
    if w.zero is None or jnp.issubdtype(w.zero.dtype, jnp.integer):
        return w.zero, None
    whole = jnp.clip(jnp.round(w.zero), -128, 127)
    return whole.astype(jnp.int32), w.zero - whole


def by_halves(x: Operand, w: Operand) -> Array:
    """Contracts packed codes in storage order: one product for each half of the bytes."""
    (x0, w0), (x1, w1) = halves(x, w)
    return batched(x0, w0) + batched(x1, w1)


def loop(x: Operand, w: Operand) -> Array:
    """Contracts one group after the other, each by a plain matrix product.

    The weight is the left operand, and the scale of `x`, which groups share, is applied last.
    """
    first = len(x.batch)
    bare = dataclasses.replace(x, scale=None)
    if w.packed is not None:
        # keeps XLA from computing the codes again for each group
        values = reordered(lax.optimization_barrier(x.values))
        bare = dataclasses.replace(bare, values=values)

    def one(i: Array | int) -> Array:
        a, b = _group(bare, i), low_then_high(_group(w, i))
        return _scaled(product(a, b, left=True), a, b, True)

    def step(total: Array, i: Array) -> tuple[Array, None]:
        return total + one(i), None

    count = x.values.shape[x.groups[0]]
    out = swapped(lax.scan(step, one(0), jnp.arange(1, count))[0], first, len(w.free))
    return out if x.scale is None else out * _last_scale(x, x.scale, w)


def _last_scale(x: Operand, scale: Array, w: Operand) -> Array:
    """The scale of `x`, the same for all groups, laid out for the result."""
    ungrouped = dataclasses.replace(x, groups=(), inner=(*x.groups, *x.inner))
    return align(scale, ungrouped, 0, len(w.free))


def _group(op: Operand, index: Array | int) -> Operand:
    """One group of an operand."""
    (at,) = op.groups

    def renumbered(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(a - (a > at) for a in axes)

    def one(a: Array) -> Array:
        if a.shape[at] == 1:
            return lax.index_in_dim(a, 0, at, keepdims=False)
        if isinstance(index, int):
            return lax.index_in_dim(a, index, at, keepdims=False)
        return lax.dynamic_index_in_dim(a, index, at, keepdims=False, allow_negative_indices=False)

    return Operand(
        one(op.values),
        None if op.scale is None else one(op.scale),
        None if op.zero is None else one(op.zero),
        renumbered(op.batch),
        renumbered(op.free),
        (),
        renumbered(op.inner),
        op.packed,
    )


def in_float(x: Operand, w: Operand, precision: Any = None) -> Array:
    """One float product of the dequantized operands; the scale of `x` is applied last."""
    dtype = jnp.float32 if is_integer(x) else x.values.dtype
    bare = dequantized(dataclasses.replace(x, scale=None)).astype(dtype)
    values, x_over = _joined(bare, (*x.groups, *x.inner))
    dense = dequantized(w)
    if dtype == jnp.float16:  # with a scale rounded up, values may exceed float16's range
        top = float(jnp.finfo(dtype).max)
        dense = jnp.clip(dense, -top, top)
    weights, w_over = _joined(dense.astype(dtype), (*w.groups, *w.inner))
    if len(x_over) != len(w_over):
        values, x_over = bare, (*x.groups, *x.inner)
        weights, w_over = dense.astype(dtype), (*w.groups, *w.inner)
    a = Operand(values, None, None, x.batch, x.free, (), x_over)
    b = Operand(weights, None, None, w.batch, w.free, (), w_over)
    out = batched(a, b, precision)
    return out if x.scale is None else out * _last_scale(x, x.scale, w)


def _joined(a: Array, over: tuple[int, ...]) -> tuple[Array, tuple[int, ...]]:
    """Merges the last axes, `over`: a CPU contracts a single axis several times faster."""
    first = a.ndim - len(over)
    if over != tuple(range(first, a.ndim)):
        return a, over
    return a.reshape(*a.shape[:first], math.prod(a.shape[first:])), (first,)
