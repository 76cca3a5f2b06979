"""Contractions of a QTensor: on its codes in storage order where possible, else dequantized."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.ops import lowering
from jaxquant.ops.activations import (
    fake,
    fake_on_grid,
    has_zero,
    on_grid,
    quantize_activation,
    shared_axes,
)
from jaxquant.ops.contract import contract
from jaxquant.ops.cpu import nibbles
from jaxquant.ops.integer.static import dot_static
from jaxquant.ops.limbs import contract_limbs
from jaxquant.ops.operands import (
    Operand,
    Placement,
    arranged,
    int8_codes,
    integer_range,
    moving_scale,
    place,
    result_dtype,
    weight,
)
from jaxquant.ops.out_sharding import Sharding
from jaxquant.ops.outliers import fake_with_outliers, in_order, in_storage, product, split
from jaxquant.qtensor import (
    Outliers,
    PerTensor,
    QSpec,
    QTensor,
    QuantParams,
    dequantize,
    storage_codes,
    storage_values,
)

Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Call:
    """The static parameters of one call; `x` is the float operand, `w` the quantized one."""

    x_contract: Axes
    w_contract: Axes
    x_batch: Axes
    w_batch: Axes
    flipped: bool  # whether `w` is the left operand
    precision: Any
    preferred: Any
    out_sharding: Any
    activations: QSpec | None
    calibrated: bool = True  # whether the QTensor's calibrated grid applies
    outliers: Outliers | None = None  # which columns of `x` stay in float

    def reference(self, x: Array, w: Array) -> Array:
        """The contraction in float."""
        if self.flipped:
            contracted, batch = (self.w_contract, self.x_contract), (self.w_batch, self.x_batch)
        else:
            contracted, batch = (self.x_contract, self.w_contract), (self.x_batch, self.w_batch)
        return lax.dot_general(
            *((w, x) if self.flipped else (x, w)),
            (contracted, batch),
            precision=self.precision,
            preferred_element_type=self.preferred,
            out_sharding=self.out_sharding,
        )


def evaluated(call: Call, x: Array, q: QTensor, key: Array | None = None) -> Array:
    """The result of one call; with a `key`, `x` is rounded stochastically."""
    at = place(q, call.w_contract, call.w_batch)
    spec, grid = call.activations, _grid(call, q)
    on_codes = at is not None and spec is not None and _same_kind(q, spec, at, call, x.ndim)
    # a scale that moves to the other operand would take it off its grid
    on_codes = on_codes and not (grid is not None and at is not None and at.varies)
    if call.outliers is not None and grid is None and at is not None:
        # rows of the weight are dequantized from its storage
        on_codes = on_codes and not at.varies and call.out_sharding is None

    def rounded(x: Array) -> Array:
        if spec is None or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        if call.outliers is not None and grid is None:
            fixed = _fixed(call, q)
            columns = None if fixed is None else in_order(*fixed, q, call.w_contract)
            over = call.x_contract, call.x_batch
            return fake_with_outliers(x, spec, *over, call.outliers, columns)
        return fake(x, spec, call.x_contract, key) if grid is None else fake_on_grid(x, grid, spec)

    if not on_codes:
        x = rounded(x)
    if at is None or not _as_stored(call, x, q, at, on_codes):
        return call.reference(rounded(x) if on_codes else x, dequantize(q))
    if on_codes and grid is not None and spec is not None:
        over = call.x_contract, call.w_contract
        if not call.w_batch and call.out_sharding is None and not q.spec.format.packed:
            out = dot_static(on_grid(x, grid, spec), q, grid, over, call.flipped)
            if out is not None:
                return out.astype(result_dtype(x.dtype, q.dtype, call.preferred))
    operand = arranged(x, call.x_contract, call.x_batch, at, call.w_contract)
    if at.varies:
        scale = moving_scale(q, at, len(operand.free))
        operand = dataclasses.replace(operand, values=operand.values.astype(jnp.float32) * scale)
    if spec is not None and on_codes:
        out = _quantized(call, operand, q, at, spec, grid, key)
    else:
        out = _weight_only(call, operand, q, at)
    return finish(call, x, q, at, out)


def _limits(q: QTensor) -> tuple[int, int, float] | None:
    return None if q.codebook is not None else integer_range(q.spec.format)


def _same_kind(q: QTensor, spec: QSpec, at: Placement, call: Call, ndim: int) -> bool:
    """Whether codes of both operands can be multiplied, and scales applied after the sum."""
    shared = shared_axes(spec, call.x_contract, ndim)
    if shared is None or len(shared) not in (len(call.x_contract), ndim):
        return False
    if _limits(q) is None:
        # both operands in one float8 format
        return spec.format == q.spec.format and spec.format.is_float and spec.format.bits == 8
    terms = math.prod(at.block(s) if s in at.split else at.padded[s] for s in at.contract)
    fits = lowering.fits_int32(terms, has_zero(spec), q.zero_point is not None or has_zero(q.spec))
    return spec.format.is_integer and integer_range(spec.format) is not None and fits


def _as_stored(call: Call, x: Array, q: QTensor, at: Placement, on_codes: bool) -> bool:
    """Whether codes can be contracted in storage order."""
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16) or q.spec.format.bits > 8:
        return False
    if 0 in q.shape or any(isinstance(n, int) and n == 0 for n in x.shape):
        return False
    if at.varies:
        # scales of contracted indices move to the other operand, which is rounded only after that
        changes_sides = at.uniform and q.zero_point is None
        if not changes_sides or (call.activations is not None and not on_codes):
            return False
    if call.out_sharding is not None:
        # axes of the result have to be storage axes, so that the sharding applies to them
        return not at.split and all(
            len(at.members[s]) == 1 and at.padded[s] == at.size[s] for s in at.keep
        )
    return True


def _grid(call: Call, q: QTensor) -> QuantParams | None:
    """The calibrated grid of the other operand, if the contraction shares its batch axes."""
    grid = None if q.calibration is None else q.calibration.input
    if grid is None or call.activations is None or not call.calibrated:
        return None
    if not grid.suits(call.activations):
        return None
    lead = grid.scale.ndim
    return grid if call.w_batch[:lead] == tuple(range(lead)) else None


def _quantized(
    call: Call,
    x: Operand,
    q: QTensor,
    at: Placement,
    spec: QSpec,
    grid: QuantParams | None,
    key: Array | None,
) -> Array:
    """Contracts the codes of both operands."""
    everything = isinstance(spec.granularity, PerTensor)
    shared = tuple(range(x.values.ndim)) if everything else (*x.groups, *x.inner)
    if grid is None and call.outliers is not None:
        fixed = _fixed(call, q)
        positions = None if fixed is None else in_storage(*fixed, q, at)
        left, floats, columns = split(x, spec, call.outliers, positions)
        right = int8_operand(q, at, x.values)
        total = contract(left, right, call.precision, None, narrow=q.spec.format.packed)
        return total + product(floats, q, at, columns)
    if grid is None:
        codes, scale, zero = quantize_activation(x.values, spec, shared, key)
    else:
        rest = range(grid.scale.ndim, x.values.ndim)  # batch axes come first
        grid = jax.tree.map(lambda a: lax.expand_dims(a, rest), grid)
        codes, scale, zero = on_grid(x.values, grid, spec), grid.scale, grid.zero_point
    left = dataclasses.replace(x, values=codes, scale=scale, zero=zero)
    right = int8_operand(q, at, x.values) if _limits(q) else weight(q, at, storage_codes(q))
    narrow = q.spec.format.packed
    sharding = sharding_of(call, x, at)
    return contract(left, right, call.precision, sharding, narrow=narrow)


def _fixed(call: Call, q: QTensor) -> tuple[Array, Axes] | None:
    """The calibrated outlier columns and their axes, if these are contracted here."""
    calibration = q.calibration
    if calibration is None or calibration.outliers is None or calibration.outliers.ndim != 1:
        return None
    if {a + q.ndim for a in calibration.over} != set(call.w_contract):
        return None
    return calibration.outliers, calibration.over


def _weight_only(call: Call, x: Operand, q: QTensor, at: Placement) -> Array:
    """Contracts float activations with unscaled codes."""
    sharding = sharding_of(call, x, at)

    def computed(dtype: Any) -> Array:
        # codes less zero points are exact in any float dtype
        right = dataclasses.replace(weight(q, at, storage_values(q).astype(dtype)), zero=None)
        left = dataclasses.replace(x, values=x.values.astype(dtype))
        return contract(left, right, call.precision, sharding)

    def converted() -> Array:
        return lowering.by_compute_dtype(x.values.dtype, computed)

    rows = lowering.static_size(x.values.shape, (*x.batch, *x.free))
    group = lowering.static_size(x.values.shape, x.inner) if x.groups else None
    packed, narrow = nibbles.fits(q, at), q.spec.format.packed
    terms = math.prod(at.padded[s] for s in at.contract)
    fits = lowering.fits_int32(terms, False, q.zero_point is not None or has_zero(q.spec))
    if _limits(q) is not None and fits and lowering.limbs_win(rows, group, packed):
        return lowering.by_platform(
            cpu=lambda: contract_limbs(x, int8_operand(q, at, x.values), sharding, narrow),
            default=converted,
        )
    return converted()


def int8_operand(q: QTensor, at: Placement, x: Array) -> Operand:
    """A QTensor as an operand of int8 codes; 4-bit codes stay packed if the form allows it."""
    limits = _limits(q)
    assert limits is not None
    if nibbles.fits(q, at) and lowering.undivided(x, q.codes):
        return weight(q, at, q.codes, limits[2], packed=q.spec.format)
    codes, shift = int8_codes(storage_codes(q), q.spec.format)
    return weight(q, at, codes, limits[2], shift)


def sharding_of(call: Call, x: Operand, at: Placement) -> Sharding | None:
    """The requested sharding, in the order `[batch, free of x, kept storage axes]`."""
    free, kept = len(x.free), len(at.keep)
    first, second = (kept, free) if call.flipped else (free, kept)
    asked = Sharding.asked(call.out_sharding, len(x.batch), first, second)
    if asked is None:
        return None
    of_x, of_w = (asked.w, asked.x) if call.flipped else (asked.x, asked.w)
    axes = [at.members[s][0] for s in at.keep]
    in_storage = tuple(of_w[sorted(axes).index(a)] for a in axes)
    return Sharding(asked.mesh, asked.batch, of_x, in_storage)


def finish(call: Call, x: Array, q: QTensor, at: Placement, out: Array) -> Array:
    """Unpads and splits the kept storage axes, and puts all axes in the result's order."""
    lead = out.ndim - len(at.keep)
    for i, s in enumerate(at.keep):
        if at.padded[s] != at.size[s]:
            out = lax.slice_in_dim(out, 0, at.size[s], axis=lead + i)
    kept = [a for s in at.keep for a in at.members[s]]
    if len(kept) != len(at.keep):
        out = out.reshape(*out.shape[:lead], *(q.shape[a] for a in kept))
    nb = len(call.x_batch)
    tail = [lead + kept.index(a) for a in sorted(kept)]
    middle = list(range(nb, lead))
    order = [*range(nb), *(tail + middle if call.flipped else middle + tail)]
    out = jnp.transpose(out, order).astype(result_dtype(x.dtype, q.dtype, call.preferred))
    # the product takes the sharding of scales that are sharded along kept axes
    return out if call.out_sharding is None else jax.sharding.reshard(out, call.out_sharding)
