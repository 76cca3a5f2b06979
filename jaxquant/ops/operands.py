"""Operands of a contraction: integers or floats, their scales, and the roles of their axes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from jaxquant.numerics import Format, decode
from jaxquant.qtensor import QTensor, storage_scale

_DATA = ("values", "scale", "zero")
_META = ("batch", "free", "groups", "inner", "packed")


@functools.partial(jax.tree_util.register_dataclass, data_fields=_DATA, meta_fields=_META)
@dataclasses.dataclass(frozen=True)
class Operand:
    """`scale * (values - zero)`, and the role of each axis in a contraction.

    Attributes:
      values: int8, or float; contracted axes with groups are split in two, `[.., g, b, ..]`.
      scale: float32 of the same rank, size 1 where shared, always so on `inner`; `None` is 1.
      zero: int32 shaped like `scale`, or float32 where it need not be an integer; `None` is 0.
      batch: axes shared with the other operand, in the result's order.
      free: axes of the result, ascending, as `lax.dot_general` gives them.
      groups: contracted axes along which scales vary: each index has its own partial sum.
      inner: contracted axes that are summed first.
      packed: the 4-bit format of codes that are packed along the last axis, which is inner; `None`
        if `values` are not packed.
    """

    values: Array
    scale: Array | None
    zero: Array | None
    batch: tuple[int, ...]
    free: tuple[int, ...]
    groups: tuple[int, ...] = ()
    inner: tuple[int, ...] = ()
    packed: Format | None = None


@dataclasses.dataclass(frozen=True)
class Placement:
    """The role of each storage axis of a QTensor in a contraction, leading batch axes first.

    Attributes:
      batch: storage axes that are batch dimensions, in the order of the dimension numbers.
      keep: storage axes of the result, in storage order.
      contract: storage axes that are summed over, in storage order.
      members: for each storage axis, the QTensor's axes (from 0) flattened into it.
      size: sizes of the storage axes before padding.
      padded: sizes of the storage axes.
      groups: numbers of scales along the storage axes.
    """

    batch: tuple[int, ...]
    keep: tuple[int, ...]
    contract: tuple[int, ...]
    members: tuple[tuple[int, ...], ...]
    size: tuple[int, ...]
    padded: tuple[int, ...]
    groups: tuple[int, ...]

    def block(self, axis: int) -> int:
        """How many indices of a storage axis share one scale."""
        return self.padded[axis] // self.groups[axis] if self.groups[axis] else 1

    @property
    def split(self) -> tuple[int, ...]:
        """Contracted axes in groups: each group has a partial sum and a scale."""
        if self.varies:
            return ()
        return tuple(s for s in self.contract if self.groups[s] > 1 and self.block(s) > 1)

    @property
    def varies(self) -> bool:
        """Whether some contracted axis has a scale for each index."""
        return any(self.groups[s] > 1 and self.block(s) == 1 for s in self.contract)

    @property
    def uniform(self) -> bool:
        """Whether scales are constant along kept axes and so can move to the other operand."""
        return all(self.groups[s] <= 1 for s in self.keep)


def members(q: QTensor) -> tuple[tuple[int, ...], ...]:
    """For each storage axis, leading batch axes first, the axes (from 0) of `q` it holds."""
    lead = len(q.batch)
    return tuple((i,) for i in range(lead)) + tuple(
        tuple(a + q.ndim for a in merged) for merged in q.axes
    )


def place(q: QTensor, contract: Sequence[int], batch: Sequence[int]) -> Placement | None:
    """Maps a contraction over axes of `q` to its storage; `None` if a storage axis mixes roles.

    A batch dimension must be a separate storage axis without padding.
    """
    parts = members(q)
    size, padded, groups = q.batch + q.storage, q.batch + q.padded, q.batch + q.groups
    keep, summed = [], []
    for s, merged in enumerate(parts):
        if merged and all(a in contract for a in merged):
            summed.append(s)
        elif not any(a in contract or a in batch for a in merged):
            keep.append(s)
        elif not (len(merged) == 1 and merged[0] in batch and size[s] == padded[s]):
            return None
    order = tuple(parts.index((a,)) for a in batch)
    return Placement(order, tuple(keep), tuple(summed), parts, size, padded, groups)


def integer_range(fmt: Format) -> tuple[int, int, float] | None:
    """`(lowest, highest, unit)` of a format whose values are `unit` times integers within int8.

    Unsigned 8-bit codes count too: shifted by 128 they are int8 with a zero point.

    >>> from jaxquant.numerics import get
    >>> integer_range(get("int4")), integer_range(get("float4_e2m1fn"))
    ((-8, 7, 1.0), (-12, 12, 0.5))
    """
    if fmt.is_integer:
        return (fmt.qmin, fmt.qmax, 1.0) if fmt.bits <= 8 else None
    unit = fmt.smallest_subnormal if fmt.is_float else None
    if unit is None or fmt.has_nan or fmt.has_inf or fmt.max / unit > 127:
        return None
    return int(fmt.min / unit), int(fmt.max / unit), unit


def int8_codes(codes: Array, fmt: Format) -> tuple[Array, int]:
    """Codes as int8 integers, and the shift subtracted from them (128 for unsigned 8-bit codes)."""
    if fmt.is_float:
        limits = integer_range(fmt)
        assert limits is not None
        return (decode(codes, fmt) / limits[2]).astype(jnp.int8), 0
    if fmt.qmax > 127:
        return lax.bitcast_convert_type(codes ^ jnp.uint8(128), jnp.int8), 128
    return codes.astype(jnp.int8), 0


def align(a: Array, op: Operand, before: int, after: int) -> Array:
    """Lays a scale of `op` out for the result `[batch, groups, free of x, free of w]`.

    `before` and `after` are the numbers of the other operand's free axes on either side.
    """
    lead = len(op.batch) + len(op.groups)
    rank = lead + len(op.free)
    order = op.batch + op.groups + op.free + op.inner
    if order != tuple(range(a.ndim)):
        a = lax.transpose(a, order)
    a = lax.squeeze(a, range(rank, a.ndim))
    new = [*range(lead, lead + before), *range(rank + before, rank + before + after)]
    return lax.expand_dims(a, new)


def weight(
    q: QTensor,
    at: Placement,
    values: Array,
    unit: float = 1.0,
    shift: int = 0,
    packed: Format | None = None,
) -> Operand:
    """The operand of a QTensor: `values` are its storage codes in the form to contract.

    Codes stay in storage order: contracted axes with groups are only split, `[k] -> [g, b]`. A
    scale for each contracted index is left out: it moves to the other operand.
    """
    shape: list[int] = []
    where: list[int] = []
    groups, inner = [], []
    for s, n in enumerate(at.padded):
        where.append(len(shape))
        if s in at.split:
            groups.append(len(shape))
            shape.append(at.groups[s])
        if s in at.contract:
            inner.append(len(shape))
        shape.append(at.block(s) if s in at.split else n)

    def full(a: Array) -> Array:
        for s in (*at.batch, *at.keep):
            if at.groups[s] > 1 and at.block(s) > 1:
                a = jnp.repeat(a, at.block(s), axis=s, total_repeat_length=at.padded[s])
        return lax.expand_dims(a, inner_of_groups)

    if packed is not None:
        shape[-1] //= 2
    inner_of_groups = [g + 1 for g in groups]
    scale = zero = None
    if not at.varies:
        scale = full(storage_scale(q))
    if unit != 1.0:
        scale = unit * (jnp.ones((1,) * len(shape)) if scale is None else scale)
    if q.zero_point is not None:
        exact = jnp.int32 if q.spec.zero_dtype is None else jnp.float32
        zero = full(q.zero_point.astype(exact)) - shift
    elif shift:
        zero = jnp.full((1,) * len(shape), -shift, jnp.int32)
    return Operand(
        values if values.shape == tuple(shape) else values.reshape(shape),
        scale,
        zero,
        tuple(where[s] for s in at.batch),
        tuple(where[s] for s in at.keep),
        tuple(groups),
        tuple(inner),
        packed,
    )


def moving_scale(q: QTensor, at: Placement, free: int) -> Array:
    """The scale of a QTensor laid out for the other operand, `[batch, 1 (free), contracted]`."""
    scale = storage_scale(q)
    for s in (*at.batch, *at.contract):
        if at.groups[s] > 1 and at.block(s) > 1:
            scale = jnp.repeat(scale, at.block(s), axis=s, total_repeat_length=at.padded[s])
    scale = jnp.transpose(scale, (*at.batch, *at.keep, *at.contract))
    nb, nk = len(at.batch), len(at.keep)
    return scale.reshape(*scale.shape[:nb], *(1,) * free, *scale.shape[nb + nk :])


def arranged(
    x: Array, contract: Sequence[int], batch: Sequence[int], at: Placement, order: Sequence[int]
) -> Operand:
    """Lays the other operand out like a QTensor's storage: `[batch, free, contracted]`.

    Axis `contract[i]` of `x` is contracted with axis `order[i]` of the QTensor. Contracted axes
    are permuted, merged, padded with zeros and split in groups as the codes are.
    """
    x_axis = dict(zip(order, contract, strict=True))
    free = [a for a in range(x.ndim) if a not in contract and a not in batch]
    last = [x_axis[a] for s in at.contract for a in at.members[s]]
    x = jnp.transpose(x, [*batch, *free, *last])
    lead = x.shape[: len(batch) + len(free)]
    sizes = [at.size[s] for s in at.contract]
    if x.shape[len(lead) :] != tuple(sizes):
        x = x.reshape(*lead, *sizes)
    pads = [at.padded[s] - at.size[s] for s in at.contract]
    if any(pads):
        x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, n) for n in pads])
    shape, groups, inner = list(lead), [], []
    for s in at.contract:
        if s in at.split:
            groups.append(len(shape))
            shape.append(at.groups[s])
            inner.append(len(shape))
            shape.append(at.block(s))
        else:
            inner.append(len(shape))
            shape.append(at.padded[s])
    if x.shape != tuple(shape):
        x = x.reshape(shape)
    nb = len(batch)
    return Operand(
        x,
        None,
        None,
        tuple(range(nb)),
        tuple(range(nb, len(lead))),
        tuple(groups),
        tuple(inner),
    )


def result_dtype(a: DTypeLike, b: DTypeLike, preferred: DTypeLike | None) -> np.dtype:
    """The dtype of the result of `lax.dot_general`.

    >>> result_dtype("bfloat16", "float32", None).name
    'float32'
    """
    if preferred is not None:
        return jnp.dtype(preferred)
    dtype = jnp.promote_types(a, b)
    if dtype in (a, b):
        return jnp.dtype(dtype)
    # bfloat16 with float16: JAX's arithmetic and its contractions disagree
    one = [jax.ShapeDtypeStruct((1,), d) for d in (a, b)]
    dot = functools.partial(lax.dot_general, dimension_numbers=(((0,), (0,)), ((), ())))
    return jax.eval_shape(dot, *one).dtype
