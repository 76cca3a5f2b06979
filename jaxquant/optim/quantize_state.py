"""`quantize_state`: any optax transformation with 8-bit state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxquant.optim.blocks import encode, is_blocks, zero_blocks
from jaxquant.optim.leafwise import Parts, agree, in_order, take_apart
from jaxquant.optim.spec import StateSpec, named
from jaxquant.optim.update import (
    Update,
    after,
    all_finite,
    decoded,
    encoded,
    kept_unless,
    update_group,
    usable,
)
from jaxquant.qtensor import is_qtensor


def quantize_state(
    inner: optax.GradientTransformation,
    spec: StateSpec | None = None,
    *,
    leafwise: bool | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps a transformation so that large arrays of its state are blocks of 8-bit codes.

    Each update decodes the state to float32, updates it, and encodes it as `nearest(x / s)` with
    `s = max |x|` over a block. The state has the structure of `inner`'s (such as
    `ScaleByAdamState(count, mu, nu)`), with `Blocks` instead of arrays of `min_size` elements or
    more.

    Transformations that treat leaves independently (moments of gradients; most of optax) run leaf
    by leaf: at most one large leaf's state is in float at any time. Leaves with only smaller
    arrays are updated by one call of `inner`, bit for bit as if the tree had no others.
    Transformations that combine leaves (clipping by global norm, one step size for all), or
    distinguish them (a mask in `inner`), see the full tree, so that all of the state may be in
    float at once. Put masks and clipping outside:
    `optax.chain(optax.clip_by_global_norm(1.0), quantize_state(optax.scale_by_adam()))`.

    Where NaN or infinities in a gradient, or overflow of its square, would make the new state of a
    leaf non-finite, that leaf gets a zero update and keeps its state, while counters advance; where
    `inner` sees the full tree, one such leaf makes all updates zero and keeps all of the state.
    To skip and count such steps, wrap in `optax.apply_if_finite`.

    `nnx.Optimizer` breaks up such a state at its second update: keep the optimizer state outside
    the model, and update with `nnx.state(model, nnx.Param)`.

    Args:
      inner: any optax transformation.
      spec: block size, minimum size and unsigned fields; `None` is `StateSpec()`.
      leafwise: whether `inner` treats all leaves equally and independently. `None` checks this by
        tracing it on the full tree and on single leaves.

    Returns:
      A transformation; its `init` raises `ValueError` for params that contain a `QTensor`.

    Raises:
      ValueError: `inner` is not a transformation or `spec` not a `StateSpec`.

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2021).

    >>> tx = quantize_state(optax.scale_by_adam())
    >>> state = tx.init({"w": jnp.zeros((64, 256)), "b": jnp.zeros(3)})
    >>> state.mu["w"], state.nu["b"].dtype
    (Blocks(signed 8-bit[64, 256], tile=[1, 256]), dtype('float32'))
    """
    spec = StateSpec() if spec is None else spec
    if not isinstance(spec, StateSpec):
        raise ValueError(f"quantize_state: expected a StateSpec, got {spec!r}")
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise ValueError(f"quantize_state: expected an optax transformation, got {inner!r}")
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        _refuse_qtensors(params)
        shapes = jax.eval_shape(inner.init, params)
        parts = take_apart(shapes, params)
        groups = parts.groups(spec.takes)
        each = functools.partial(_init_each, inner.init, parts, groups)
        inside = len(groups) > 1 and not any(map(spec.takes, parts.entries))
        if inside and (leafwise or agree(inner.init, each, jax.tree.map(_stand_in, params))):
            return each(params, functools.partial(_hold, spec))
        return jax.tree.map_with_path(functools.partial(_hold, spec), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        _refuse_qtensors(updates)
        run = functools.partial(inner.update, **extra)
        parts = take_apart(state, updates)
        groups = parts.groups(is_blocks)
        if groups and not any(map(is_blocks, parts.entries)):
            args = (updates, state, params)
            by_leaf = leafwise
            if by_leaf is None:
                floats = jax.tree.map(_stand_in, args, is_leaf=is_blocks)
                by_leaf = agree(run, functools.partial(_update_each, _plain, run, groups), *floats)
            if by_leaf:
                return _update_each(update_group, run, groups, *args)
        steps, new = run(updates, decoded(state), params)
        new = encoded(new, state)
        ok = all_finite(updates) & usable(new)
        steps = jax.tree.map(lambda u, g: jnp.where(ok, u, 0).astype(g.dtype), steps, updates)
        return steps, kept_unless(ok, new, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _init_each(
    init: Any, parts: Parts, groups: list[list[int]], params: Any, hold: Any = lambda path, x: x
) -> Any:
    """Initial state, one group at a time: large arrays are encoded before the next group's."""
    leaves = jax.tree.leaves(params)
    entries = []
    for group in groups:
        state = parts.outer.flatten_up_to(init([leaves[k] for k in group]))
        entries.append(
            [
                [hold(path, x) for x in e] if isinstance(e, list) else hold(path, e)
                for path, e in zip(parts.paths, state, strict=True)
            ]
        )
    return parts.joined(groups, entries)


def _update_each(
    one: Callable[..., Any],
    run: Update,
    groups: list[list[int]],
    updates: Any,
    state: Any,
    params: Any,
) -> Any:
    """Updates and state of a transformation run on each group of leaves separately."""
    parts = take_apart(state, updates)
    structure: Any
    gradients, structure = jax.tree.flatten(updates)
    weights = None if params is None else structure.flatten_up_to(params)
    steps: list[Any] = []
    new: list[Any] = []
    for group in groups:
        g, p = (None if x is None else [x[k] for k in group] for x in (gradients, weights))
        args = (g, parts.of(group), p)
        if new and any(isinstance(x, jax.core.Tracer) for x in gradients):
            args = after(new, args)
        u, entries = one(run, parts.outer, *args)
        steps.append(u)
        new.append(entries)
    return structure.unflatten(in_order(groups, steps)), parts.joined(groups, new)


def _plain(run: Update, structure: Any, g: Any, entries: list[Any], p: Any) -> Any:
    """`update_group` for state in float."""
    u, state = run(g, structure.unflatten(entries), p)
    return u, structure.flatten_up_to(state)


def _hold(spec: StateSpec, path: tuple[Any, ...], x: Any) -> Any:
    if not spec.takes(x):
        return x
    return _first_codes(x, spec.signed(path), spec.block_size)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _first_codes(x: Any, signed: bool, block_size: int) -> Any:
    return encode(x, zero_blocks(x, signed, block_size))


def _stand_in(x: Any) -> jax.ShapeDtypeStruct:
    dtype = jnp.float32 if is_blocks(x) else jnp.result_type(x)
    return jax.ShapeDtypeStruct(jnp.shape(x) if not is_blocks(x) else x.shape, dtype)


def _refuse_qtensors(tree: Any) -> None:
    for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_qtensor):
        if is_qtensor(leaf):
            raise ValueError(
                f"{named(path)} is a QTensor, which no optimizer can train: split the params by "
                "`trainable, quantized = jaxquant.partition(params)` and train `trainable`"
            )
