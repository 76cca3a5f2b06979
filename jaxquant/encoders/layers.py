"""Maps a function over layers, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def mapped(fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """`fn` at each index of the leading axis in turn: memory holds one layer at a time.

    >>> import jax.numpy as jnp
    >>> mapped(jnp.sum, (jnp.ones((3, 4)),)).tolist()
    [4.0, 4.0, 4.0]
    """
    if jax.tree.leaves(args)[0].shape[0] == 1:  # a loop would copy its operands
        out = fn(*jax.tree.map(lambda a: a[0], args))
        return jax.tree.map(lambda a: a[None], out)
    return jax.lax.map(lambda each: fn(*each), args)
