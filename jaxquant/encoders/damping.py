"""The triangular factor of a Hessian, with as much damping as the factorisation needs."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

# Lower bound of raised damping: ten times 0 is 0.
_LEAST = 1e-4
# Upper bound: a matrix that fails with a million times its mean is not finite.
_MOST = 1e6


def factor(hessian: Array, damping: float) -> tuple[Array, Array]:
    """Upper triangular `M` with `M M^T = H + d mean(diag H) I`, and the `d` used.

    `U = M^-1` is the upper Cholesky factor of the inverse, `U^T U = H^-1`. With `P` the exchange
    matrix, `P H P = L L^T` gives `M = P L P`: one factorisation and no inverse. A factorisation
    that fails gives NaN and is repeated with ten times the damping.

    Args:
      hessian: `[K, K]` float32, symmetric, no zero on its diagonal.
      damping: the first `d`, relative to the mean of the diagonal.

    Returns:
      `M`, NaN if no damping helped, and `d` `[]`.

    Source: Frantar et al., "GPTQ" (arXiv 2210.17323), section 3.3, step 3.

    >>> m, used = factor(jnp.array([[2.0, 1.0], [1.0, 2.0]]), 0.0)
    >>> (m @ m.T).round(4).tolist(), float(used)
    ([[2.0, 1.0], [1.0, 2.0]], 0.0)
    """
    k = hessian.shape[0]
    mean = jnp.mean(jnp.diagonal(hessian))
    mirrored = hessian[::-1, ::-1]
    # a mask: damps the diagonal without a second matrix
    eye = lax.broadcasted_iota(jnp.int32, (k, k), 0) == lax.broadcasted_iota(jnp.int32, (k, k), 1)

    def again(carry: tuple[Array, Array, Array]) -> Array:
        _, finite, damping = carry
        return ~finite & (damping < _MOST)

    def attempt(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        _, _, before = carry
        now = jnp.where(before < 0, damping, jnp.maximum(10 * before, _LEAST))
        damped = mirrored + jnp.where(eye, now * mean, 0.0)
        lower = lax.linalg.cholesky(damped, symmetrize_input=False)
        return lower, jnp.isfinite(jnp.diagonal(lower)).all(), now

    start = (jnp.full((k, k), jnp.nan, jnp.float32), jnp.bool_(False), jnp.float32(-1.0))
    lower, _, used = lax.while_loop(again, attempt, start)
    return lower[::-1, ::-1], used
