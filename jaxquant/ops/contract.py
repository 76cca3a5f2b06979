"""The contraction of two operands: integer sums, then zero points, then scales."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxquant.ops import lowering
from jaxquant.ops.nibbles import halves, unpacked
from jaxquant.ops.operands import Operand, align
from jaxquant.ops.packed_rows import fused_sums, fuses


@dataclasses.dataclass(frozen=True)
class Sharding:
    """The sharding asked of a result: of its batch axes, those free in `x`, those free in `w`."""

    mesh: Any
    batch: tuple[Any, ...]
    x: tuple[Any, ...]
    w: tuple[Any, ...]

    @classmethod
    def asked(cls, wanted: Any, batch: int, x: int, w: int) -> Sharding | None:
        """An `out_sharding` for a result of so many batch axes, axes free in `x`, in `w`."""
        if wanted is None:
            return None
        bare = isinstance(wanted, PartitionSpec)
        mesh, spec = (None, wanted) if bare else (wanted.mesh, wanted.spec)
        entries = (*spec, *(None,) * (batch + x + w - len(spec)))
        return cls(mesh, entries[:batch], entries[batch : batch + x], entries[batch + x :])

    def of(self, groups: int) -> NamedSharding | PartitionSpec:
        """For `[batch, groups, free of x, free of w]`."""
        spec = PartitionSpec(*self.batch, *(None,) * groups, *self.x, *self.w)
        return spec if self.mesh is None else NamedSharding(self.mesh, spec)

    def one_more(self) -> Sharding:
        """With a new first free axis of `x`."""
        return dataclasses.replace(self, x=(None, *self.x))


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
            return _batched(x, w, precision, sharding)
        if lowering.batch_grows(rows, lowering.static_size(x.values.shape, x.inner)):
            return _in_float(x, w, precision)
        return lowering.by_platform(
            cpu=lambda: _in_float(x, w, precision),
            default=lambda: _batched(x, w, precision, None),
        )
    choose = _on_cpu if on_cpu else lowering.by_platform
    form = form_of(x, w, rows, narrow)
    if form == "fused":
        return choose(
            cpu=lambda: fused_sums(x, w), default=lambda: _batched(x, unpacked(w), precision, None)
        )
    if rows == 1:
        two = sharding.one_more() if sharding else None
        product = contract(_two_rows(x), w, precision, two, on_cpu, narrow)
        return lax.index_in_dim(product, 0, len(x.batch), keepdims=False)

    def batched() -> Array:
        return _batched(x, unpacked(w), precision, sharding)

    if form == "halves":
        return choose(cpu=lambda: _by_stacked_halves(x, w), default=batched)
    if form == "loop":
        return choose(cpu=lambda: _loop(x, w), default=batched)
    if form == "float":
        return choose(cpu=lambda: _in_float(x, unpacked(w)), default=batched)
    left = sharding is None and lowering.weight_first(rows)
    if form == "plain" and w.packed is not None:
        return choose(cpu=lambda: _by_halves(x, w, left), default=batched)
    if form == "plain" and left:
        return choose(cpu=lambda: _batched(x, w, None, None, left), default=batched)
    return batched()


def form_of(x: Operand, w: Operand, rows: int, narrow: bool) -> str:
    """How groups are summed, as far as the operands allow it; `"plain"` without groups."""
    if not x.groups:
        return "plain"
    form = lowering.group_form(rows, lowering.static_size(x.values.shape, x.inner), narrow)
    if form == "fused" and not fuses(x, w):
        form = "halves"
    if form == "halves" and (w.packed is None or x.zero is not None):
        form = "loop"
    return "batch" if form == "loop" and len(x.groups) > 1 else form


def _on_cpu(cpu: Callable[[], Array], default: Callable[[], Array]) -> Array:
    """The choice where the platform is known already."""
    return cpu()


def _by_halves(x: Operand, w: Operand, left: bool = False) -> Array:
    """One product, of packed codes as they lie; with the weight on the left if `left`."""
    if w.packed is None:
        return _batched(x, w, None, None, left)
    (x0, w0), (x1, w1) = halves(x, w)
    return _batched(x0, w0, None, None, left) + _batched(x1, w1, None, None, left)


def _by_stacked_halves(x: Operand, w: Operand) -> Array:
    """One product of packed codes in groups: both halves of all groups are its batch."""
    # what makes the codes is small, and not to be made again for each half
    x = dataclasses.replace(x, values=lax.optimization_barrier(x.values))
    (x0, w0), (x1, w1) = halves(x, w)

    def stacked(a: Operand, b: Operand) -> Operand:
        def moved(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(n + 1 for n in axes)

        values = jnp.stack([a.values, b.values])
        batch = (0, *moved(a.batch))
        return Operand(values, None, None, batch, moved(a.free), moved(a.groups), moved(a.inner))

    total = jnp.sum(_left_product(stacked(x0, x1), stacked(w0, w1)), axis=0)
    return _scaled(total, x, w0, True)


def integer_sums(x: Operand, w: Operand) -> Array:
    """`sum_k q_x (q_w - z_w)` of int8 codes without groups or batch: int32, exact.

    Zero points of `x` are the caller's matter: `-z_x sum_k (q_w - z_w)` depends on the weight
    alone and is known beforehand.
    """
    count = lowering.static_size(x.values.shape, x.free)
    if count == 1:
        return lax.index_in_dim(integer_sums(_two_rows(x), w), 0, 0, keepdims=False)
    w = unpacked(w)

    def plain() -> Array:
        return _product(x, w)

    def left() -> Array:
        return _swapped(_left_product(x, w), 0, len(w.free))

    few = lowering.weight_first(count)
    total = lowering.by_platform(cpu=left, default=plain) if few else plain()
    if w.zero is None:
        return total
    rows = jnp.sum(x.values, axis=x.inner, keepdims=True, dtype=jnp.int32)
    return total - align(w.zero, w, len(x.free), 0) * align(rows, x, 0, len(w.free))


def is_integer(x: Operand) -> bool:
    """Whether sums are exact."""
    return x.values.dtype == jnp.int8


def dequantized(x: Operand) -> Array:
    """`scale (values - zero)` in float32."""
    v = x.values.astype(jnp.float32)
    if x.zero is not None:
        v = v - x.zero.astype(jnp.float32)
    return v if x.scale is None else v * x.scale


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


def _batched(
    x: Operand, w: Operand, precision: Any, sharding: Sharding | None, left: bool = False
) -> Array:
    """Groups as batch dimensions of one `dot_general`; the weight is its left side if `left`."""
    total = _left_product(x, w) if left else _product(x, w, precision, sharding)
    return _scaled(total, x, w, left)


def _product(
    x: Operand, w: Operand, precision: Any = None, sharding: Sharding | None = None
) -> Array:
    """Products of the values, summed: `[batch, groups, free of x, free of w]`."""
    return lax.dot_general(
        x.values,
        w.values,
        ((x.inner, w.inner), (x.batch + x.groups, w.batch + w.groups)),
        precision=None if is_integer(x) else precision,
        preferred_element_type=jnp.int32 if is_integer(x) else jnp.float32,
        out_sharding=None if sharding is None else sharding.of(len(x.groups)),
    )


def _left_product(x: Operand, w: Operand) -> Array:
    """The same of int8 values, the weight on the left: `[batch, groups, free of w, free of x]`."""
    return lax.dot_general(
        w.values,
        x.values,
        ((w.inner, x.inner), (w.batch + w.groups, x.batch + x.groups)),
        preferred_element_type=jnp.int32,
    )


def _swapped(total: Array, first: int, outs: int) -> Array:
    """`outs` axes from `first` on moved behind all others."""
    rest = range(first + outs, total.ndim)
    return total.transpose((*range(first), *rest, *range(first, first + outs)))


def _scaled(total: Array, x: Operand, w: Operand, left: bool) -> Array:
    """Zero points taken off a product, then scales, then the sum over groups."""
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
            count = jnp.sum(jnp.ones([x.values.shape[a] for a in x.inner], kind))
            sums = sums - count * of_x(x.zero)
            total = total + count * of_x(x.zero) * of_w(zero)
    out = total.astype(jnp.float32)
    if rest is not None and sums is not None:
        out = out - of_w(rest) * sums.astype(jnp.float32)
    if w.scale is not None:
        out = out * of_w(w.scale)
    if x.scale is not None:
        out = out * of_x(x.scale)
    first = len(x.batch)
    if x.groups:
        out = jnp.sum(out, axis=tuple(range(first, first + len(x.groups))))
    return _swapped(out, first, len(w.free)) if left else out


def _split_zero(w: Operand) -> tuple[Array | None, Array | None]:
    """A zero point as an int8 number that sums stay exact with, and what it has beyond."""
    if w.zero is None or jnp.issubdtype(w.zero.dtype, jnp.integer):
        return w.zero, None
    whole = jnp.clip(jnp.round(w.zero), -128, 127)
    return whole.astype(jnp.int32), w.zero - whole


def _loop(x: Operand, w: Operand) -> Array:
    """Groups one after the other: each product is a plain matrix product of few terms."""

    def step(total: Array, i: Array) -> tuple[Array, None]:
        return total + _by_halves(_group(x, i), _group(w, i)), None

    first = _by_halves(_group(x, 0), _group(w, 0))
    return lax.scan(step, first, jnp.arange(1, x.values.shape[x.groups[0]]))[0]


def _group(op: Operand, index: Array | int) -> Operand:
    """One group of an operand."""
    (at,) = op.groups

    def moved(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(a - (a > at) for a in axes)

    def one(a: Array) -> Array:
        return lax.dynamic_index_in_dim(a, 0 if a.shape[at] == 1 else index, at, keepdims=False)

    return Operand(
        one(op.values),
        None if op.scale is None else one(op.scale),
        None if op.zero is None else one(op.zero),
        moved(op.batch),
        moved(op.free),
        (),
        moved(op.inner),
        op.packed,
    )


def _in_float(x: Operand, w: Operand, precision: Any = None) -> Array:
    """One float product of what the codes stand for; the scale of `x` still goes last."""
    dtype = jnp.float32 if is_integer(x) else x.values.dtype
    bare = dequantized(dataclasses.replace(x, scale=None)).astype(dtype)
    left, x_over = _joined(bare, (*x.groups, *x.inner))
    weights = dequantized(w)
    if dtype == jnp.float16:  # a scale rounded up may lead beyond what float16 holds
        top = float(jnp.finfo(dtype).max)
        weights = jnp.clip(weights, -top, top)
    right, w_over = _joined(weights.astype(dtype), (*w.groups, *w.inner))
    if len(x_over) != len(w_over):
        left, x_over = bare, (*x.groups, *x.inner)
        right, w_over = weights.astype(dtype), (*w.groups, *w.inner)
    out = lax.dot_general(
        left,
        right,
        ((x_over, w_over), (x.batch, w.batch)),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    if x.scale is None:
        return out
    whole = dataclasses.replace(x, groups=(), inner=(*x.groups, *x.inner))
    return out * align(x.scale, whole, 0, len(w.free))


def _joined(a: Array, over: tuple[int, ...]) -> tuple[Array, tuple[int, ...]]:
    """Neighbouring last axes as one: a CPU takes one contracted axis several times faster."""
    first = a.ndim - len(over)
    if over != tuple(range(first, a.ndim)):
        return a, over
    return a.reshape(*a.shape[:first], math.prod(a.shape[first:])), (first,)
