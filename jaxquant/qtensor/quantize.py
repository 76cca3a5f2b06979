"""`quantize` and `dequantize`: arrays to `QTensor`s and back."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.qtensor.calibration import Calibration, along
from jaxquant.qtensor.encode import encode_stacked
from jaxquant.qtensor.qspec import QSpec
from jaxquant.qtensor.storage import (
    blocked,
    from_storage,
    spread,
    storage_scale,
    storage_values,
    unblocked,
)
from jaxquant.qtensor.tensor import ContractionConfig, QTensor
from jaxquant.qtensor.trained import FakeQuantTensor


def quantize(
    w: Array,
    spec: QSpec,
    *,
    key: Array | None = None,
    storage_last_axes: tuple[int, ...] = (),
    batch_axes: int = 0,
) -> QTensor:
    """Quantizes an array by `spec`.

    `q = clip(round(w / S) + Z)` for integers; the nearest value of the format otherwise.

    Args:
      w: float array `[*batch, *core]`.
      spec: format, granularity and range rule, with named axes (see `QSpec.at`).
      key: PRNG key for stochastic rounding, unbiased between the two neighbours; `None` rounds
        to nearest, ties to even.
      storage_last_axes: axes to store last, contiguous: those that will be contracted. The order
        does not change values.
      batch_axes: number of leading batch axes, encoded one by one; axes in `spec` and
        `storage_last_axes` then number the other axes.

    Raises:
      ValueError: `w` is not a float array, holds non-finite values, or lacks an axis of `spec`.

    >>> import jax, jaxquant as jq
    >>> w = jax.random.normal(jax.random.key(0), (256, 8))
    >>> q = jq.quantize(w, jq.QSpec("int4", granularity=jq.PerGroup(128, axis=0)))
    >>> q.codes.shape, q.scale.shape, q.bits_per_weight
    ((8, 128), (8, 2), 4.25)
    >>> bool(abs(jq.dequantize(q) - w).max() <= 0.5 * q.scale.max() * 1.001)
    True
    """
    w = check_quantizable(w, spec, storage_last_axes, batch_axes)
    finite = _all_finite(w)  # a tracer if `w` is one or inside a trace
    if not isinstance(finite, jax.core.Tracer) and not bool(finite):
        raise ValueError(f"quantize: non-finite values in {w.dtype.name}{list(w.shape)}")
    return encode_stacked(
        w, spec, key=key, storage_last_axes=storage_last_axes, batch_axes=batch_axes
    )


def check_quantizable(
    w: Array, spec: QSpec, storage_last_axes: tuple[int, ...] = (), batch_axes: int = 0
) -> Array:
    """`w` as an array that `quantize` can encode, its values unchecked.

    Raises:
      ValueError: `w` is not a float array, or lacks an axis of `spec`.

    >>> from jaxquant.qtensor.granularity import PerTensor
    >>> check_quantizable(jnp.ones((2, 3)), QSpec("int8", PerTensor())).shape
    (2, 3)
    """
    if not isinstance(spec, QSpec):
        raise ValueError(f"quantize: expected a QSpec such as jq.QSpec('int8'), got {spec!r}")
    w = jnp.asarray(w)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"quantize: expected a float array, got {w.dtype.name}{list(w.shape)}")
    if not 0 <= batch_axes <= w.ndim:
        raise ValueError(f"quantize: batch_axes={batch_axes} of an array of rank {w.ndim}")
    spec.resolve(w.shape[batch_axes:], storage_last_axes)  # raises here, outside any trace
    return w


@jax.jit
def _all_finite(w: Array) -> Array:
    # the products are 0, or NaN for non-finite values: four times as fast as `isfinite`
    return jnp.sum(w * jnp.zeros((), w.dtype)) == 0


def dequantize(q: QTensor, dtype: Any = None) -> Array:
    """The float array that `q` encodes: `S (q - Z)` or `S codebook[q]`.

    Computed in float32 and cast to `dtype`, by default that of the quantized array; float16
    saturates at its largest finite value instead of overflowing.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> q = jq.quantize(
    ...     jnp.array([[-1.0, 0.0, 1.0]]), jq.QSpec("int2", jq.PerTensor(), range="qmax")
    ... )
    >>> jq.dequantize(q)
    Array([[-1.,  0.,  1.]], dtype=float32)
    """
    dtype = jnp.dtype(q.dtype if dtype is None else dtype)
    if isinstance(q, FakeQuantTensor) and q.values is not None:
        return q.values.astype(dtype)  # the same values, and gradients pass
    calibration = q.calibration
    if calibration is not None:  # without the rest, layers with equal specs share one compilation
        divisor = Calibration(divisor=calibration.divisor, axis=calibration.axis)
        calibration = None if calibration.divisor is None else divisor
    return _dequantized(
        dataclasses.replace(q, contraction=ContractionConfig(), calibration=calibration), dtype
    )


@functools.partial(jax.jit, static_argnums=1, inline=True)  # compiled as one where called eagerly
def _dequantized(q: QTensor, dtype: Any) -> Array:
    scaled = lax.mul(blocked(q, storage_values(q)), spread(q, storage_scale(q)))
    values = from_storage(q, unblocked(q, scaled))
    if q.calibration is not None and q.calibration.divisor is not None:
        values = values / along(q.calibration.divisor, q.calibration.axis, q.ndim)
    if dtype == jnp.float16:
        top = float(jnp.finfo(dtype).max)
        values = jnp.clip(values, -top, top)
    return values.astype(dtype)
