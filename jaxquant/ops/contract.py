"""The contraction of two operands: integer sums, then zero points, then scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxquant.ops import lowering
from jaxquant.ops.cpu.fused_rows import fused_sums, fused_totals, fuses
from jaxquant.ops.cpu.nibbles import unpacked
from jaxquant.ops.operands import Operand, align
from jaxquant.ops.out_sharding import Sharding
from jaxquant.ops.products import (
    batched,
    by_halves,
    in_float,
    is_integer,
    loop,
    product,
)


def contract(
    x: Operand,
    w: Operand,
    precision: Any = None,
    sharding: Sharding | None = None,
    on_cpu: bool = False,
    narrow: bool = False,
) -> Array:
    """`sum_k s_x (q_x - z_x) s_w (q_w - z_w)`, float32 `[batch, free of x, free of w]`.

    With int8 values each group's sum is an int32, exact, zero points included:
    `sum q_x q_w - z_w sum q_x - z_x sum q_w + n z_x z_w`. What a float `z_w` has beyond an integer
    is taken off in float32. Then come the scales, and the sum over groups. Float values are summed
    in float32. `on_cpu` says that the platform is a CPU already, `narrow` that `w` is stored in
    less than a byte.
    """
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
    """How a CPU sums, as far as the operands allow it; `"plain"` is one product without groups."""
    whole = lowering.undivided(x.values, w.values)
    if whole and lowering.fused_wins(rows, bool(x.groups), narrow) and fuses(x, w):
        return "fused"
    if not x.groups:
        return "plain"
    group = lowering.static_size(x.values.shape, x.inner)
    form = lowering.group_form(rows, group, narrow, whole)
    return "batch" if form == "loop" and len(x.groups) > 1 else form


def _on_cpu(cpu: Callable[[], Array], default: Callable[[], Array]) -> Array:
    """The choice where the platform is known already."""
    return cpu()


def integer_sums(x: Operand, w: Operand) -> Array:
    """`sum_k q_x (q_w - z_w)` of int8 codes without groups or batch: int32, exact.

    `w` is not packed. Zero points of `x` are the caller's matter: `-z_x sum_k (q_w - z_w)` depends
    on the weight alone and is known beforehand.
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
    """Where a new axis has to go to come before the other free ones, in results too."""
    return min(x.free, default=len(x.batch))


def new_axis(x: Operand) -> Operand:
    """A new first free axis of size 1."""
    at = first_free(x)

    def moved(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(a + (a >= at) for a in axes)

    def new(a: Array | None) -> Array | None:
        return None if a is None else jnp.expand_dims(a, at)

    return Operand(
        jnp.expand_dims(x.values, at),
        new(x.scale),
        new(x.zero),
        moved(x.batch),
        (at, *moved(x.free)),
        moved(x.groups),
        moved(x.inner),
    )


def _two_rows(x: Operand) -> Operand:
    """A row of zeros added: on a CPU a single row takes 20 times as long."""
    one = new_axis(x)
    pad = [(0, int(a == one.free[0])) for a in range(one.values.ndim)]
    return dataclasses.replace(one, values=jnp.pad(one.values, pad))
