"""LSQ and LSQ+: step size, and lower end of the range, learned by gradient descent."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxquant.qtensor import QSpec, QTensor, spread
from jaxquant.ste.base import Learned, Moments, largest, middle, positive, same_range
from jaxquant.ste.blocks import filled, for_each, mean_over_blocks
from jaxquant.ste.gridded import Gridded, Point, Scales, Slopes, stored_steps


def lsq() -> LSQ:
    """LSQ: learned step size quantization.

    With `v = x / s`, `Q_min` and `Q_max` the ends of the format, and `g = 1 / sqrt(N Q_max)`:

    `dx = 1` for `Q_min < v < Q_max`, else 0;
    `ds = g (round(v) - v)` there, `g Q_min` below and `g Q_max` above.

    `N` is the number of weights that share the step, for activations the number of features (values
    for each index of the first axis). Initially `s = 2 mean|x| / sqrt(Q_max)`, or 1 if all are 0.

    The step is the scale, whatever the spec's range rule. It is used as `max(|s|, 2^-100)`, with
    its gradient times the sign of `s`: a step that an update makes negative is reflected. Scales of
    narrow dtypes are rounded as in `quantize`; their gradient passes straight through. The zero
    point of an asymmetric spec is the middle code; see `lsq_plus` to learn it.

    Source: Esser et al., "Learned Step Size Quantization", arXiv 1902.08153, sections 2.1 and 2.2.

    >>> import jax, jax.numpy as jnp
    >>> from jaxquant.qtensor import PerTensor, QSpec
    >>> spec, w = QSpec("int4", PerTensor()), jnp.array([0.3, 1.2, -9.0])
    >>> def weight(step):
    ...     learned = {"step": step}
    ...     return lsq().values(w, learned, lsq().encode(w, learned, spec))
    >>> weight(jnp.ones(1)).tolist()
    [0.0, 1.0, -8.0]
    >>> g = 1 / jnp.sqrt(3 * 7.0)  # and round(v) - v is -0.3, -0.2; below the range, -8
    >>> float((jax.grad(lambda s: weight(s).sum())(jnp.ones(1)) / g)[0])
    -8.5
    """
    return LSQ()


@dataclasses.dataclass(frozen=True)
class LSQ(Gridded):
    """The estimator that `lsq` makes."""

    learns: ClassVar[tuple[str, ...]] = ("step",)

    def init(
        self, w: Array, spec: QSpec, *, storage_last_axes: tuple[int, ...] = (), batch_axes: int = 0
    ) -> dict[str, Array]:
        """`2 mean|w| / sqrt(Q_max)` of each block."""

        def one(q: QTensor, x: Array) -> dict[str, Array]:
            return {"step": _first_step(mean_over_blocks(q, jnp.abs(x)), spec)}

        return for_each(one, w, spec, storage_last_axes, batch_axes)

    def init_activation(self, moments: Moments, spec: QSpec) -> dict[str, Array]:
        """`2 mean|x| / sqrt(Q_max)`."""
        return {"step": _first_step(jnp.asarray(moments.mean_abs, jnp.float32), spec)}

    def scales(self, learned: Learned, spec: QSpec) -> Scales:
        """The step, rounded to the dtype of scales."""
        scale, total = stored_steps(positive(learned["step"]), spec)
        zero = middle(spec)
        return scale, None if zero is None else jnp.full(scale.shape, zero, jnp.float32), total

    def slopes(self, at: Point, spec: QSpec) -> Slopes:
        """`round(v) - v` inside, the end of the format outside."""
        del spec
        return _inside(at), {"step": _step_slope(at, at.low, at.high)}

    def gain(self, count: Any, spec: QSpec) -> Any:
        """`1 / sqrt(N Q_max)`."""
        return 1.0 / np.sqrt(np.maximum(count, 1) * np.float32(_top(spec)))

    def rescaled(self, learned: Learned, old: QSpec, new: QSpec) -> dict[str, Array]:
        """Steps scaled so that the new codes cover the same range."""
        return {**learned, "step": same_range(learned["step"], old, new)}


def _top(spec: QSpec) -> float:
    """`Q_max`: for integers the largest code less the zero point, else the largest magnitude."""
    if spec.format.is_integer:
        return float(spec.format.qmax - (middle(spec) or 0))
    return largest(spec)


def _first_step(mean_abs: Array, spec: QSpec) -> Array:
    step = 2.0 * mean_abs / np.float32(np.sqrt(_top(spec)))
    return jnp.where(step > 0, step, 1.0)


def _inside(at: Point) -> Array:
    return (at.v > at.low) & (at.v < at.high)


def _step_slope(at: Point, below: Any, above: Any) -> Array:
    slope = jnp.where(at.v >= at.high, above, at.rounded - at.v)
    return jnp.where(at.v <= at.low, below, slope)


def lsq_plus() -> LSQPlus:
    """LSQ+: learned step size and lower end of the range.

    With `u = (x - beta) / s`, codes `round(u)` in `[0, P]`, `P = Q_max - Q_min`, `N` as in `lsq`:

    `dx = 1` for `0 < u < P`, else 0;
    `ds = g (round(u) - u)` there, 0 below and `g P` above; `g = 1 / sqrt(N P)`;
    `dbeta = 0` there, else `g`.

    Beta is rounded to a multiple of `s`, so that zero is exact and contractions can use integers:
    the zero point is `Z = clip(round(Q_min - beta / s), Q_min, Q_max)`, and the gradients are those
    at `beta = (Q_min - Z) s`. The paper scales the gradient of `s`; that of `beta`, a sum over as
    many values, is scaled by the same factor.

    Learned are `step` and, for asymmetric specs, `offset` (beta, the lower end in units of `x`).
    Symmetric specs have no offset, and the gradients of `lsq`. The initial step of a symmetric spec
    is `max(|mu - 3 sigma|, |mu + 3 sigma|) / max |Q|` (if unsigned, `max(x) / Q_max`); otherwise
    the range is that of the values and zero: `s = (max - min) / P`, `beta = min`. Steps stay
    positive as in `lsq`.

    Source: Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and
    better initialization", arXiv 2004.09576, sections 3.1 and 3.2.

    >>> import jax, jax.numpy as jnp
    >>> from jaxquant.qtensor import PerTensor, QSpec
    >>> spec, w = QSpec("uint2", PerTensor(), symmetric=False), jnp.array([-3.0, 0.2, 1.9])
    >>> def total(offset):
    ...     learned = {"step": jnp.ones(1), "offset": offset}
    ...     return lsq_plus().values(w, learned, lsq_plus().encode(w, learned, spec)).sum()
    >>> float(total(-jnp.ones(1)))  # -1 + 0 + 2
    1.0
    >>> float(jax.grad(total)(-jnp.ones(1))[0] * jnp.sqrt(3 * 3.0))  # one value is below the range
    1.0
    """
    return LSQPlus()


@dataclasses.dataclass(frozen=True)
class LSQPlus(LSQ):
    """The estimator that `lsq_plus` makes."""

    learns: ClassVar[tuple[str, ...]] = ("step", "offset")

    def init(
        self, w: Array, spec: QSpec, *, storage_last_axes: tuple[int, ...] = (), batch_axes: int = 0
    ) -> dict[str, Array]:
        """From mean and deviation of each block, for asymmetric specs from its ends."""

        def one(q: QTensor, x: Array) -> dict[str, Array]:
            inner = tuple(range(1, x.ndim, 2))
            mean = mean_over_blocks(q, x)
            square = mean_over_blocks(q, jnp.square(x - spread(q, mean)) * filled(q))
            low, high = (f(x, axis=inner, initial=0.0) for f in (jnp.min, jnp.max))
            return _first_range(mean, jnp.sqrt(square), low, high, spec)

        return for_each(one, w, spec, storage_last_axes, batch_axes)

    def init_activation(self, moments: Moments, spec: QSpec) -> dict[str, Array]:
        """From mean and deviation, for asymmetric specs from the ends."""
        m = Moments(*(jnp.asarray(a, jnp.float32) for a in moments))
        return _first_range(m.mean, m.std, m.low, m.high, spec)

    def scales(self, learned: Learned, spec: QSpec) -> Scales:
        """The step, and the zero point nearest to the offset."""
        scale, total = stored_steps(positive(learned["step"]), spec)
        if spec.symmetric:
            return scale, None, total
        # by the reciprocal: XLA may or may not rewrite a division to it, and codes would differ
        below = learned["offset"].astype(jnp.float32) * (1.0 / scale.astype(jnp.float32))
        zero = spec.format.qmin - jnp.round(below)
        return scale, jnp.clip(zero, spec.format.qmin, spec.format.qmax), total

    def slopes(self, at: Point, spec: QSpec) -> Slopes:
        """As `lsq`, relative to the lower end of the range."""
        if spec.symmetric:
            return super().slopes(at, spec)
        inside = _inside(at)
        step = _step_slope(at, 0.0, at.high - at.low)
        return inside, {"step": step, "offset": jnp.where(inside, 0.0, 1.0)}

    def gain(self, count: Any, spec: QSpec) -> Any:
        """`1 / sqrt(N P)`, for symmetric specs `1 / sqrt(N Q_max)`."""
        if spec.symmetric:
            return super().gain(count, spec)
        codes = spec.format.qmax - spec.format.qmin
        return 1.0 / np.sqrt(np.maximum(count, 1) * np.float32(codes))

    def _own(self, spec: QSpec) -> tuple[str, ...]:
        return ("step",) if spec.symmetric else self.learns


def _first_range(mean: Array, std: Array, low: Array, high: Array, spec: QSpec) -> dict[str, Array]:
    if not spec.symmetric:
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        step = (high - low) / np.float32(spec.format.qmax - spec.format.qmin)
        return {"step": jnp.where(step > 0, step, 1.0), "offset": low}
    if spec.format.min < 0:
        step = jnp.maximum(jnp.abs(mean - 3 * std), jnp.abs(mean + 3 * std)) / largest(spec)
    else:
        step = high / largest(spec)
    return {"step": jnp.where(step > 0, step, 1.0)}
