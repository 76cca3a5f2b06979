"""Elementwise functions that lower to one operation each.

`jnp.where`, `jnp.clip` and `jnp.round` are jitted: each use is traced as a call, and each shape
adds a function to the lowered module. Code that runs at every contraction uses these instead.
"""

from __future__ import annotations

import numpy as np
from jax import Array, lax


def select(where: Array, x: Array | float, y: Array | float) -> Array:
    """`x` where `where` is true, else `y`; arrays have equal shape and dtype, numbers take both.

    >>> import jax.numpy as jnp
    >>> select(jnp.array([True, False]), 0.0, jnp.array([1.0, 2.0])).tolist()
    [0.0, 2.0]
    """
    like = x if isinstance(x, Array) else y
    assert isinstance(like, Array)
    a, b = (v if isinstance(v, Array) else lax.full_like(like, v) for v in (x, y))
    return lax.select(where, a, b)


def clamp(low: float, x: Array, high: float) -> Array:
    """`min(max(x, low), high)`, NaN where `x` is.

    >>> import jax.numpy as jnp
    >>> clamp(-1.0, jnp.array([-3.0, 0.5, 2.0]), 1.0).tolist()
    [-1.0, 0.5, 1.0]
    """
    return lax.clamp(number(low, x), x, number(high, x))


def is_nan(x: Array) -> Array:
    """Where `x` is NaN.

    >>> import jax.numpy as jnp
    >>> is_nan(jnp.array([1.0, jnp.nan])).tolist()
    [False, True]
    """
    return lax.ne(x, x)


def number(value: float, x: Array) -> np.ndarray:
    """A number in the dtype of `x`: `lax` does not promote, and a float is float64 under x64.

    >>> import jax.numpy as jnp
    >>> number(0.5, jnp.ones(2, jnp.bfloat16)).dtype.name
    'bfloat16'
    """
    return np.asarray(value, x.dtype)
