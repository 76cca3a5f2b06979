"""The straight-through estimator: nothing is learned, rounding has the gradient of the identity."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.qtensor import QSpec, QTensor, dequantize, encode_stacked
from jaxquant.ste.base import Learned, Moments, ends
from jaxquant.ste.gridded import Gridded, Point, Scales, Slopes


def straight_through(clip: bool = True) -> StraightThrough:
    """The gradient of rounding is 1 inside the range and 0 outside.

    Integers are inside if clipping moves them by at most half a step, values of other formats if
    they are not clipped. With the scales of `quantize`, from the largest magnitude, and any rule of
    `QSpec.range`, only negative values in an unsigned format are outside.

    Args:
      clip: `False` for the identity everywhere.

    Source: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons for
    Conditional Computation", arXiv 1308.3432; the saturating form, Hubara et al., "Binarized
    Neural Networks", arXiv 1602.02830, section 1.3.

    >>> import jax, jax.numpy as jnp
    >>> from jaxquant.qtensor import PerTensor, QSpec
    >>> spec, w = QSpec("uint4", PerTensor()), jnp.array([1.0, 0.3, -1.0])
    >>> def total(w, estimator):
    ...     return estimator.values(w, {}, estimator.encode(w, {}, spec)).sum()
    >>> jax.grad(total)(w, straight_through()).tolist()
    [1.0, 1.0, 0.0]
    >>> jax.grad(total)(w, straight_through(clip=False)).tolist()
    [1.0, 1.0, 1.0]
    """
    return StraightThrough(bool(clip))


@dataclasses.dataclass(frozen=True)
class StraightThrough(Gridded):
    """The estimator that `straight_through` makes.

    For activations `learned` may contain a scale that is tracked and not trained: `scale`, and
    `zero_point` in the format's codes. Otherwise scales are assumed to come from the largest
    magnitude.

    Attributes:
      clip: whether gradients are 0 outside the range.
    """

    clip: bool = True

    def init(
        self, w: Array, spec: QSpec, *, storage_last_axes: tuple[int, ...] = (), batch_axes: int = 0
    ) -> dict[str, Array]:
        """Nothing."""
        del w, spec, storage_last_axes, batch_axes
        return {}

    def init_activation(self, moments: Moments, spec: QSpec) -> dict[str, Array]:
        """Nothing."""
        del moments, spec
        return {}

    def encode(
        self,
        w: Array,
        learned: Learned,
        spec: QSpec,
        *,
        storage_last_axes: tuple[int, ...] = (),
        batch_axes: int = 0,
    ) -> QTensor:
        """As `jaxquant.quantize`; see `Estimator.encode`."""
        del learned
        w = lax.stop_gradient(jnp.asarray(w))
        return encode_stacked(w, spec, storage_last_axes=storage_last_axes, batch_axes=batch_axes)

    def values(self, w: Array, learned: Learned, q: QTensor) -> Array:
        """See `Estimator.values`."""
        if self.clip:
            return super().values(w, learned, q)
        return _passed(self, q.spec, w, dequantize(q).astype(w.dtype), None)

    def grid(self, learned: Learned, spec: QSpec) -> tuple[Array, Array | None]:
        """The tracked scale and zero point.

        Raises:
          ValueError: there is no scale.
        """
        if "scale" not in learned:
            raise ValueError(f"straight_through learns no grid, and none was given for {spec!r}")
        return learned["scale"], learned.get("zero_point")

    def scales(self, learned: Learned, spec: QSpec) -> Scales:
        """Not learned: see `encode` and `grid`."""
        raise NotImplementedError

    def slopes(self, at: Point, spec: QSpec) -> Slopes:
        """Values up to half a step beyond the ends; see `_margins`."""
        if not self.clip:
            return jnp.ones(at.v.shape, bool), {}
        below, above = _margins(spec)
        return (at.v >= at.low - below) & (at.v <= at.high + above), {}

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
        del count
        grid = self.grid(learned, spec) if "scale" in learned else None
        return _passed(self, spec, x, rounded, grid)

    def rescaled(self, learned: Learned, old: QSpec, new: QSpec) -> dict[str, Array]:
        """Unchanged: nothing is learned."""
        del old, new
        return dict(learned)


def _margins(spec: QSpec) -> tuple[float, float]:
    """How far values beyond the ends of the format count as inside, in units of the scale.

    Half a step for integers, a full step above `qmax` with `range="signed"`, which maps the extreme
    to `qmin`; plus the rounding errors of float32 and of the scale's dtype.
    """
    low, high = ends(spec)
    narrow = spec.scale_dtype not in ("float32", "float64", "float8_e8m0fnu")
    error = float(jnp.finfo(spec.scale_dtype).eps) / 2 if narrow else 0.0
    slack = (high - low) * (error + 2.0**-20)
    if not spec.format.is_integer:
        return slack, slack
    signed = spec.symmetric and spec.range == "signed" and spec.format.signed
    return 0.5 + slack, (1.0 if signed else 0.5) + slack


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _passed(estimator: StraightThrough, spec: QSpec, x: Array, rounded: Array, grid: Any) -> Array:
    return rounded


def _passed_fwd(
    estimator: StraightThrough, spec: QSpec, x: Array, rounded: Array, grid: Any
) -> tuple[Array, Any]:
    unclipped = grid is None and (spec.format.min < 0 or not spec.symmetric)
    return rounded, None if unclipped or not estimator.clip else (x, grid)


def _passed_bwd(
    estimator: StraightThrough, spec: QSpec, saved: Any, g: Array
) -> tuple[Array, None, None]:
    if saved is None:
        return g, None, None
    x, grid = saved
    if grid is None:
        return jnp.where(x >= 0, g, 0), None, None
    low, high = ends(spec)
    zero: Any = 0.0 if grid[1] is None else grid[1].astype(jnp.float32)
    v = x.astype(jnp.float32) / grid[0]
    inside, _ = estimator.slopes(Point(v, v, v, low - zero, high - zero, {}), spec)
    return jnp.where(inside, g, 0), None, None


_passed.defvjp(_passed_fwd, _passed_bwd)
