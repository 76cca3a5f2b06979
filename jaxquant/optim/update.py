"""The update of a group of leaves: decoded, updated in float32, encoded if finite."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.optim.blocks import Blocks, decode, encode, is_blocks

# gradients, state, params -> updates, state
Update = Callable[[Any, Any, Any], tuple[Any, Any]]


def decoded(tree: Any) -> Any:
    """The tree with every `Blocks` replaced by float32 values."""
    return jax.tree.map(lambda x: decode(x) if is_blocks(x) else x, tree, is_leaf=is_blocks)


def encoded(tree: Any, old: Any) -> Any:
    """The tree with values encoded as in `old`.

    A barrier computes all values before any is encoded: scales and codes both use them, and XLA
    would otherwise compute them twice.
    """
    if holds_blocks(old):
        tree = lax.optimization_barrier(tree)
    return jax.tree.map(
        lambda q, x: encode(x, q) if is_blocks(q) else x, old, tree, is_leaf=is_blocks
    )


def after(done: list[Any], args: Any) -> Any:
    """`args`, the arguments of the next update, made to depend on the last entry of `done`.

    Otherwise XLA starts with all leaves at once, and all of their state is in float.
    """
    args, done[-1] = lax.optimization_barrier((args, done[-1]))
    blocks = [q for q in jax.tree.leaves(done[-1], is_leaf=is_blocks) if is_blocks(q)]
    if not blocks or any(map(_explicit, blocks)):
        return args
    return lax.platform_dependent(args, blocks, cpu=_waiting, default=lambda args, blocks: args)


def _waiting(args: Any, blocks: list[Blocks]) -> Any:
    """Adds to codes a zero computed from `blocks`, as a dependency: JAX 0.10 drops barriers."""
    first = sum(q.codes[(0,) * q.codes.ndim].astype(jnp.int32) for q in blocks)
    zero = (jnp.int32(first) >> 24).astype(jnp.uint8)
    return jax.tree.map(
        lambda q: dataclasses.replace(q, codes=q.codes + zero) if is_blocks(q) else q,
        args,
        is_leaf=is_blocks,
    )


def _explicit(q: Blocks) -> bool:
    """Whether the codes are sharded over explicit mesh axes."""
    return any(name is not None for name in jax.typeof(q.codes).sharding.spec)


def holds_blocks(tree: Any) -> bool:
    """Whether any leaf of the tree is a `Blocks`."""
    return any(map(is_blocks, jax.tree.leaves(tree, is_leaf=is_blocks)))


def kept_unless(ok: Array, new: Any, old: Any) -> Any:
    """`new` if `ok`, else `old`, array by array."""
    return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)


def usable(state: Any) -> Array:
    """Whether all scales of blocks are finite, as they are if all values are."""
    blocks = [q for q in jax.tree.leaves(state, is_leaf=is_blocks) if is_blocks(q)]
    return _all(jnp.isfinite(q.scale).all() for q in blocks)


def all_finite(tree: Any) -> Array:
    """Whether no value of any float array is infinite or NaN."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return _all(jnp.isfinite(x).all() for x in floats)


def update_group(
    update: Update, structure: Any, g: list[Any], entries: list[Any], p: list[Any] | None
) -> tuple[list[Any], list[Any]]:
    """The updates of a group of leaves, and the new entries of their state.

    Arrays in 8 bits are decoded to float32 before and encoded after, and gradients are then cast to
    float32. Where the new state of a leaf is not finite (for leaves in float: the gradient), its
    update is zero and its state unchanged.

    Args:
      update: the update function of the inner transformation.
      structure: pytree structure of the state, whose leaves are `entries`.
      g: gradients.
      entries: entries of the state (see `Parts`); a list has one item for each leaf.
      p: parameters or `None`.
    """
    quantized = holds_blocks(entries)
    gradients = [x.astype(jnp.float32) for x in g] if quantized else g
    u, state = update(gradients, structure.unflatten(decoded(entries)), p)
    new = encoded(structure.flatten_up_to(state), entries)
    for k, (x, old_x) in enumerate(zip(u, g, strict=True)):
        of_leaf = [e[k] for e in new if isinstance(e, list)]
        ok = usable(of_leaf) if holds_blocks(of_leaf) else all_finite(old_x)
        u[k] = jnp.where(ok, x, jnp.zeros_like(x)).astype(old_x.dtype if quantized else x.dtype)
        for e, old in zip(new, entries, strict=True):
            if isinstance(e, list):
                e[k] = kept_unless(ok, e[k], old[k])
    return u, new


def _all(conditions: Iterable[Array]) -> Array:
    ok = jnp.bool_(True)
    for condition in conditions:
        ok = ok & condition
    return ok
