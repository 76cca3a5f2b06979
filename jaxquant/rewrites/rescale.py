"""`rescale`: moves factors of input channels into weights and the producers of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array

from jaxquant.interpret.calls import trace_call
from jaxquant.interpret.sites import path_str
from jaxquant.qtensor import is_qtensor
from jaxquant.rewrites.absorb import Absorbed, absorb
from jaxquant.rewrites.graph import graph_of
from jaxquant.rewrites.producers import absorbers


def rescale(
    fn: Callable[..., Any],
    params: Any,
    factors: Mapping[str | tuple[str, ...], Array],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[Any, dict[tuple[str, ...], Absorbed]]:
    """Multiplies weights by a factor for each input channel, and divides their producers.

        x W = (x / c) (c W)

    with `1 / c` in the leaves that produce `x`: a norm's scale and bias, or a linear layer. The
    new params give the same results but for rounding.

    Args:
      fn: any traceable function whose first argument is a params pytree.
      params: its parameters; not changed.
      factors: key path of a weight, or of all weights that one activation feeds -> positive
        factors `[*layers, channels]`, as a rewrite (`smoothquant`, `awq`) returns them.
      *args: the other arguments to trace with, arrays or `jax.ShapeDtypeStruct`s.
      kwargs: keyword arguments of `fn`, likewise.

    Returns:
      The new params; and for each entry of `factors`, by its paths as a tuple, where they went.

    Raises:
      ValueError: nothing before a weight can absorb its factors, with the reason; a path is no leaf
        of `params`; factors have a different shape.

    >>> import jax.numpy as jnp
    >>> fn = lambda p, x: (x * p["scale"][None]) @ p["w"]
    >>> params = {"scale": jnp.ones(2), "w": jnp.ones((2, 1))}
    >>> new, _ = rescale(fn, params, {"w": jnp.array([4.0, 0.5])}, jnp.ones((1, 2)))
    >>> new["scale"].tolist(), new["w"].tolist()
    ([0.25, 2.0], [[4.0], [0.5]])
    """
    flat = jax.tree.leaves_with_path(params, is_leaf=is_qtensor)
    leaves = {path_str(path): leaf for path, leaf in flat}
    graph = graph_of(trace_call(fn, params, args, kwargs))
    moves: dict[tuple[str, ...], Absorbed] = {}
    for key, c in factors.items():
        paths = (key,) if isinstance(key, str) else tuple(key)
        unknown = [path for path in paths if path not in leaves]
        if unknown or not paths:
            raise ValueError(
                f"rescale: no leaf {', '.join(unknown)!r}; the leaves are {', '.join(leaves)}"
            )
        absorbed = absorbers(graph, paths)
        if isinstance(absorbed, str):
            raise ValueError(f"rescale: nothing absorbs the factors of {paths}: {absorbed}")
        try:
            leaves.update(absorb(leaves, absorbed, c))
        except ValueError as error:
            raise ValueError(f"rescale: {paths}: {error}") from error
        moves[paths] = absorbed
    new = jax.tree.map_with_path(lambda p, _: leaves[path_str(p)], params, is_leaf=is_qtensor)
    return new, moves
