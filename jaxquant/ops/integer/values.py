"""Activations that stay integers from one contraction to the next.

A contraction returns an `Accumulator`: int32 sums, and the operations since by vectors over the
channels (a bias, a normalisation with fixed statistics). On the grid of its consumer it becomes an
`Activation`, int8 codes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxquant.ops.activations import int8_limits, on_grid
from jaxquant.ops.integer.requantize import fixed_point, rescaled
from jaxquant.qtensor import Folded, QuantParams

MOST = 2**30  # with a larger bias the sums might not fit into 32 bits
_PARTS = float(2**20)
_LEAST = float(jnp.finfo(jnp.float32).tiny) * _PARTS


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "grid"),
    meta_fields=("dtype", "source", "added"),
)
@dataclasses.dataclass(frozen=True)
class Activation:
    """`S (q - Z)` with one scale per tensor.

    Attributes:
      codes: int8.
      grid: scale and zero point, scalars, and the format of the codes.
      dtype: name of the float dtype of the dequantized array.
      source: keys of the sites whose sums it comes from.
      added: keys of the sites whose codes were added to these sums; they may be on any grid.
    """

    codes: Array
    grid: QuantParams
    dtype: str
    source: tuple[str, ...]
    added: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(self.codes.shape)

    @property
    def ndim(self) -> int:
        """Rank of the array."""
        return len(self.codes.shape)

    def floats(self) -> Array:
        """The dequantized array."""
        values = self.codes.astype(jnp.float32)
        if self.grid.zero_point is not None:
            values = values - self.grid.zero_point.astype(jnp.float32)
        return (values * self.grid.scale).astype(self.dtype)

    def clamped(self, low: Any = None, high: Any = None) -> Activation:
        """Clips values to float scalars, by clipping codes to those of the scalars."""
        codes, spec = self.codes, self.grid.spec
        assert spec is not None
        if low is not None:
            codes = jnp.maximum(codes, on_grid(jnp.asarray(low), self.grid, spec))
        if high is not None:
            codes = jnp.minimum(codes, on_grid(jnp.asarray(high), self.grid, spec))
        return dataclasses.replace(self, codes=codes)


_SUM_DATA = ("total", "scale", "offset", "gain", "bias", "folded", "output")
_SUM_META = ("channels", "key", "requantize", "dtype", "chain")


@functools.partial(jax.tree_util.register_dataclass, data_fields=_SUM_DATA, meta_fields=_SUM_META)
@dataclasses.dataclass(frozen=True)
class Accumulator:
    """`gain * scale * (total + offset) + bias`, everything but `total` a vector over channels.

    Attributes:
      total: int32 sums.
      scale: float32 `S_x S_w`, laid out to broadcast with `total`.
      offset: int32 likewise; `None` is 0.
      gain: float32 likewise, the factor of the sums so far; `None` is 1.
      bias: float32 likewise, the term added so far; `None` is 0.
      folded: precomputed bias, multiplier and shift, laid out likewise.
      output: grid that the result is requantized to; `None` where it becomes float.
      channels: axes that the vectors vary along.
      key: the site's key.
      requantize: `"float32"` or `"fixed_point"`.
      dtype: name of the float dtype of the dequantized array.
      chain: the primitives applied so far; `folded` is used if its `chain` is equal.
    """

    total: Array
    scale: Array
    offset: Array | None
    gain: Array | None
    bias: Array | None
    folded: Folded | None
    output: QuantParams | None
    channels: tuple[int, ...]
    key: str
    requantize: str
    dtype: str
    chain: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(self.total.shape)

    @property
    def ndim(self) -> int:
        """Rank of the array."""
        return len(self.total.shape)

    def scaled(self, factor: Array, step: str) -> Accumulator:
        """Times a vector over the channels, or a scalar."""
        gain = factor if self.gain is None else self.gain * factor
        bias = None if self.bias is None else self.bias * factor
        return dataclasses.replace(self, gain=gain, bias=bias, chain=(*self.chain, step))

    def shifted(self, term: Array, step: str) -> Accumulator:
        """Plus a vector over the channels, or a scalar."""
        bias = term if self.bias is None else self.bias + term
        return dataclasses.replace(self, bias=bias, chain=(*self.chain, step))

    @property
    def _known(self) -> bool:
        return self.folded is not None and self.folded.chain == self.chain

    @property
    def alone(self) -> Array | None:
        """Mask of the channels in which only the bias counts; `None` if there can be none.

        Their gain is 0, or their bias is at least 2^30 units, beside which sums are negligible.
        """
        unit = self.scale if self.gain is None else self.scale * self.gain
        if self.bias is None:
            return None if self.gain is None else unit == 0
        return jnp.abs(self.bias) >= MOST * jnp.abs(unit)

    @property
    def _unit(self) -> Array:
        """The value of one unit of the sums; a fraction of the bias where only that counts."""
        unit, alone = self.scale if self.gain is None else self.scale * self.gain, self.alone
        if alone is None:
            return unit
        part = self.scale
        if self.bias is not None:
            part = jnp.maximum(jnp.abs(self.bias), _LEAST) / _PARTS
        return jnp.where(alone, part, unit)

    def _sums(self) -> Array:
        total, alone = self.total, None if self._known else self.alone
        if alone is not None:
            total = jnp.where(alone, 0, total)
        return total + self.fold().bias

    def fold(self) -> Folded:
        """The operations on the sums as bias, multiplier and shift.

        `bias = offset + round(bias / (gain S_x S_w))` in units of the sums, and
        `M = gain S_x S_w / S_y`, float32.
        """
        if self._known:
            assert self.folded is not None
            return self.folded
        unit = self._unit
        whole = jnp.zeros(unit.shape, jnp.int32) if self.offset is None else self.offset
        alone = self.alone
        if alone is not None:
            whole = jnp.where(alone, 0, whole)
        if self.bias is not None:
            units = jnp.clip(jnp.round(_quotient(self.bias, unit)), -MOST, MOST)
            whole = whole + units.astype(jnp.int32)
        multiplier = shift = None
        if self.output is not None:
            multiplier = _quotient(unit, self.output.scale)
            if self.requantize == "fixed_point":
                multiplier, shift = fixed_point(multiplier)
        return Folded(whole, multiplier, shift, self.chain)

    def floats(self) -> Array:
        """The dequantized array."""
        return (self._sums().astype(jnp.float32) * self._unit).astype(self.dtype)

    def activation(self) -> Activation | None:
        """The result as codes of the output grid, if it has one."""
        if self.output is None:
            return None
        by = self.fold()
        assert by.multiplier is not None
        return self.coded(rescaled(self._sums(), by.multiplier, by.shift), (self.key,))

    def fine(self) -> Array:
        """The result in units of `2^-12` of the output's scale, int32."""
        by = self.fold()
        assert by.multiplier is not None
        if by.shift is None:
            return _bounded(rescaled(self._sums(), by.multiplier * np.float32(2.0**_FRACTION)))
        return _bounded(rescaled(self._sums(), by.multiplier, by.shift - _FRACTION))

    def coded(self, values: Array, source: tuple[str, ...]) -> Activation:
        """Multiples of the output's scale as codes of its grid."""
        assert self.output is not None and self.output.spec is not None
        low, high = int8_limits(self.output.spec.format)
        if self.output.zero_point is not None:
            # clipped first, so that the sum does not overflow
            values = jnp.clip(values, -512, 512) + self.output.zero_point.astype(values.dtype)
        codes = jnp.clip(values, low, high).astype(jnp.int8)
        return Activation(codes, self.output, self.dtype, source)


Integers = Activation | Accumulator

_FRACTION = 12  # fractional bits while two activations are added


def added(a: Integers, b: Integers) -> Activation | None:
    """The sum of two integer activations, on the output grid of the first `Accumulator`.

    `q = round((a' + b') / 2^12) + Z_y` with `a' = round(2^12 M_a total_a)`: each operand is
    rescaled to the output with 12 fractional bits. `None` if there is no output grid.
    """
    first, second = (a, b) if isinstance(a, Accumulator) else (b, a)
    if not isinstance(first, Accumulator) or first.output is None:
        return None
    other: Integers | None = second
    if isinstance(second, Accumulator):
        together = second.output is not None and second.output.same(first.output)
        other = second if together else second.activation()
    if other is None:
        return None
    term = other.fine() if isinstance(other, Accumulator) else _fine_codes(other, first)
    half = jnp.int32(1 << (_FRACTION - 1))
    codes = lax.shift_right_arithmetic(first.fine() + term + half, jnp.int32(_FRACTION))
    total = first.coded(codes, (first.key,))
    if isinstance(other, Accumulator):
        return dataclasses.replace(total, source=(first.key, other.key))
    return dataclasses.replace(total, added=(*other.source, *other.added))


def _fine_codes(x: Activation, like: Accumulator) -> Array:
    """An activation in units of `2^-12` of the output's scale, int32."""
    assert like.output is not None
    total = x.codes.astype(jnp.int32)
    if x.grid.zero_point is not None:
        total = total - x.grid.zero_point
    multiplier = _quotient(x.grid.scale, like.output.scale) * np.float32(2.0**_FRACTION)
    by = fixed_point(multiplier) if like.requantize == "fixed_point" else (multiplier, None)
    return _bounded(rescaled(total, *by))


def _quotient(a: Array, b: Array) -> Array:
    """`a / b`, rounded once: XLA might multiply by `1 / b` where `b` is a broadcast scalar."""
    a, b = jnp.broadcast_arrays(a, b)
    return a / lax.optimization_barrier(b)


def _bounded(values: Array) -> Array:
    """Values clipped far outside the range of codes, so that an int32 holds the sum of two."""
    return jnp.clip(values, -(1 << 24), 1 << 24).astype(jnp.int32)


def is_integers(x: Any) -> TypeGuard[Integers]:
    """Whether `x` is an integer activation."""
    return isinstance(x, (Activation, Accumulator))
