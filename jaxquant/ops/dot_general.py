"""`lax.dot_general` where an operand may be a QTensor."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxquant.ops.backward import straight_through
from jaxquant.ops.dot_codes import Axes, Call, evaluated
from jaxquant.qtensor import (
    Calibration,
    ContractionConfig,
    PerChannel,
    PerTensor,
    QSpec,
    QTensor,
    along,
    dequantize,
)

FROM_TENSOR: Any = type("FromTensor", (), {"__repr__": lambda _: "q.contraction.activations"})()
"""Stands for the activation spec that the QTensor carries."""


def dot_general(
    lhs: Array | QTensor,
    rhs: Array | QTensor,
    dimension_numbers: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    out_sharding: Any = None,
    activations: QSpec | None = FROM_TENSOR,
) -> Array:
    """`lax.dot_general` of a float array and a QTensor, on either side.

    `y[m, n] = s_x[m] s_w[n] sum_k (q_x[m, k] - z_x[m]) (q_w[k, n] - z_w[n])`, `x` `[m, k]`, `w`
    `[k, n]`, the sum int8 x int8 -> int32; a weight in groups along `k` has one such sum and scale
    for each group. Values of 4- and 6-bit floats are integers times a power of two, and go the
    same way. Two float8 operands of one format are summed in float32.

    Where the QTensor's use names `Outliers`, columns of `x` that hold some are contracted in float
    with the rows of the weight that they meet, dequantized.

    Where the QTensor carries a calibrated grid, activations are quantized by that instead of by a
    scale of their own.

    With `activations=None` the codes are contracted with `x` itself and the result is scaled. On a
    CPU `x` becomes integers of 15 bits where that is faster: each result is then within
    `2^-15 max_k |x_k| sum_k |w_k|`.

    The QTensor is dequantized first if the contraction takes a part of axes that are stored as
    one, if scales vary along a contracted axis and a kept one as well, for codebooks (decoded;
    the scale still goes last), and where an operand is empty. On a CPU few rows of floats meet
    weights that are dequantized a tile at a time. Activations are rounded to `activations` all the
    same.

    Args:
      lhs: float array or QTensor.
      rhs: float array or QTensor. Of two QTensors the smaller one is dequantized.
      dimension_numbers: as for `lax.dot_general`.
      precision: as for `lax.dot_general`; integers are summed exactly.
      preferred_element_type: dtype of the result.
      out_sharding: sharding of the result, under an explicit mesh.
      activations: spec to quantize the float operand by, `PerChannel()` one scale for each row or
        `PerTensor()`; `None` keeps it float. Default: `q.contraction.activations`.

    Returns:
      `[batch, free of lhs, free of rhs]`. Its gradient is that of the contraction with
      `dequantize(q)`. A row that is not finite gives NaN.

    Raises:
      TypeError: the QTensor is differentiated.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference" (2018), section 2.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> w = jnp.array([[127.0, -2.0], [0.0, 127.0]])
    >>> q = jq.quantize(w, jq.QSpec("int8", jq.PerChannel(1), range="qmax"))
    >>> x, rows = jnp.array([[127.0, 3.0]]), jq.QSpec("int8", range="qmax")
    >>> dot_general(x, q, (((1,), (0,)), ((), ())), activations=rows).tolist()
    [[16129.0, 127.0]]
    """
    (lc, rc), (lb, rb) = dimension_numbers
    if isinstance(lhs, QTensor) and isinstance(rhs, QTensor):
        lhs, rhs = (dequantize(lhs), rhs) if lhs.size < rhs.size else (lhs, dequantize(rhs))
    preferred = None if preferred_element_type is None else jnp.dtype(preferred_element_type)
    rest = (precision, preferred, out_sharding)
    if isinstance(lhs, QTensor):
        q, x = lhs, rhs
        call = Call(tuple(rc), tuple(lc), tuple(rb), tuple(lb), True, *rest, None)
    elif isinstance(rhs, QTensor):
        q, x = rhs, lhs
        call = Call(tuple(lc), tuple(rc), tuple(lb), tuple(rb), False, *rest, None)
    else:
        return lax.dot_general(lhs, rhs, dimension_numbers, *rest[:2], out_sharding=out_sharding)
    spec = q.contraction.activations if activations is FROM_TENSOR else activations
    found = q.contraction.outliers if activations is FROM_TENSOR and spec is not None else None
    call = dataclasses.replace(
        call, activations=spec, outliers=found, calibrated=activations is FROM_TENSOR
    )
    if q.calibration is not None and q.calibration.divisor is not None:
        call, x, q = _divided(call, jnp.asarray(x), q, q.calibration)
    return _quantized_dot(call, jnp.asarray(x), _sourceless(q))


def _sourceless(q: QTensor) -> QTensor:
    """The tensor without sources of grids, by which layers would differ that compute alike."""
    held = q.calibration
    if held is not None:
        grid = None if held.input is None else dataclasses.replace(held.input, source="")
        held = Calibration(input=grid, offset=held.offset, outliers=held.outliers, over=held.over)
    return dataclasses.replace(q, contraction=ContractionConfig(), calibration=held)


@functools.partial(jax.jit, static_argnums=0)
def _quantized_dot(call: Call, x: Array, q: QTensor) -> Array:
    """Traced once for layers that are alike, and one function of the lowered program."""
    return straight_through(functools.partial(evaluated, call), call.reference)(x, q)


def _divided(call: Call, x: Array, q: QTensor, held: Calibration) -> tuple[Call, Array, QTensor]:
    """The float operand over the divisor, and the weight times it."""
    bare = dataclasses.replace(q, calibration=dataclasses.replace(held, divisor=None))
    spec = call.activations
    if spec is not None and spec.granularity in (PerChannel(-1), PerChannel((-1,))):
        # a scale for each channel was asked for, which the divisor is: what is left has one
        spec = dataclasses.replace(spec, granularity=PerTensor())
    divided = over_divisor(x, q, call.x_contract, call.w_contract)
    return dataclasses.replace(call, activations=spec), divided, bare


def over_divisor(x: Array, q: QTensor, x_contract: Axes, w_contract: Axes) -> Array:
    """What a QTensor with a divisor meets, divided by it: `x_k / c_k`, in the dtype of `x`.

    Raises:
      ValueError: the contraction is not over the axes of the divisor.
    """
    held = q.calibration
    if held is None or held.divisor is None:
        return x
    axes = tuple(q.ndim + a for a in held.axis)
    if held.divisor.ndim > len(axes) or not {*axes} <= {*w_contract}:
        raise ValueError(
            "dot_general: a QTensor with a divisor is contracted over the axes of its divisor "
            "alone, without batch axes of its own; dequantize it first"
        )
    met = tuple(x_contract[w_contract.index(a)] - x.ndim for a in axes)
    return (x.astype(jnp.float32) * along(1.0 / held.divisor, met, x.ndim)).astype(x.dtype)
