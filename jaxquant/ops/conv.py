"""`lax.conv_general_dilated` where an operand may be a QTensor."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxquant.ops import lowering
from jaxquant.ops.activations import (
    fake,
    fake_on_grid,
    has_zero,
    on_grid,
    quantize_activation,
    shared_axes,
)
from jaxquant.ops.backward import straight_through
from jaxquant.ops.convolve import Conv, conv_of, pad, padding, window_sum
from jaxquant.ops.dot_general import FROM_TENSOR
from jaxquant.ops.integer.static import conv_static
from jaxquant.ops.operands import Placement, int8_codes, integer_range, place, result_dtype
from jaxquant.qtensor import (
    PerTensor,
    QSpec,
    QTensor,
    dequantize,
    storage_codes,
    storage_scale,
    storage_values,
)


def conv_general_dilated(
    lhs: Array | QTensor,
    rhs: Array | QTensor,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    activations: QSpec | None = FROM_TENSOR,
) -> Array:
    """`lax.conv_general_dilated` of an image and a QTensor of kernels.

    `y[b, o] = s_x[b] s_w[o] sum_{i, t} (q_x[b, i, t] - z_x[b]) (q_w[o, i, t] - z_w[o])` over
    input channels `i` and window positions `t`: strided, dilated, grouped, depthwise and
    transposed. The sum is int8 x int8 -> int32; on a CPU a depthwise convolution adds up shifted
    products of the same integers in float32, exactly, which is many times faster there.

    With `activations=None` the image is convolved with the codes and the result is scaled. The
    QTensor is dequantized first if its scale varies along other axes than output channels, if its
    storage is padded, if it is the left operand, with a `batch_group_count`, and if an operand is
    empty. Activations are rounded to `activations` in every case.

    Args:
      lhs: image `[batch, in, *spatial]`, or as `dimension_numbers` says.
      rhs: kernel `[out, in, *spatial]`, or as `dimension_numbers` says.
      window_strides: as for `lax.conv_general_dilated`.
      padding: as for `lax.conv_general_dilated`.
      lhs_dilation: as for `lax.conv_general_dilated`.
      rhs_dilation: as for `lax.conv_general_dilated`.
      dimension_numbers: as for `lax.conv_general_dilated`.
      feature_group_count: as for `lax.conv_general_dilated`.
      batch_group_count: as for `lax.conv_general_dilated`.
      precision: as for `lax.conv_general_dilated`; integers are summed exactly.
      preferred_element_type: dtype of the result.
      activations: spec to quantize the image by, `PerChannel()` one scale for each image of the
        batch or `PerTensor()`; `None` keeps it float. Default: `q.contraction.activations`.

    Returns:
      The result, whose gradient is that of the convolution with `dequantize(q)`.

    Raises:
      TypeError: the QTensor is differentiated.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference" (2018), section 2.

    >>> import jax, jaxquant as jq
    >>> w = jax.random.normal(jax.random.key(0), (8, 3, 3, 3))
    >>> q = jq.quantize(w, jq.QSpec("int8", jq.PerChannel(0)))
    >>> x = jnp.ones((1, 3, 16, 16))
    >>> conv_general_dilated(x, q, (2, 2), "SAME", activations=jq.QSpec("int8")).shape
    (1, 8, 8, 8)
    """
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    conv = conv_of(
        window_strides, padding, lhs_dilation, rhs_dilation, numbers,
        feature_group_count, batch_group_count, precision, preferred_element_type,
    )  # fmt: skip
    if isinstance(lhs, QTensor):
        other = dequantize(rhs) if isinstance(rhs, QTensor) else rhs
        spec = lhs.contraction.activations if activations is FROM_TENSOR else activations
        # an activation that is the kernel has a scale for each output channel
        over = conv.numbers.rhs_spec[1:]

        def left(x: Array, q: QTensor) -> Array:
            return conv(dequantize(q), x if spec is None else fake(x, spec, over))

        return straight_through(left, lambda x, w: conv(w, x))(other, lhs)
    if not isinstance(rhs, QTensor):
        return conv(lhs, rhs)
    spec = rhs.contraction.activations if activations is FROM_TENSOR else activations
    conv = dataclasses.replace(conv, activations=spec)
    if activations is not FROM_TENSOR:  # the kernel's calibrated grid is for its own spec
        rhs = dataclasses.replace(rhs, calibration=None)
    return straight_through(functools.partial(_forward, conv), conv)(lhs, rhs)


def _forward(conv: Conv, x: Array, q: QTensor) -> Array:
    spec, window = conv.activations, conv.numbers.lhs_spec[1:]
    at = _placed(conv, x, q)
    grid = None if q.calibration is None else q.calibration.input
    if spec is not None and grid is not None and grid.scale.ndim == 0:
        out = None
        if at is not None and spec.format.is_integer:
            out = conv_static(conv, on_grid(x, grid, spec), q, grid)
        x, spec = fake_on_grid(x, grid, spec), None
        if out is not None and not q.spec.format.packed:
            return out.astype(result_dtype(x.dtype, q.dtype, conv.preferred))
        if at is not None and out is not None:  # a packed kernel, see below
            integer, rounded = out.astype(result_dtype(x.dtype, q.dtype, conv.preferred)), x
            return lowering.by_platform(
                cpu=lambda: _on_codes(conv, rounded, q, at, None), default=lambda: integer
            )
    if spec is not None and not (at is not None and _same_kind(q, spec, at, window, x.ndim)):
        x, spec = fake(x, spec, window), None
    if at is None:
        return conv(x, dequantize(q))
    if spec is not None and q.spec.format.packed:
        # A packed kernel is stored in another order of axes. With the transpose that it needs, an
        # integer convolution is 100 times slower on a CPU (3 x 3, 8 x 28 x 28 x 128, JAX 0.10 and
        # 0.12).
        dynamic = spec
        return lowering.by_platform(
            cpu=lambda: _on_codes(conv, fake(x, dynamic, window), q, at, None),
            default=lambda: _on_codes(conv, x, q, at, dynamic),
        )
    return _on_codes(conv, x, q, at, spec)


def _on_codes(conv: Conv, x: Array, q: QTensor, at: Placement, spec: QSpec | None) -> Array:
    order = [a for members in at.members for a in members]
    kernel = dataclasses.replace(
        conv,
        numbers=conv.numbers._replace(
            rhs_spec=tuple(order.index(a) for a in conv.numbers.rhs_spec)
        ),
    )
    scale = jnp.ravel(storage_scale(q))  # one for each output channel, or one
    sizes = tuple(q.shape[a] for a in order)
    if spec is None:
        values = storage_values(q).reshape(sizes).astype(x.dtype)
        out = window_sum(kernel, x, values)
    else:
        codes, shift = int8_codes(storage_codes(q), q.spec.format)
        exact = jnp.int32 if q.spec.zero_dtype is None else jnp.float32
        zero = None if q.zero_point is None else jnp.ravel(q.zero_point).astype(exact) - shift
        if zero is None and shift:
            zero = jnp.full((1,), -shift, jnp.int32)
        limits = integer_range(q.spec.format)
        assert limits is not None
        scale = scale * limits[2]
        out = _integer(kernel, x, codes.reshape(sizes), zero, spec)
    out = out * conv.per_channel(scale)
    return out.astype(result_dtype(x.dtype, q.dtype, conv.preferred))


def _placed(conv: Conv, x: Array, q: QTensor) -> Placement | None:
    """The kernel's placement; `None` if scales vary along other axes than output channels."""
    at = place(q, conv.numbers.rhs_spec[1:], ())
    if at is None or conv.batch_groups != 1 or q.spec.format.bits > 8 or len(at.keep) != 1:
        return None
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return None
    if 0 in q.shape or any(isinstance(n, int) and n == 0 for n in x.shape):
        return None
    (channel,) = at.keep
    ungrouped = all(at.groups[s] == 1 for s in at.contract)
    per_channel = at.groups[channel] == 1 or at.block(channel) == 1
    return at if ungrouped and per_channel and at.padded == at.size else None


def _same_kind(q: QTensor, spec: QSpec, at: Placement, window: Sequence[int], ndim: int) -> bool:
    """Whether codes of both operands can be multiplied, and scales applied after the sum."""
    shared = shared_axes(spec, window, ndim)
    if shared is None or len(shared) not in (ndim, ndim - 1) or q.codebook is not None:
        return False
    if integer_range(q.spec.format) is None or not spec.format.is_integer:
        return False
    terms = math.prod(at.size[s] for s in at.contract)
    zero = q.zero_point is not None or has_zero(q.spec)
    fits = lowering.fits_int32(terms, has_zero(spec), zero)
    return fits and integer_range(spec.format) is not None


def _integer(conv: Conv, x: Array, codes: Array, zero: Array | None, spec: QSpec) -> Array:
    """`s_x sum (q_x - z_x)(q_w - z_w)`, float32."""
    numbers = conv.numbers
    crop = None
    if has_zero(spec):
        # padded before it is quantized: the value 0 becomes the zero point, not the code 0;
        # cropped values still count for the range
        pads, conv = padding(conv, x, codes)
        x = pad(x, [(max(low, 0), max(high, 0), inner) for low, high, inner in pads])
        crop = [(min(low, 0), min(high, 0), 0) for low, high, _ in pads]
    image = numbers.lhs_spec[0]
    everything = isinstance(spec.granularity, PerTensor)
    shared = tuple(a for a in range(x.ndim) if everything or a != image)
    qx, sx, zx = quantize_activation(x, spec, shared)
    qx = qx if crop is None else pad(qx, crop)
    terms = math.prod(codes.shape[a] for a in numbers.rhs_spec[1:])
    total = window_sum(conv, qx, codes)
    outputs = codes.shape[numbers.rhs_spec[0]]
    if zero is not None:
        shape = [conv.groups if a == numbers.rhs_spec[0] else n for a, n in enumerate(codes.shape)]
        windows = window_sum(conv, qx, jnp.ones(shape, jnp.int8))
        axis = numbers.out_spec[1]
        windows = jnp.repeat(windows, outputs // conv.groups, axis=axis)
        total = total - conv.per_channel(zero.astype(jnp.float32)) * windows
    if zx is not None:
        zx = jnp.ravel(zx).astype(jnp.float32)
        sums = jnp.sum(codes, axis=numbers.rhs_spec[1:], dtype=jnp.int32).astype(jnp.float32)
        if zero is not None:
            sums = sums - terms * zero.astype(jnp.float32)
        total = total - conv.per_batch(zx) * conv.per_channel(sums)
    return total * conv.per_batch(jnp.ravel(sx))
