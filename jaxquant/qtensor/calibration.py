"""What calibration fixed beforehand of the contractions that a parameter takes part in."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxquant.qtensor.qspec import QSpec


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("scale", "zero_point"),
    meta_fields=("spec", "source"),
)
@dataclasses.dataclass(frozen=True)
class QuantParams:
    """The values `S (q - Z)` that an activation can take.

    Attributes:
      scale: float32 `[*batch]`.
      zero_point: int32 like `scale`, in units of int8 codes; `None` where it is 0.
      spec: what it was made for; `None` where that does not matter.
      source: key of the site or the parameter whose activation it was calibrated for.
    """

    scale: Array
    zero_point: Array | None
    spec: QSpec | None = None
    source: str = ""

    def same(self, other: QuantParams) -> bool:
        """Whether both were calibrated as one grid, so that codes on one are codes on the other."""
        return self.source != "" and (self.source, self.spec) == (other.source, other.spec)

    def suits(self, spec: QSpec) -> bool:
        """Whether codes of `spec` may lie on it."""
        own = self.spec or spec
        return (own.format, own.symmetric, own.range) == (spec.format, spec.symmetric, spec.range)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("bias", "multiplier", "shift"),
    meta_fields=("chain",),
)
@dataclasses.dataclass(frozen=True)
class Folded:
    """What follows a contraction, folded into integers.

    Attributes:
      bias: int32 `[*batch, *kept]`, added to the sums: zero points and bias.
      multiplier: `[*batch, *kept]` from sums to the output's codes: float32, or int32 with `shift`.
      shift: int32 like `multiplier`, bits to the right; `None` beside a float32 multiplier.
      chain: what was folded, as primitives in order; a function that does anything else with the
        sums is computed without.
    """

    bias: Array
    multiplier: Array | None
    shift: Array | None
    chain: tuple[str, ...] = ()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("input", "output", "offset", "folded", "attention", "divisor", "outliers"),
    meta_fields=("axis", "over"),
)
@dataclasses.dataclass(frozen=True)
class Calibration:
    """What calibration fixed for a `QTensor`; every array carries the tensor's batch axes.

    Attributes:
      input: grid of the other operand of contractions.
      output: grid that integer results are requantized to; `None` where they become float.
      offset: int32 `[*batch, *kept]`, `-Z_x sum_k (q_w - Z_w)` for each index that contractions
        keep; `None` where `Z_x` is 0.
      folded: what follows the contraction, as integers.
      attention: grids of both operands for sites without a parameter, by their key. Any tensor
        whose batch axes are the loops around a site may carry its grids.
      divisor: float32 `[*batch, *channels]`, what the other operand is divided by, channel by
        channel, before it meets the codes: these stand for the weight times it. `None` is 1.
      axis: the core axes (negative) that `divisor` runs along, in its own order.
      outliers: int32 `[*batch, capacity]`, columns of the other operand that stay in float, counted
        along the core axes `over` as one; -1 for none. `None` looks for them.
      over: the core axes (negative) that `outliers` count along, in order.
    """

    input: QuantParams | None = None
    output: QuantParams | None = None
    offset: Array | None = None
    folded: Folded | None = None
    attention: dict[str, tuple[QuantParams, QuantParams]] | None = None
    divisor: Array | None = None
    axis: tuple[int, ...] = ()
    outliers: Array | None = None
    over: tuple[int, ...] = ()

    def moved(self, batch: Callable[[Array], Array] = lambda a: a) -> Calibration:
        """What is left when the values have moved to other places; `batch` acts on batch axes."""
        kept = Calibration(input=self.input, output=self.output, attention=self.attention)
        return jax.tree.map(batch, kept)


def along(divisor: Array, axes: tuple[int, ...], ndim: int) -> Array:
    """`[*batch, *channels]` laid out for an array of rank `ndim`, its channels at `axes` (< 0).

    >>> along(jnp.ones((2, 3)), (-2,), 4).shape, along(jnp.ones((2, 3)), (-1, -3), 4).shape
    ((2, 1, 3, 1), (1, 3, 1, 2))
    """
    lead = divisor.ndim - len(axes)
    order = sorted(range(len(axes)), key=lambda n: axes[n])
    divisor = jnp.transpose(divisor, [*range(lead), *(lead + n for n in order)])
    shape = [*divisor.shape[:lead], *(1,) * (ndim - lead)]
    for n, size in zip(order, divisor.shape[lead:], strict=True):
        shape[axes[n]] = size
    return divisor.reshape(shape)
