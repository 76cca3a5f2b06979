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

    `q = clip(round(w / S) + Z)` for integers; the nearest value of the format for the others.

    Args:
      w: float array `[*batch, *core]`.
      spec: format, granularity and range rule; axes must be named in it (see `QSpec.at`).
      key: PRNG key for stochastic rounding, unbiased between the two neighbours; `None` rounds
        to nearest, ties to even.
      storage_last_axes: axes to store last, contiguous: those that will be contracted. Values
        are the same.
      batch_axes: how many leading axes are batch axes, encoded one by one; axes in `spec` and
        `storage_last_axes` then count within the rest.

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
    finite = _all_finite(w)  # traced where `w` is, or where a trace is under way
    if not isinstance(finite, jax.core.Tracer) and not bool(finite):
        raise ValueError(f"quantize: non-finite values in {w.dtype.name}{list(w.shape)}")
    return encode_stacked(
        w, spec, key=key, storage_last_axes=storage_last_axes, batch_axes=batch_axes
    )


def check_quantizable(
    w: Array, spec: QSpec, storage_last_axes: tuple[int, ...] = (), batch_axes: int = 0
) -> Array:
    """The array that `quantize` would encode, unless shapes or types forbid it.

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
    # zeros, and NaN of what is not finite: summed in a quarter of the time that `isfinite` takes
    return jnp.sum(w * jnp.zeros((), w.dtype)) == 0


def dequantize(q: QTensor, dtype: Any = None) -> Array:
    """The float array that `q` stands for: `S (q - Z)` or `S codebook[q]`.

    Computed in float32 and cast to `dtype`, by default the dtype `q` was made from; float16
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
        return q.values.astype(dtype)  # equal, and gradients pass
    held = q.calibration  # only a divisor matters: layers that compute alike share one program
    if held is not None:
        kept = Calibration(divisor=held.divisor, axis=held.axis)
        held = None if held.divisor is None else kept
    return _dequantized(
        dataclasses.replace(q, contraction=ContractionConfig(), calibration=held), dtype
    )


@functools.partial(jax.jit, static_argnums=1, inline=True)  # one program where it is called alone
def _dequantized(q: QTensor, dtype: Any) -> Array:
    scaled = lax.mul(blocked(q, storage_values(q)), spread(q, storage_scale(q)))
    values = from_storage(q, unblocked(q, scaled))
    if q.calibration is not None and q.calibration.divisor is not None:
        values = values / along(q.calibration.divisor, q.calibration.axis, q.ndim)
    if dtype == jnp.float16:
        top = float(jnp.finfo(dtype).max)
        values = jnp.clip(values, -top, top)
    return values.astype(dtype)
