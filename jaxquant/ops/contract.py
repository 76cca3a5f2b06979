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
from jaxquant.qtensor import magnitude


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
    if rows == 1:
        two = sharding.one_more() if sharding else None
        product = contract(_two_rows(x), w, precision, two, on_cpu, narrow)
        return lax.index_in_dim(product, 0, len(x.batch), keepdims=False)
    form = "plain"
    if x.groups:
        group = lowering.static_size(x.values.shape, x.inner)
        form = lowering.group_form(rows, group, narrow)
        form = "batch" if form == "loop" and len(x.groups) > 1 else form

    def batched() -> Array:
        return _batched(x, unpacked(w), precision, sharding)

    if form == "loop":
        return choose(cpu=lambda: _loop(x, w), default=batched)
    if form == "float":
        return choose(cpu=lambda: _in_float(x, unpacked(w)), default=batched)
    if form == "plain" and w.packed is not None:
        return choose(cpu=lambda: _by_halves(x, w), default=batched)
    return batched()


def _on_cpu(cpu: Callable[[], Array], default: Callable[[], Array]) -> Array:
    """The choice where the platform is known already."""
    return cpu()


def _by_halves(x: Operand, w: Operand) -> Array:
    """One product, of packed codes as they lie."""
    if w.packed is None:
        return _batched(x, w, None, None)
    (x0, w0), (x1, w1) = halves(x, w)
    return _batched(x0, w0, None, None) + _batched(x1, w1, None, None)


def integer_sums(x: Operand, w: Operand) -> Array:
    """`sum_k q_x (q_w - z_w)` of int8 codes without groups or batch: int32, exact.

    Zero points of `x` are the caller's matter: `-z_x sum_k (q_w - z_w)` depends on the weight
    alone and is known beforehand.
    """
    if lowering.static_size(x.values.shape, x.free) == 1:
        return lax.index_in_dim(integer_sums(_two_rows(x), w), 0, 0, keepdims=False)
    w = unpacked(w)
    total = lax.dot_general(
        x.values, w.values, ((x.inner, w.inner), ((), ())), preferred_element_type=jnp.int32
    )
    if w.zero is None:
        return total
    rows = jnp.sum(x.values, axis=x.inner, keepdims=True, dtype=jnp.int32)
    return total - align(w.zero, w, len(x.free), 0) * align(rows, x, 0, len(w.free))


def contract_limbs(
    x: Operand, w: Operand, sharding: Sharding | None = None, narrow: bool = False
) -> Array:
    """`contract` of a float `x` with an int8 `w`, `x` as two int8 numbers of 15 bits together.

    `x ~ S (128 q_hi + q_lo)` with one `S = amax / 16319` for each row, so the error of a result is
    at most `S / 2 sum_k |w_k|`, 2^-15 of what the row's largest magnitude could reach.
    """
    v, over = x.values.astype(jnp.float32), (*x.groups, *x.inner)
    amax = jnp.max(magnitude(v), axis=over, keepdims=True, initial=0.0)
    finite = jnp.isfinite(amax)
    tiny = float(jnp.finfo(jnp.float32).tiny)
    scale = jnp.where(amax == 0, 1.0, jnp.maximum(amax / 16319.0, tiny))
    q = jnp.where(finite, jnp.round(v / scale), 0.0)
    high = jnp.round(q / 128.0)
    both = jnp.stack(
        [high.astype(jnp.int8), (q - 128.0 * high).astype(jnp.int8)], axis=_first_free(x)
    )
    two = dataclasses.replace(_new_axis(x), values=both)
    spec = sharding.one_more() if sharding else None
    product = contract(two, w, None, spec, on_cpu=True, narrow=narrow)
    first, second = (lax.index_in_dim(product, i, len(x.batch), keepdims=False) for i in (0, 1))
    whole = dataclasses.replace(x, groups=(), inner=over)
    scale = jnp.where(finite, scale, jnp.nan)
    return (128.0 * first + second) * align(scale, whole, 0, len(w.free))


def is_integer(x: Operand) -> bool:
    """Whether sums are exact."""
    return x.values.dtype == jnp.int8


def dequantized(x: Operand) -> Array:
    """`scale (values - zero)` in float32."""
    v = x.values.astype(jnp.float32)
    if x.zero is not None:
        v = v - x.zero.astype(jnp.float32)
    return v if x.scale is None else v * x.scale


def _first_free(x: Operand) -> int:
    """Where a new axis has to go to come before the other free ones, in results too."""
    return min(x.free, default=len(x.batch))


def _new_axis(x: Operand) -> Operand:
    """A new first free axis of size 1."""
    at = _first_free(x)

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
    one = _new_axis(x)
    pad = [(0, int(a == one.free[0])) for a in range(one.values.ndim)]
    return dataclasses.replace(one, values=jnp.pad(one.values, pad))


def _batched(x: Operand, w: Operand, precision: Any, sharding: Sharding | None) -> Array:
    """Groups as batch dimensions of one `dot_general`."""
    kind = jnp.int32 if is_integer(x) else jnp.float32
    total = lax.dot_general(
        x.values,
        w.values,
        ((x.inner, w.inner), (x.batch + x.groups, w.batch + w.groups)),
        precision=None if is_integer(x) else precision,
        preferred_element_type=kind,
        out_sharding=None if sharding is None else sharding.of(len(x.groups)),
    )

    def of_x(a: Array) -> Array:
        return align(a, x, 0, len(w.free))

    def of_w(a: Array) -> Array:
        return align(a, w, len(x.free), 0)

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
    return jnp.sum(out, axis=tuple(range(first, first + len(x.groups)))) if x.groups else out


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
