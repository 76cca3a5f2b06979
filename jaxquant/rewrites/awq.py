"""AWQ: weights of large inputs are rounded on a finer grid."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.encoders.checks import check_count, check_flag
from jaxquant.observers.inputs import Inputs, InputStats, inputs
from jaxquant.qtensor import PerGroup, QSpec
from jaxquant.recipe.rewrite import Details
from jaxquant.report import Called
from jaxquant.rewrites.scaling import for_each, output_error, require_fitting

LEAST = 1e-4


@dataclasses.dataclass(frozen=True, repr=False)
class ActivationAware(Called):
    """The rewrite that `awq` makes.

    Attributes:
      steps: number of ratios to try.
      duo: whether ratios with the weights' magnitudes are tried, too.
      online: see `Rewrite`.
    """

    name = "awq"

    steps: int = 20
    duo: bool = False
    online: bool = True

    def __post_init__(self) -> None:
        check_count("awq: steps", self.steps)
        check_flag("awq: duo", self.duo)
        check_flag("awq: online", self.online)

    @property
    def observer(self) -> Inputs:
        """Mean magnitudes and second moments of the inputs."""
        return inputs()

    def __call__(
        self, weights: Sequence[Array], specs: Sequence[QSpec], stats: InputStats
    ) -> tuple[Array, Details]:
        """The factors, see `Rewrite`.

        Details: the chosen `ratio`; with `duo`, whether it is one with the `weights`; its output
        `error`; and `rounded`, the error of ratio 0, which is rounding to nearest.
        """
        require_fitting("awq", weights, specs, stats, hessian=True)
        assert stats.hessian is not None
        return _search(
            tuple(weights), stats.absmean, stats.hessian, tuple(specs), self.steps, self.duo
        )


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _search(
    weights: tuple[Array, ...],
    absmean: Array,
    hessian: Array,
    specs: tuple[QSpec, ...],
    steps: int,
    duo: bool,
) -> tuple[Array, Details]:
    # the first candidate is rounding to nearest, which wins where nothing is better
    ratios = jnp.tile(jnp.arange(steps, dtype=jnp.float32) / steps, 2 if duo else 1)
    with_weights = jnp.arange(ratios.size) >= steps

    def one(weights: tuple[Array, ...], absmean: Array, h: Array) -> tuple[Array, Details]:
        weights = tuple(w.astype(jnp.float32) for w in weights)
        means = _mean_magnitude(weights, specs) if duo else None

        def factors(candidate: tuple[Array, Array]) -> Array:
            ratio, by_weights = candidate
            s = absmean**ratio
            if means is not None:
                s = jnp.where(by_weights, s / (means ** (1.0 - ratio) + LEAST), s)
            return _centred(jnp.maximum(s, LEAST), absmean > 0)

        candidates = (ratios, with_weights)
        errors = lax.map(lambda x: output_error(weights, specs, factors(x), h), candidates)
        best = jnp.argmin(jnp.where(jnp.isnan(errors), jnp.inf, errors))
        details = {"ratio": ratios[best], "error": errors[best], "rounded": errors[0]}
        if duo:
            details["weights"] = with_weights[best]
        return factors((ratios[best], with_weights[best])), details

    return for_each(one, (weights, absmean, hessian), absmean.shape[:-1])


def _centred(s: Array, live: Array) -> Array:
    """`s / sqrt(max s * min s)` over the channels `live`, and 1 in all others."""
    low = jnp.min(jnp.where(live, s, jnp.inf), initial=math.inf)
    high = jnp.max(jnp.where(live, s, 0.0), initial=0.0)
    return jnp.where(live, s / jnp.sqrt(jnp.where(live, high * low, 1.0)), 1.0)


def _mean_magnitude(weights: Sequence[Array], specs: Sequence[QSpec]) -> Array:
    """Mean over all outputs of `|w|`, relative to the largest of its group: `[K]`."""
    total, count = jnp.float32(0.0), 0
    for w, spec in zip(weights, specs, strict=True):
        rows, columns = w.shape
        size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else rows
        size = min(size, max(rows, 1))
        a = jnp.pad(jnp.abs(w), ((0, -rows % size), (0, 0))).reshape(-1, size, columns)
        top = jnp.max(a, axis=1, keepdims=True)
        relative = (a / jnp.where(top > 0, top, 1.0)).reshape(-1, columns)[:rows]
        total, count = total + jnp.sum(relative, axis=1), count + columns
    return total / max(count, 1)


def awq(steps: int = 20, duo: bool = False, online: bool = True) -> ActivationAware:
    """Activation-aware weight quantization: the factors with the least output error.

        c_k = s_k / sqrt(max s  min s),   s_k = max(mean |x_k|^r, 1e-4)

    with the ratio `r` of `0, 1/steps, ..., 1 - 1/steps` that has the least output error

        sum_i tr(D_i^T H D_i),   D_i = Q(c W_i) / c - W_i,   H = X^T X / n

    over all weights that the activation feeds, each rounded to nearest by its own spec. Ratio 0 is
    plain rounding to nearest, so the error is never above that. A channel whose inputs are all 0
    keeps the factor 1.

    Args:
      steps: number of ratios to try.
      duo: tries as many again with the mean magnitude of weights, each relative to the largest of
        its group: `s_k = max(mean |x_k|^r / mean |w_k|^(1 - r), 1e-4)`.
      online: whether the division stays on the activation where nothing before it (a norm's scale,
        a linear layer) can absorb it; `False` leaves these weights unchanged.

    Raises:
      ValueError: `steps` is not a positive integer.

    Source: Lin et al., "AWQ" (2024), section 3.2; `duo` as in later implementations of it.

    >>> import jax, jax.numpy as jnp, jaxquant as jq
    >>> from jaxquant.observers.inputs import InputStats
    >>> a, b = jax.random.split(jax.random.key(0))
    >>> x = jax.random.normal(a, (256, 64)).at[:, :4].multiply(30.0)
    >>> stats = InputStats(
    ...     jnp.float32(256), abs(x).max(0), abs(x).mean(0), x.T @ x / 256, axes=(-2,), batched=()
    ... )
    >>> w, spec = jax.random.normal(b, (64, 32)), jq.QSpec("int3", jq.PerGroup(32, axis=0))
    >>> c, details = jq.awq()([w], [spec], stats)
    >>> c.shape, bool(details["error"] < 0.7 * details["rounded"])
    ((64,), True)
    """
    return ActivationAware(steps, duo, online)
