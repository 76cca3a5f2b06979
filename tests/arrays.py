"""Arrays made by NumPy, without a program: `jnp.asarray` compiles a conversion for each shape."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def array(values: Any, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """`jnp.asarray` of what NumPy has.

    >>> array([1, 2]).dtype
    dtype('float32')
    """
    return jax.device_put(np.asarray(values, dtype))


def normal(seed: int, *shape: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Standard normal values of a seed.

    >>> normal(0, 2, 3).shape
    (2, 3)
    """
    return array(np.random.default_rng(seed).standard_normal(shape), dtype)
