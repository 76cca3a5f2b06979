"""Base class of estimators with scales and zero points.

One elementwise rule serves weights, with a step for each block of their `QTensor`, and
activations, with a scalar step. An estimator defines scales and zero points from its learned
parameters, and the derivatives of its paper.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxquant.qtensor import (
    QSpec,
    QTensor,
    dequantize,
    encode_given,
    storage_scale,
    store_scale,
)
from jaxquant.ste.base import Learned, direction, ends, on_format
from jaxquant.ste.blocks import laid_out, members, over_blocks, to_blocks

Scales = tuple[Array, Array | None, Array | None]
Slopes = tuple[Array, dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class Point:
    """Values in units of their scale, with the range; arrays that broadcast with each other.

    Attributes:
      x: the values, float32.
      v: `x / S`.
      rounded: `v` rounded to the format, valid inside the range.
      low: the lower end of the range in units of `S`, `qmin - Z`.
      high: the upper end, `qmax - Z`.
      learned: learned parameters, in shapes that broadcast with `x`.
    """

    x: Array
    v: Array
    rounded: Array
    low: Any
    high: Any
    learned: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Gridded:
    """Base of estimators with scales and zero points; see `Estimator` for the methods."""

    learns: ClassVar[tuple[str, ...]] = ()
    constants: ClassVar[tuple[str, ...]] = ()

    def scales(self, learned: Learned, spec: QSpec) -> Scales:
        """Scale, zero point (float32) and global scale, from arrays of one core: `[*groups]`."""
        raise NotImplementedError

    def slopes(self, at: Point, spec: QSpec) -> Slopes:
        """Where the gradient of `x` passes, and derivatives with respect to learned parameters."""
        raise NotImplementedError

    def gain(self, count: Any, spec: QSpec) -> Any:
        """Factor on the gradient of a learned parameter that `count` values share."""
        del count, spec
        return 1.0

    def encode(
        self,
        w: Array,
        learned: Learned,
        spec: QSpec,
        *,
        storage_last_axes: tuple[int, ...] = (),
        batch_axes: int = 0,
    ) -> QTensor:
        """See `Estimator.encode`."""
        w, learned = lax.stop_gradient((jnp.asarray(w), {n: learned[n] for n in self._own(spec)}))
        return _encode(self, w, learned, spec, storage_last_axes, batch_axes)

    def values(self, w: Array, learned: Learned, q: QTensor) -> Array:
        """See `Estimator.values`."""
        return _values(self, w, {n: learned[n] for n in self._own(q.spec)}, q)

    def grid(self, learned: Learned, spec: QSpec) -> tuple[Array, Array | None]:
        """See `Estimator.grid`."""
        return _grid(self, lax.stop_gradient({n: learned[n] for n in self._own(spec)}), spec)

    def pass_activation(
        self,
        x: Array,
        rounded: Array,
        learned: Learned,
        spec: QSpec,
        *,
        count: int | None = None,
    ) -> Array:
        """See `Estimator.pass_activation`."""
        if count is None:
            count = math.prod(x.shape[1:])
        learned = {n: learned[n] for n in self._own(spec)}
        return _passed(self, spec, max(count, 1), x, rounded, learned)

    def _own(self, spec: QSpec) -> tuple[str, ...]:
        """Names of the learned parameters for a spec."""
        del spec
        return self.learns


def stored_steps(steps: Array, spec: QSpec) -> tuple[Array, Array | None]:
    """Steps as scales of the spec's dtype, and the global scale where the spec has one.

    The global scale maps the largest step to the largest scale, as in `quantize`.

    >>> stored_steps(jnp.float32(0.75), QSpec("mxfp4"))[0].astype(jnp.float32).tolist()
    1.0
    """
    if not spec.global_scale or spec.format.is_integer:
        return store_scale(steps, spec), None
    top = np.float32(jnp.finfo(spec.scale_dtype).max)
    total = jnp.maximum(jnp.max(steps, initial=0.0) / top, jnp.finfo(jnp.float32).tiny)
    return store_scale(steps / total, spec), total


def _point(
    x: Array, scale: Array, zero: Array | None, learned: dict[str, Array], spec: QSpec
) -> Point:
    low, high = ends(spec)
    x = x.astype(jnp.float32)
    v = x / scale
    shift: Any = 0.0 if zero is None else zero
    return Point(x, v, on_format(v, spec), low - shift, high - shift, learned)


# Jitted, so that codes are equal whether encoded eagerly or inside another jitted function.
@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _encode(
    estimator: Gridded,
    w: Array,
    learned: dict[str, Array],
    spec: QSpec,
    storage_last_axes: tuple[int, ...],
    batch_axes: int,
) -> QTensor:
    def one(row: Array, learned: dict[str, Array]) -> QTensor:
        scale, zero, total = estimator.scales(learned, spec)
        return encode_given(row, scale, zero, total, spec, storage_last_axes=storage_last_axes)

    if not batch_axes:
        return one(w, learned)
    batch = w.shape[:batch_axes]
    flat = math.prod(batch)
    rows, each = jax.tree.map(lambda a: a.reshape(flat, *a.shape[batch_axes:]), (w, learned))
    return jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), jax.vmap(one)(rows, each))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _values(estimator: Gridded, w: Array, learned: dict[str, Array], q: QTensor) -> Array:
    return dequantize(q).astype(w.dtype)


def _values_fwd(
    estimator: Gridded, w: Array, learned: dict[str, Array], q: QTensor
) -> tuple[Array, Any]:
    return dequantize(q).astype(w.dtype), (w, learned, q)


def _values_bwd(estimator: Gridded, saved: Any, g: Array) -> tuple[Array, dict[str, Array], None]:
    w, learned, q = saved
    zero = None if q.zero_point is None else laid_out(q, q.zero_point.astype(jnp.float32))
    learned_here = {n: laid_out(q, a) for n, a in learned.items()}
    scale = storage_scale(q)
    scale = jnp.where(scale == 0, 1.0, scale)  # codebook blocks of zeros have scale 0
    at = _point(w, laid_out(q, scale), zero, learned_here, q.spec)
    inside, slopes = estimator.slopes(at, q.spec)
    gain = estimator.gain(members(q), q.spec)
    if not isinstance(gain, float):
        gain = jnp.broadcast_to(gain, (*q.batch, *q.groups))
    g32 = g.astype(jnp.float32)
    # One pass in array order, then the sums: fused with the transpose that blocks may need, XLA's
    # CPU backend takes 2 to 10 times as long.
    each = lax.optimization_barrier({n: g32 * slopes[n] for n in learned})
    to_learned = {n: over_blocks(q, to_blocks(q, a)) * gain for n, a in each.items()}
    return jnp.where(inside, g, 0).astype(w.dtype), _signed(to_learned, learned), None


_values.defvjp(_values_fwd, _values_bwd)


def _signed(gradients: dict[str, Array], learned: dict[str, Array]) -> dict[str, Array]:
    """Gradients in the dtypes of the parameters, times `direction` for all but offsets."""
    return {
        n: (g if n == "offset" else g * direction(learned[n])).astype(learned[n].dtype)
        for n, g in gradients.items()
    }


@functools.partial(jax.jit, static_argnums=(0, 2))
def _grid(estimator: Gridded, learned: dict[str, Array], spec: QSpec) -> tuple[Array, Array | None]:
    def one(learned: dict[str, Array]) -> tuple[Array, Array | None]:
        scale, zero, total = estimator.scales(learned, spec)
        scale = scale.astype(jnp.float32)
        if total is not None:
            scale = scale * total
        return scale, None if zero is None else zero.astype(jnp.int32)

    for _ in jax.tree.leaves(learned)[0].shape:
        one = jax.vmap(one)
    return one(learned)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _passed(
    estimator: Gridded, spec: QSpec, count: int, x: Array, rounded: Array, learned: dict[str, Array]
) -> Array:
    return rounded


def _passed_fwd(
    estimator: Gridded, spec: QSpec, count: int, x: Array, rounded: Array, learned: dict[str, Array]
) -> tuple[Array, Any]:
    return rounded, (x, learned)


def _passed_bwd(
    estimator: Gridded, spec: QSpec, count: int, saved: Any, g: Array
) -> tuple[Array, None, dict[str, Array]]:
    x, learned = saved
    scale, zero_point = estimator.grid(learned, spec)
    zero = None if zero_point is None else zero_point.astype(jnp.float32)
    at = _point(x, scale, zero, learned, spec)
    inside, slopes = estimator.slopes(at, spec)
    gain = estimator.gain(np.float32(count), spec)
    g32 = g.astype(jnp.float32)
    to_learned = {n: jnp.sum(g32 * slopes[n]) * gain for n in learned}
    return jnp.where(inside, g, 0).astype(x.dtype), None, _signed(to_learned, learned)


_passed.defvjp(_passed_fwd, _passed_bwd)
