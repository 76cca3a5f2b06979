"""Common parts of rewrites that move scale between an activation and its weights.

`sum_k x_k w_kn = sum_k (x_k / c_k) (c_k w_kn)`: one factor `c_k > 0` for each input channel, shared
by all weights that one activation feeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxquant.observers.inputs import InputStats
from jaxquant.qtensor import QSpec, dequantize, encode_array


def require_fitting(
    name: str,
    weights: Sequence[Array],
    specs: Sequence[QSpec],
    stats: InputStats | None,
    *,
    hessian: bool,
) -> None:
    """Checks the arguments of a rewrite.

    Raises:
      ValueError: see `jaxquant.recipe.Rewrite`; values are checked only outside of traces.
    """
    if stats is None:
        raise ValueError(f"{name}: expected statistics of the weights' inputs, got None")
    if not weights or len(weights) != len(specs):
        raise ValueError(
            f"{name}: expected as many specs as weights, at least one; "
            f"got {len(specs)} and {len(weights)}"
        )
    lead, width = tuple(stats.absmax.shape[:-1]), stats.absmax.shape[-1]
    for w in weights:
        if w.ndim < 2 or (*w.shape[:-2], w.shape[-2]) != (*lead, width):
            raise ValueError(
                f"{name}: expected weights {[*lead, width, 'N']} beside statistics of {width} "
                f"channels, got {list(w.shape)}"
            )
        if not jnp.issubdtype(w.dtype, jnp.floating):
            raise ValueError(f"{name}: expected float weights, got {w.dtype.name}{list(w.shape)}")
    if hessian and stats.hessian is None:
        raise ValueError(
            f"{name}: the output error needs second moments of the inputs; expected statistics "
            "of observers.inputs(), got those of inputs(hessian=False)"
        )
    arrays: dict[str, Any] = {"rows": stats.rows, "absmax": stats.absmax, "absmean": stats.absmean}
    if hessian:
        arrays["hessian"] = stats.hessian
    for field, x in arrays.items():
        if isinstance(x, jax.core.Tracer):
            continue
        if not np.isfinite(np.asarray(x)).all():
            raise ValueError(f"{name}: the statistics' {field} holds values that are not finite")
        if field == "rows" and not (np.asarray(x) > 0).any():
            raise ValueError(
                f"{name}: expected statistics of at least one row with inputs, got none"
            )


def for_each(fn: Callable[..., Any], trees: Any, lead: tuple[int, ...]) -> Any:
    """`fn(*trees)` for every index of the leading axes `lead`, one after the other.

    >>> for_each(lambda a, b: a @ b, (jnp.ones((2, 3)), jnp.ones((2, 3))), (2,)).tolist()
    [3.0, 3.0]
    """
    if not lead:
        return fn(*trees)
    size, rank = math.prod(lead), len(lead)
    flat = jax.tree.map(lambda a: a.reshape(size, *a.shape[rank:]), trees)
    out = lax.map(lambda args: fn(*args), flat)
    return jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), out)


def around_one(c: Array, live: Array) -> Array:
    """`c` over its geometric mean in the channels `live`, and 1 in all others.

    Only ratios of factors matter. Factors around 1 keep weights and inputs in the range of their
    dtype, and a channel without statistics is unchanged.

    >>> around_one(jnp.array([2.0, 8.0, 5.0]), jnp.array([True, True, False])).tolist()
    [0.5, 2.0, 1.0]
    """
    logs = jnp.where(live, jnp.log(jnp.where(live, c, 1.0)), 0.0)
    mean = jnp.sum(logs) / jnp.maximum(jnp.sum(live), 1)
    return jnp.where(live, jnp.exp(logs - mean), 1.0)


def output_error(
    weights: Sequence[Array], specs: Sequence[QSpec], c: Array, hessian: Array
) -> Array:
    """The output error of rounding `c W` to nearest: `sum_i tr(D_i^T H D_i)`.

    `D_i = Q(c W_i) / c - W_i`. With `H = X^T X / n` this is the mean of `|x D_i|^2` over rows,
    summed over weights.

    Args:
      weights: float32 `[K, N_i]`.
      specs: one for each weight.
      c: `[K]`.
      hessian: `[K, K]`.
    """
    chex.assert_shape(c, (None,))
    chex.assert_shape(hessian, (c.size, c.size))
    chex.assert_shape(weights, (c.size, None))
    total = jnp.float32(0.0)
    for w, spec in zip(weights, specs, strict=True):
        q = encode_array(w * c[:, None], spec, storage_last_axes=(0,))
        d = dequantize(q, jnp.float32) / c[:, None] - w
        total += jnp.sum(jnp.matmul(hessian, d, precision="highest") * d)
    return total
