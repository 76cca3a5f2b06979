"""BatchNorm on running statistics, without a change to the model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.linen.module import InterceptorContext


def freeze_batchnorm(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function so that every `nn.BatchNorm` normalizes by its running statistics.

    `y = scale (x - mean) / sqrt(var + eps) + bias` with the stored mean and variance, which stay
    unchanged, whatever `use_running_average` is in the model or at the call. All else is as in
    training: dropout, other collections, the structure of the result.

    Args:
      fn: a function of variables that applies Linen modules, such as `model.apply`.

    Raises:
      ValueError: `fn` is not a function; at the call: statistics change that are not of an
        `nn.BatchNorm`, or of one within an `nn.jit` whose cached trace is used.

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
    """Intercepts BatchNorm calls to use running statistics; adds module paths to `reached`."""
    module = context.module
    is_batchnorm = isinstance(module, nn.BatchNorm) and context.method_name == "__call__"
    if not is_batchnorm or module.scope is None or module.is_initializing():
        return next_fun(*args, **kwargs)
    reached.add(module.scope.path)
    kwargs = {k: v for k, v in kwargs.items() if k != "use_running_average"}
    # Flax forbids setting both the field and the argument. Flax cloned this instance for this call,
    # so it may change; another clone would be called, and its result captured, twice.
    before = module.use_running_average
    object.__setattr__(module, "use_running_average", True)
    try:
        return next_fun(*args[:1], **kwargs)
    finally:
        object.__setattr__(module, "use_running_average", before)


def _require_reached(reached: set[tuple[str, ...]], variables: Any, result: Any) -> None:
    """Raises if the result has new running statistics of a module that was not intercepted."""
    updates = result[1] if isinstance(result, tuple) and len(result) == 2 else None
    before, after = (
        v.get(_STATS) if isinstance(v, Mapping) else None for v in (variables, updates)
    )
    old_leaves = dict(jax.tree.leaves_with_path(before))
    for path, leaf in jax.tree.leaves_with_path(after):
        names = tuple(str(part.key) for part in path if hasattr(part, "key"))
        changed = path in old_leaves and leaf is not old_leaves[path]
        if changed and names[-1:] in (("mean",), ("var",)) and names[:-1] not in reached:
            raise ValueError(
                f"linen.freeze_batchnorm: {'/'.join((_STATS, *names))} changes: it is not of an "
                "nn.BatchNorm, or of one within an nn.jit, whose cached trace is used"
            )


_STATS = "batch_stats"
