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
    `[k, n]`, the sum int8 x int8 -> int32; a weight in groups along `k` has one sum and one scale
    per group. Values of 4- and 6-bit floats are integers times a power of two and use the same
    sum. Two float8 operands of one format are summed in float32.

    If `q.contraction.outliers` is set, the outlier columns of `x` stay in float and are contracted
    with the corresponding rows of the weight, dequantized.

    If the QTensor carries a calibrated grid, activations are quantized on that grid, not with a
    scale computed at run time.

    With `activations=None` the codes are contracted with the float `x` and the result is scaled.
    On a CPU `x` is rounded to 15-bit integers where that is faster: the error of a result is then
    at most about `2^-15 max_k |x_k| sum_k |w_k|`.

    The QTensor is dequantized first if the contraction covers some but not all axes of one storage
    axis, if each index of a contracted axis has a scale and scales vary along a kept axis too, and
    if an operand is empty. Codebooks are decoded first; their scale is still applied last.
    Activations are rounded to `activations` in every case.

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
      `dequantize(q)`. A row with a non-finite value gives NaN, except on a calibrated grid.

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
    outliers = q.contraction.outliers if activations is FROM_TENSOR and spec is not None else None
    call = dataclasses.replace(
        call, activations=spec, outliers=outliers, calibrated=activations is FROM_TENSOR
    )
    if q.calibration is not None and q.calibration.divisor is not None:
        call, x, q = _divided(call, jnp.asarray(x), q, q.calibration)
    return _quantized_dot(call, jnp.asarray(x), _sourceless(q))


def _sourceless(q: QTensor) -> QTensor:
    """Drops metadata that would keep equal layers from sharing one trace."""
    c = q.calibration
    if c is not None:
        grid = None if c.input is None else dataclasses.replace(c.input, source="")
        c = Calibration(input=grid, offset=c.offset, outliers=c.outliers, over=c.over)
    return dataclasses.replace(q, contraction=ContractionConfig(), calibration=c)


@functools.partial(jax.jit, static_argnums=0)
def _quantized_dot(call: Call, x: Array, q: QTensor) -> Array:
    """Layers with equal shapes and specs share one trace and one lowered function."""
    return straight_through(functools.partial(evaluated, call), call.reference)(x, q)


def _divided(
    call: Call, x: Array, q: QTensor, calibration: Calibration
) -> tuple[Call, Array, QTensor]:
    """`x` over the divisor `c`, and the QTensor of `w c` without a divisor."""
    bare = dataclasses.replace(q, calibration=dataclasses.replace(calibration, divisor=None))
    spec = call.activations
    if spec is not None and spec.granularity in (PerChannel(-1), PerChannel((-1,))):
        # the divisor already scales each channel, so one scale is left
        spec = dataclasses.replace(spec, granularity=PerTensor())
    divided = over_divisor(x, q, call.x_contract, call.w_contract)
    return dataclasses.replace(call, activations=spec), divided, bare


def over_divisor(x: Array, q: QTensor, x_contract: Axes, w_contract: Axes) -> Array:
    """Divides the float operand by the divisor of a QTensor: `x_k / c_k`, in the dtype of `x`.

    Raises:
      ValueError: the contraction does not cover the axes of the divisor, or these include batch
        axes of the QTensor.
    """
    calibration = q.calibration
    if calibration is None or calibration.divisor is None:
        return x
    axes = tuple(q.ndim + a for a in calibration.axis)
    if calibration.divisor.ndim > len(axes) or not {*axes} <= {*w_contract}:
        raise ValueError(
            "dot_general: a QTensor with a divisor must be contracted over all axes of the "
            "divisor, which must have no batch axes; dequantize it first"
        )
    x_axes = tuple(x_contract[w_contract.index(a)] - x.ndim for a in axes)
    return (x.astype(jnp.float32) * along(1.0 / calibration.divisor, x_axes, x.ndim)).astype(
        x.dtype
    )
