"""Contractions whose results stay integers, and vectors folded into them beforehand."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.ops.convolve import Conv
from jaxquant.ops.integer.static import (
    Sums,
    conv_sums,
    dot_sums,
    plain_place,
    sum_offset,
    sum_scale,
)
from jaxquant.ops.integer.values import MOST, Accumulator
from jaxquant.qtensor import Folded, QTensor


def dot_integer(
    codes: Array, q: QTensor, over: tuple[Sequence[int], Sequence[int]], flipped: bool, **about: Any
) -> Accumulator | None:
    """The sums of int8 `codes` times a calibrated QTensor, with their scales and output grid.

    Args:
      codes: int8, on the grid `q.calibration.input`.
      q: integer weights `r = S_w (q - Z_w)`.
      over: contracted axes of the codes and of the weights.
      flipped: whether the weights are the left operand.
      **about: `key` of the site, and `dtype` of its result.

    Returns:
      `None` if the form has no integer sums: groups, codebooks, merged storage axes.
    """
    return _accumulator(dot_sums(codes, q, over, flipped, MOST), q, over[1], about)


def conv_integer(conv: Conv, codes: Array, q: QTensor, **about: Any) -> Accumulator | None:
    """`dot_integer` of a convolution, padded with the zero point of the codes."""
    assert q.calibration is not None and q.calibration.input is not None
    sums = conv_sums(conv, codes, q.calibration.input.zero_point, q, MOST)
    return _accumulator(sums, q, conv.numbers.rhs_spec[1:], about)


def folded(
    q: QTensor,
    contracted: Sequence[int],
    gain: Array | None,
    bias: Array | None,
    channels: tuple[int, ...],
    steps: tuple[str, ...],
) -> Folded | None:
    """Precomputes `Accumulator.fold`, each vector `[*kept]`.

    Args:
      q: a calibrated QTensor.
      contracted: its contracted axes.
      gain: factor of its sums, laid out as the result; `None` is 1.
      bias: term added to them, likewise; `None` is 0.
      channels: axes of the result that come from `q`.
      steps: the primitives that `gain` and `bias` come from.

    Returns:
      `None` if the form has no integer sums, or in a channel only the bias counts.
    """
    if q.calibration is None or plain_place(q, contracted) is None:
        return None

    by, every = _fold(q, gain, bias, tuple(contracted), channels, steps)
    return by if bool(every) else None


@functools.partial(jax.jit, static_argnums=(3, 4, 5))  # one program per layer, not dozens
def _fold(
    q: QTensor,
    gain: Array | None,
    bias: Array | None,
    contracted: tuple[int, ...],
    channels: tuple[int, ...],
    steps: tuple[str, ...],
) -> tuple[Folded, Array]:
    """The folded vectors, and whether sums count in every channel."""

    def vector(v: Array | None) -> Array | None:
        if v is None or not v.ndim:
            return v
        return lax.squeeze(v, [a for a in range(v.ndim) if a not in channels])

    about = {"key": "", "dtype": "float32", "chain": steps}
    sums = Sums(jnp.zeros((), jnp.int32), lambda a: a, channels)
    accumulator, gain = _accumulator(sums, q, contracted, about), vector(gain)
    assert accumulator is not None
    accumulator = dataclasses.replace(accumulator, gain=gain, bias=vector(bias), folded=None)
    alone, full = accumulator.alone, accumulator.scale.shape
    every = jnp.array(True) if alone is None else ~jnp.any(alone)
    return jax.tree.map(lambda a: jnp.broadcast_to(a, full), accumulator.fold()), every


def _accumulator(
    sums: Sums | None, q: QTensor, contracted: Sequence[int], about: dict[str, Any]
) -> Accumulator | None:
    if sums is None:
        return None
    calibration = q.calibration
    assert calibration is not None and calibration.input is not None
    offset = sum_offset(q, calibration.input, contracted)
    return Accumulator(
        total=sums.total,
        scale=sums.lay(sum_scale(q, calibration.input, contracted)),
        offset=None if offset is None else sums.lay(offset),
        gain=None,
        bias=None,
        folded=jax.tree.map(sums.lay, calibration.folded),
        output=calibration.output,
        channels=sums.channels,
        requantize=q.contraction.requantize or "float32",
        **about,
    )
