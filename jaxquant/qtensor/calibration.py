"""Static calibration data for the contractions that use a parameter."""

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
    """Static scale and zero point of an activation: `r = S (q - Z)`.

    Attributes:
      scale: float32 `[*batch]`.
      zero_point: int32 like `scale`, in units of int8 codes; `None` where it is 0.
      spec: the `QSpec` it was calibrated for; `None` fits any.
      source: key of the site or the parameter whose activation was calibrated.
    """

    scale: Array
    zero_point: Array | None
    spec: QSpec | None = None
    source: str = ""

    def same(self, other: QuantParams) -> bool:
        """Whether both have the same source and spec, so that codes of one are valid for both."""
        return self.source != "" and (self.source, self.spec) == (other.source, other.spec)

    def suits(self, spec: QSpec) -> bool:
        """Whether codes of `spec` can use this scale and zero point."""
        own = self.spec or spec
        return (own.format, own.symmetric, own.range) == (spec.format, spec.symmetric, spec.range)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("bias", "multiplier", "shift"),
    meta_fields=("chain",),
)
@dataclasses.dataclass(frozen=True)
class Folded:
    """Operations after a contraction, folded into integer arithmetic.

    Attributes:
      bias: int32 `[*batch, *kept]`, added to the sums: zero points and bias.
      multiplier: `[*batch, *kept]` from sums to the output's codes: float32, or int32 with `shift`.
      shift: int32 like `multiplier`, a right shift in bits; `None` for a float32 multiplier.
      chain: the folded primitives, in order; not used where a function applies other primitives to
        the sums.
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
    """Calibration data of a `QTensor`; every array has the tensor's batch axes.

    Attributes:
      input: scale and zero point of the other operand of contractions.
      output: those that integer results are requantized to; `None` where results become float.
      offset: int32 `[*batch, *kept]`, `-Z_x sum_k (q_w - Z_w)` for each index of the axes that are
        not contracted; `None` where `Z_x` is 0.
      folded: the operations after the contraction, as integers.
      attention: scales and zero points of both operands of sites without a parameter, by site key.
        Any tensor whose batch axes are the loops around a site may carry them.
      divisor: float32 `[*batch, *channels]`, divides the other operand by channel before the
        contraction; the codes encode the weight times it. `None` is 1.
      axis: the core axes (negative) of `divisor`, in order.
      outliers: int32 `[*batch, capacity]`, indices of the other operand's columns that stay in
        float, along the flattened core axes `over`; -1 pads. `None` finds them at run time.
      over: the core axes (negative) that `outliers` indexes, flattened in order.
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
        """The data still valid after the core axes changed; `batch` acts on batch axes."""
        rest = Calibration(input=self.input, output=self.output, attention=self.attention)
        return jax.tree.map(batch, rest)


def along(divisor: Array, axes: tuple[int, ...], ndim: int) -> Array:
    """`[*batch, *channels]` broadcastable to an array of rank `ndim` with channels at `axes` (< 0).

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
