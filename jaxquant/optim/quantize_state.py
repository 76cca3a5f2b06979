"""`quantize_state`: any optax transformation, its state held in 8 bits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxquant.optim.blocks import encode, is_blocks, zero_blocks
from jaxquant.optim.leafwise import Parts, agree, take_apart
from jaxquant.optim.spec import StateSpec, named
from jaxquant.optim.update import all_finite, decoded, encoded, kept_unless, update_leaf
from jaxquant.qtensor import is_qtensor


def quantize_state(
    inner: optax.GradientTransformation,
    spec: StateSpec | None = None,
    *,
    leafwise: bool | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The same transformation, with large arrays of its state held as blocks of 8-bit codes.

    Each update decodes the state to float32, updates, and encodes it: what is stored is
    `nearest(x / s)` with `s = max |x|` over a block. The state has the structure of `inner`'s own
    (`ScaleByAdamState(count, mu, nu)`, say), with `Blocks` in the place of arrays of `min_size`
    elements or more. Smaller arrays are updated as by `inner` on that leaf, bit for bit.

    Transformations that treat each leaf by itself (moments of gradients; most of optax) are run
    leaf by leaf: at no time is more than one leaf's state in float. Those that mix leaves (a clip
    by the global norm, one step size for all), or tell them apart (a mask in `inner`), see whole
    trees, so that all of the state may be in float at once. Masks and clips therefore belong
    outside: `optax.chain(optax.clip_by_global_norm(1.0), quantize_state(optax.scale_by_adam()))`.

    A leaf whose gradient holds NaN or infinities gets an update of zero and keeps its state, while
    counters go on; where `inner` sees whole trees, one such gradient makes all updates zero and
    keeps all of the state. To skip and to count whole steps, wrap in `optax.apply_if_finite`.

    Args:
      inner: any optax transformation.
      spec: block size, smallest size and which fields have no sign; `None` is `StateSpec()`.
      leafwise: whether `inner` treats every leaf alike and by itself. `None` finds out, by tracing
        it on the whole tree and on single leaves.

    Returns:
      A transformation; its `init` raises `ValueError` for params that hold a `QTensor`.

    Raises:
      ValueError: `inner` is no transformation or `spec` no `StateSpec`.

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
    known: dict[Any, bool] = {}  # by structure and shapes: tracing again would tell the same

    def runs_by_leaf(updates: Any, state: Any, params: Any, extra: dict[str, Any]) -> bool:
        if leafwise is not None:
            return leafwise
        given = jax.tree.map(_stand_in, (updates, state, params), is_leaf=is_blocks)
        leaves, structure = jax.tree.flatten(given)
        key = (structure, tuple((x.shape, x.dtype) for x in leaves), tuple(extra))
        if key not in known:
            whole = functools.partial(inner.update, **extra)
            known[key] = agree(whole, functools.partial(_update_each, _plain, whole), *given)
        return known[key]

    def init(params: Any) -> Any:
        _refuse_qtensors(params)
        shapes = jax.eval_shape(inner.init, params)
        if not any(map(spec.takes, jax.tree.leaves(shapes))):
            return inner.init(params)
        parts = take_apart(shapes, params)
        each = functools.partial(_init_each, inner, parts)
        inside = not any(spec.takes(e) for e in parts.entries)
        if inside and (leafwise or agree(inner.init, each, jax.tree.map(_stand_in, params))):
            return each(params, functools.partial(_hold_leaf, parts, spec))
        return _hold(inner.init(params), spec)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        _refuse_qtensors(updates)
        run = functools.partial(inner.update, **extra)
        inside = not any(map(is_blocks, take_apart(state, updates).entries))
        if inside and runs_by_leaf(updates, state, params, extra):
            return _update_each(update_leaf, run, updates, state, params)
        ok = jnp.bool_(True)
        for g in jax.tree.leaves(updates):
            ok = ok & all_finite(g)
        made, new = run(updates, decoded(state), params)
        made = jax.tree.map(lambda u, g: jnp.where(ok, u, 0).astype(g.dtype), made, updates)
        return made, kept_unless(ok, encoded(new, state), state)

    return optax.GradientTransformationExtraArgs(init, update)


def _init_each(
    inner: Any, parts: Parts, params: Any, hold: Callable[[Any], Any] = lambda state: state
) -> Any:
    """The state made leaf by leaf, each held before the next one is made."""
    return parts.joined([hold(inner.init(p)) for p in jax.tree.leaves(params)])


def _plain(run: Callable[..., Any], g: Any, state: Any, p: Any, own: Any) -> Any:
    """One leaf's update as it is, `update_leaf` without 8 bits."""
    return run(g, state, p)


def _update_each(
    one: Callable[..., Any], run: Callable[..., Any], updates: Any, state: Any, params: Any
) -> Any:
    """Updates and state of a transformation run on every leaf by itself."""
    parts = take_apart(state, updates)
    structure: Any
    gradients, structure = jax.tree.flatten(updates)
    own = parts.outer.unflatten([isinstance(e, list) for e in parts.entries])
    weights = [None] * len(gradients) if params is None else structure.flatten_up_to(params)
    made: list[Any] = []
    for k, (g, p) in enumerate(zip(gradients, weights, strict=True)):
        given = (g, parts.at(k), p)
        if one is update_leaf and made and isinstance(g, jax.core.Tracer):
            # Leaves one after the other: XLA, left to itself, begins with all of them at once.
            given, made[-1] = lax.optimization_barrier((given, made[-1]))
        made.append(one(run, *given, own))
    if not made:
        return run(updates, state, params)
    return structure.unflatten([u for u, _ in made]), parts.joined([new for _, new in made])


def _hold_leaf(parts: Parts, spec: StateSpec, state: Any) -> Any:
    """The state of one leaf with large arrays held in blocks."""
    flat = parts.outer.flatten_up_to(state)
    held = [_held(path, x, spec) for path, x in zip(parts.paths, flat, strict=True)]
    return parts.outer.unflatten(held)


def _hold(state: Any, spec: StateSpec) -> Any:
    return jax.tree.map_with_path(lambda path, x: _held(path, x, spec), state)


def _held(path: tuple[Any, ...], x: Any, spec: StateSpec) -> Any:
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
                "`trainable, quantized = jaxquant.partition(params)` and train the first"
            )
