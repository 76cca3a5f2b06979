"""SmoothQuant: outliers of activations move into the weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.encoders.checks import check_flag, check_number
from jaxquant.observers.inputs import Inputs, InputStats, inputs
from jaxquant.qtensor import QSpec
from jaxquant.recipe.rewrite import Details
from jaxquant.report import Called
from jaxquant.rewrites.scaling import (
    around_one,
    for_each,
    output_error,
    require_fitting,
)

LEAST = 1e-5


@dataclasses.dataclass(frozen=True, repr=False)
class SmoothQuant(Called):
    """The rewrite that `smoothquant` makes.

    Attributes:
      alpha: the migration strength; `None` searches for it.
      online: see `Rewrite`.
    """

    name = "smoothquant"

    alpha: float | None = 0.5
    online: bool = True

    def __post_init__(self) -> None:
        if self.alpha is not None:
            check_number("smoothquant: alpha", self.alpha, 0.0, 1.0)
        check_flag("smoothquant: online", self.online)

    @property
    def observer(self) -> Inputs:
        """Largest magnitudes of the inputs; with a search their second moments, too."""
        return inputs(hessian=self.alpha is None)

    def __call__(
        self, weights: Sequence[Array], specs: Sequence[QSpec], stats: InputStats
    ) -> tuple[Array, Details]:
        """The factors, see `Rewrite`; details: `alpha`, and `error` of a search."""
        require_fitting("smoothquant", weights, specs, stats, hessian=self.alpha is None)
        hessian = stats.hessian if self.alpha is None else None
        return _smooth(tuple(weights), stats.absmax, hessian, tuple(specs), self.alpha)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _smooth(
    weights: tuple[Array, ...],
    absmax: Array,
    hessian: Array | None,
    specs: tuple[QSpec, ...],
    alpha: float | None,
) -> tuple[Array, Details]:
    def one(weights: tuple[Array, ...], absmax: Array, h: Array | None) -> tuple[Array, Details]:
        weights = tuple(w.astype(jnp.float32) for w in weights)
        rows = [jnp.max(jnp.abs(w), axis=1, initial=0.0) for w in weights]
        top = functools.reduce(jnp.maximum, rows)

        def factors(a: Array) -> Array:
            c = jnp.maximum(absmax, LEAST) ** a / jnp.maximum(top, LEAST) ** (1.0 - a)
            return around_one(c, absmax > 0)

        if alpha is not None:
            return factors(jnp.float32(alpha)), {"alpha": jnp.float32(alpha)}
        assert h is not None
        moments = h

        def error(a: Array) -> Array:
            c = factors(a)
            noise = _input_error(weights, c, absmax)
            return output_error(weights, specs, c, moments) + noise

        grid = jnp.linspace(0.0, 1.0, 21)
        errors = lax.map(error, grid)
        best = jnp.argmin(jnp.where(jnp.isnan(errors), jnp.inf, errors))
        return factors(grid[best]), {"alpha": grid[best], "error": errors[best]}

    return for_each(one, (weights, absmax, hessian), absmax.shape[:-1])


def _input_error(weights: Sequence[Array], c: Array, absmax: Array) -> Array:
    """The output error of rounding `x / c` to int8 with one scale: `S^2 / 12 sum |c W|^2`."""
    step = jnp.max(absmax / c) / 127.5
    size = sum((jnp.sum((w * c[:, None]) ** 2) for w in weights), jnp.float32(0.0))
    return step * step / 12.0 * size


def smoothquant(alpha: float | None = 0.5, online: bool = True) -> SmoothQuant:
    """SmoothQuant: divides input channels by a factor, and multiplies the weights by it.

        c_k = max |x_k|^alpha / max |w_k|^(1 - alpha)

    with both maxima at least 1e-5, and the second one over all weights that the activation feeds.
    Factors are divided by their geometric mean: only their ratios matter. A channel whose inputs
    are all 0 keeps the factor 1.

    Args:
      alpha: migration strength: 0 equalizes the weights' rows, 1 the inputs' channels. `None`
        takes, for each activation, the value of 0, 0.05, ..., 1 with the least output error of
        rounding the weights plus that (estimated) of rounding the inputs to int8 with one scale.
      online: whether the division stays on the activation where nothing before it (a norm's scale,
        a linear layer) can absorb it; `False` leaves these weights unchanged.

    Raises:
      ValueError: `alpha` is not in `[0, 1]`.

    Source: Xiao et al., "SmoothQuant" (2023), equation 4.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> from jaxquant.observers.inputs import InputStats
    >>> absmax = jnp.array([16.0, 1.0])
    >>> stats = InputStats(jnp.float32(8), absmax, absmax / 2, None, axes=(-2,), batched=())
    >>> c, _ = jq.smoothquant()([jnp.ones((2, 3))], [jq.QSpec("int8", jq.PerChannel(1))], stats)
    >>> c.tolist()
    [2.0, 0.5]
    """
    return SmoothQuant(alpha, online)
