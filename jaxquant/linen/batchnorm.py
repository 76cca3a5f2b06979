"""BatchNorm on running statistics, without a change to the model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.linen.module import InterceptorContext


def freeze_batchnorm(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function in which every `nn.BatchNorm` normalizes by its running statistics.

    `y = scale (x - mean) / sqrt(var + eps) + bias` with the mean and variance that are stored, and
    they stay as they are, whatever `use_running_average` says in the model or at the call. All else
    goes on as in training: dropout, other collections, what is returned.

    Args:
      fn: a function of variables that applies Linen modules, such as `model.apply`.

    Raises:
      ValueError: `fn` is no function; at the call: statistics move on that are no `nn.BatchNorm`'s,
        or of one within an `nn.jit` that goes on doing what it did when it was first traced.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
    >>> model, x = nn.BatchNorm(use_running_average=False), jnp.arange(8.0).reshape(4, 2)
    >>> variables = model.init(jax.random.key(0), x)
    >>> frozen = jq.linen.freeze_batchnorm(model.apply)
    >>> y, updates = frozen(variables, x, mutable=["batch_stats"])
    >>> bool(jnp.allclose(y, x, atol=1e-4)), updates["batch_stats"]["mean"].tolist()
    (True, [0.0, 0.0])
    """
    if not callable(fn) or isinstance(fn, nn.Module):
        kind = f"a {type(fn).__name__}; pass its apply" if isinstance(fn, nn.Module) else repr(fn)
        raise ValueError(f"linen.freeze_batchnorm: expected a function, got {kind}")

    @functools.wraps(fn)
    def frozen(variables: Any, /, *args: Any, **kwargs: Any) -> Any:
        reached: set[tuple[str, ...]] = set()
        with nn.intercept_methods(functools.partial(_running, reached)):
            result = fn(variables, *args, **kwargs)
        _require_reached(reached, variables, result)
        return result

    return frozen


def _running(
    reached: set[tuple[str, ...]],
    next_fun: Callable[..., Any],
    args: Any,
    kwargs: Any,
    context: InterceptorContext,
) -> Any:
    """The interceptor: calls of BatchNorm on running statistics, their paths into `reached`."""
    module = context.module
    concerned = isinstance(module, nn.BatchNorm) and context.method_name == "__call__"
    if not concerned or module.scope is None or module.is_initializing():
        return next_fun(*args, **kwargs)
    reached.add(module.scope.path)
    kwargs = {k: v for k, v in kwargs.items() if k != "use_running_average"}
    # A field that is set and an argument exclude each other. The instance is the one that Flax
    # cloned for this call; a clone of our own would be called, and its result captured, twice.
    given = module.use_running_average
    object.__setattr__(module, "use_running_average", True)
    try:
        return next_fun(*args[:1], **kwargs)
    finally:
        object.__setattr__(module, "use_running_average", given)


def _require_reached(reached: set[tuple[str, ...]], variables: Any, result: Any) -> None:
    """Raises where the result holds new running statistics of a module that was not reached."""
    updates = result[1] if isinstance(result, tuple) and len(result) == 2 else None
    before, after = (
        v.get(_STATS) if isinstance(v, Mapping) else None for v in (variables, updates)
    )
    given = dict(jax.tree.leaves_with_path(before))
    for path, leaf in jax.tree.leaves_with_path(after):
        names = tuple(str(part.key) for part in path if hasattr(part, "key"))
        moved = path in given and leaf is not given[path]
        if moved and names[-1:] in (("mean",), ("var",)) and names[:-1] not in reached:
            raise ValueError(
                f"linen.freeze_batchnorm: {'/'.join((_STATS, *names))} moves on: it is of no "
                "nn.BatchNorm, or within an nn.jit, which goes on as it was first traced"
            )


_STATS = "batch_stats"
