"""PACT: the upper end of the range is learned."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxquant.qtensor import QSpec, QTensor, scales_of_range, store_scale
from jaxquant.ste.base import Learned, Moments, middle, positive
from jaxquant.ste.blocks import for_each
from jaxquant.ste.gridded import Gridded, Point, Scales, Slopes


def pact() -> PACT:
    """PACT: values are clipped at a learned `alpha`, which determines the scale.

    `y = clip(x, 0, alpha)`, rounded with the scale that the spec's rule gives the range, and

    `dx = 1` for `0 <= x < alpha`, else 0; `dalpha = 1` for `x >= alpha`, else 0.

    This is the paper's rule, for non-negative activations and unsigned codes. For signed and
    asymmetric specs the range is `[-alpha, alpha]`, `dx = 1` inside, and `dalpha = -1` for
    `x <= -alpha`; an asymmetric zero point is the middle code. Initially `alpha` is the largest
    value, for these specs the largest magnitude, and 1 if all are 0. It is used as
    `max(|alpha|, 2^-100)`, with its gradient times the sign of `alpha`: an `alpha` that an update
    makes negative is reflected.

    Source: Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks",
    arXiv 1805.06085, equations 1 to 3.

    >>> import jax, jax.numpy as jnp
    >>> from jaxquant.qtensor import PerTensor, QSpec
    >>> spec, x = QSpec("uint2", PerTensor(), range="qmax"), jnp.array([-1.0, 2.2, 5.0, 7.0])
    >>> scale, _ = pact().grid({"alpha": jnp.float32(6.0)}, spec)
    >>> float(scale)
    2.0
    >>> rounded = jnp.array([0.0, 2.0, 4.0, 6.0])
    >>> def total(x, alpha):
    ...     return pact().pass_activation(x, rounded, {"alpha": alpha}, spec).sum()
    >>> dx, dalpha = jax.grad(total, argnums=(0, 1))(x, jnp.float32(6.0))
    >>> dx.tolist(), float(dalpha)
    ([0.0, 1.0, 1.0, 0.0], 1.0)
    """
    return PACT()


@dataclasses.dataclass(frozen=True)
class PACT(Gridded):
    """The estimator that `pact` makes."""

    learns: ClassVar[tuple[str, ...]] = ("alpha",)

    def init(
        self, w: Array, spec: QSpec, *, storage_last_axes: tuple[int, ...] = (), batch_axes: int = 0
    ) -> dict[str, Array]:
        """The largest magnitude of each block."""

        def one(q: QTensor, x: Array) -> dict[str, Array]:
            del q
            inner = tuple(range(1, x.ndim, 2))
            amax = jnp.max(jnp.abs(x) if _both(spec) else x, axis=inner, initial=0.0)
            return {"alpha": jnp.where(amax > 0, amax, 1.0)}

        return for_each(one, w, spec, storage_last_axes, batch_axes)

    def init_activation(self, moments: Moments, spec: QSpec) -> dict[str, Array]:
        """The largest value, or magnitude."""
        low, high = (jnp.asarray(a, jnp.float32) for a in (moments.low, moments.high))
        amax = jnp.maximum(high, -low) if _both(spec) else high
        return {"alpha": jnp.where(amax > 0, amax, 1.0)}

    def scales(self, learned: Learned, spec: QSpec) -> Scales:
        """The spec's rule applied to the range; if asymmetric, `2 alpha / (2^b - 1)`."""
        alpha, spread = positive(learned["alpha"]), spec.format.max - spec.format.min
        zero = middle(spec)
        if zero is not None:
            # The rule's zero point would be a tie, which the scale's last bit rounds up or down.
            scale = store_scale(alpha * np.float32(2.0 / spread), spec)
            return scale, jnp.full(scale.shape, zero, jnp.float32), None
        return scales_of_range(-alpha if _both(spec) else jnp.zeros_like(alpha), alpha, alpha, spec)

    def slopes(self, at: Point, spec: QSpec) -> Slopes:
        """Inside the range for the values; 1 above it for `alpha`, and -1 below it."""
        alpha = positive(at.learned["alpha"])
        above = jnp.where(at.x >= alpha, 1.0, 0.0)
        if not _both(spec):
            return (at.x >= 0) & (at.x < alpha), {"alpha": above}
        below = at.x <= -alpha
        return (at.x < alpha) & ~below, {"alpha": jnp.where(below, -1.0, above)}

    def rescaled(self, learned: Learned, old: QSpec, new: QSpec) -> dict[str, Array]:
        """Unchanged: the range does not depend on the number of bits."""
        del old, new
        return dict(learned)


def _both(spec: QSpec) -> bool:
    """Whether the range includes negative values."""
    return spec.format.min < 0 or not spec.symmetric
