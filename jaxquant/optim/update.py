"""One leaf's update: decoded, updated in float32, encoded; nothing changes where that fails."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.optim.blocks import Blocks, decode, encode, is_blocks, magnitudes

# Values in a part of a leaf that is updated at once on a CPU: its moments stay in the cache.
_PART = 1 << 16

# Every result of these is made of the operands' values at the same place.
_NAMES = (
    "abs add add_any and clamp convert_element_type copy div eq exp exp2 expm1 ge gt integer_pow "
    "is_finite le log log1p logistic lt max min mul ne neg not or pow rsqrt select_n sign sqrt "
    "square stop_gradient sub tanh xor"
)
_ELEMENTWISE = frozenset(_NAMES.split())

Update = Callable[[Any, Any, Any], tuple[Any, Any]]


def all_finite(x: Any) -> Array:
    """Whether no value of a float array is infinite or NaN; true for anything else."""
    if not (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)):
        return jnp.bool_(True)
    return jnp.isfinite(x).all()


def decoded(tree: Any) -> Any:
    """The tree with every `Blocks` replaced by float32 values."""
    return jax.tree.map(lambda x: decode(x) if is_blocks(x) else x, tree, is_leaf=is_blocks)


def encoded(tree: Any, old: Any) -> Any:
    """The tree with values held as `old` holds them."""
    return jax.tree.map(
        lambda q, x: encode(x, q) if is_blocks(q) else x, old, tree, is_leaf=is_blocks
    )


def kept_unless(ok: Array, new: Any, old: Any) -> Any:
    """`new` if `ok`, else `old`, array by array."""
    return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)


def update_leaf(update: Update, g: Any, state: Any, p: Any, mine: Any) -> tuple[Any, Any]:
    """The update of one leaf and its new state, as `update(g, state, p)` gives them.

    Arrays held in 8 bits are decoded to float32 before and encoded after; the gradient is read as
    float32 then. If `g` is not finite the update is zero and what belongs to the leaf stays.

    Args:
      update: of a transformation that has this leaf only.
      g: gradient.
      state: of that transformation, with `Blocks`.
      p: parameter or `None`.
      mine: a tree of bools of the structure of `state`: what belongs to the leaf.
    """
    held = any(map(is_blocks, jax.tree.leaves(state, is_leaf=is_blocks)))
    whole = functools.partial(_update_whole, update, mine=mine)
    if not held or not isinstance(g, jax.core.Tracer):
        return whole(g, state, p)
    on_cpu = update_rows if _by_rows(update, g, state, p) else _update_branch
    on_cpu = functools.partial(on_cpu, update, mine=mine)
    return lax.platform_dependent(g, state, p, cpu=on_cpu, default=whole)


def _update_whole(update: Update, g: Any, state: Any, p: Any, mine: Any) -> tuple[Any, Any]:
    held = any(map(is_blocks, jax.tree.leaves(state, is_leaf=is_blocks)))
    ok = all_finite(g)
    u, new = update(g.astype(jnp.float32) if held else g, decoded(state), p)
    new = encoded(new, state)
    new = jax.tree.map(lambda own, n, o: kept_unless(ok, n, o) if own else n, mine, new, state)
    u = u.astype(g.dtype) if held else u
    return jnp.where(ok, u, jnp.zeros_like(u)), new


def _update_branch(update: Update, g: Any, state: Any, p: Any, mine: Any) -> tuple[Any, Any]:
    """The same in a branch, which XLA does not begin before it has room: barriers it may drop."""
    ok = all_finite(g)

    def skipped(g: Any, state: Any, p: Any) -> tuple[Any, Any]:
        _, new = _update_whole(update, g, state, p, mine)  # for counters; the rest is not computed
        kept = jax.tree.map(lambda own, o, n: o if own else n, mine, state, new)
        return jnp.zeros_like(g), kept

    return lax.cond(ok, lambda g, s, p: _update_whole(update, g, s, p, mine), skipped, g, state, p)


def _rows_finite(g: Array, tile: tuple[int, ...]) -> Array:
    # a reduction of booleans is not vectorised on a CPU, one of magnitudes is
    return jnp.isfinite(magnitudes(g.astype(jnp.float32), tile)).all()


def update_rows(update: Update, g: Array, state: Any, p: Any, mine: Any) -> tuple[Any, Any]:
    """`update_leaf` in a loop over parts of the leaf that fit into the cache of a CPU.

    For elementwise updates. Codes, scales and gradient are overwritten in place, so that the loop
    needs memory for one part only. Left to itself XLA decodes each moment three times or writes it
    out: twice the time of the loop.
    """
    structure: Any
    slots, structure = jax.tree.flatten(state, is_leaf=is_blocks)
    tile = next(q for q in slots if is_blocks(q)).tile[-1]
    shape = g.shape
    columns = shape[-1] if len(shape) > 1 else tile
    rows = g.size // columns
    ok = _rows_finite(g.reshape(rows, columns), (1, tile))

    def flat(x: Any) -> Any:
        if not is_blocks(x):
            return x
        scale = x.scale.reshape(rows, columns // tile)
        return Blocks(x.codes.reshape(rows, columns), scale, x.signed, (1, tile), x.dtype)

    held = [k for k, q in enumerate(slots) if is_blocks(q)]
    blocks = [flat(slots[k]) for k in held]
    p = p.reshape(rows, columns) if p is not None else None

    def run(g: Array, blocks: list[Blocks], p: Any) -> tuple[Array, list[Any]]:
        """The update of some rows, and the new state with moments in float32."""
        part = list(slots)
        for k, q in zip(held, blocks, strict=True):
            part[k] = decode(q)
        u, new = update(g.astype(jnp.float32), structure.unflatten(part), p)
        return u, structure.flatten_up_to(new)

    def moments(part: tuple[Array, list[Blocks]], p: Any) -> tuple[Array, list[Array]]:
        u, new = run(part[0], part[1], p)
        return u.astype(g.dtype), [new[k] for k in held]

    def unchanged(part: tuple[Array, list[Blocks]], p: Any) -> tuple[Array, list[Array]]:
        u, new = jax.eval_shape(moments, part, p)
        return jnp.zeros_like(u), [jnp.zeros_like(x) for x in new]

    def encode_rows(u: Array, new: list[Array], part: Any) -> tuple[Array, list[Blocks]]:
        return u, [encode(x, q) for x, q in zip(new, part[1], strict=True)]

    def step(start: Any, count: int, carry: tuple[Array, list[Blocks]]) -> tuple[Any, Any]:
        cut = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=count)
        part = jax.tree.map(cut, carry)
        # What crosses a branch is made once and kept. Fused with the write in place it would be
        # made again for each use, from arrays that must then be copied whole before every write.
        weights = None if p is None else cut(p)
        u, new = lax.cond(ok, moments, unchanged, part, weights)
        made = lax.cond(ok, encode_rows, lambda u, new, part: (u, part[1]), u, new, part)
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return jax.tree.map(lambda a, b: put(a, b), carry, made)

    count = max(1, min(rows, _PART // columns))
    carry = (g.reshape(rows, columns), blocks)
    first = jax.tree.map(lambda a: a[:1], carry)
    _, rest = run(first[0], first[1], None if p is None else p[:1])
    whole = rows // count
    carry = lax.fori_loop(0, whole, lambda i, c: step(i * count, count, c), carry)
    if rows % count:
        carry = step(whole * count, rows % count, carry)
    u, blocks = carry
    for k, q in zip(held, blocks, strict=True):
        old = slots[k]
        rest[k] = Blocks(
            q.codes.reshape(shape),
            q.scale.reshape(old.scale.shape),
            old.signed,
            old.tile,
            old.dtype,
        )
    return u.reshape(shape), structure.unflatten(rest)


def _by_rows(update: Update, g: Any, state: Any, p: Any) -> bool:
    """Whether to loop over parts: under jit, on one device, for updates that allow it."""
    if not isinstance(g, jax.core.Tracer) or not _one_device() or g.size < 2 * _PART:
        return False
    slots = jax.tree.leaves(state, is_leaf=is_blocks)
    blocks = [q for q in slots if is_blocks(q)]
    tile = blocks[0].tile
    rowwise = all(
        math.prod(q.tile[:-1]) == 1 and q.tile == tile and q.shape == g.shape for q in blocks
    )
    others = all(q.ndim == 0 for q in slots if not is_blocks(q))
    if not rowwise or not others or g.shape[-1] % tile[-1] or g.shape[-1] > _PART:
        return False
    closed = jax.make_jaxpr(update)(g, decoded(state), p)
    return _elementwise(closed.jaxpr)


def _elementwise(jaxpr: Any) -> bool:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in ("jit", "pjit"):
            if not _elementwise(eqn.params["jaxpr"].jaxpr):
                return False
        elif name == "broadcast_in_dim":
            if eqn.invars[0].aval.ndim:  # a scalar has the same value everywhere
                return False
        elif name not in _ELEMENTWISE:
            return False
    return True


def _one_device() -> bool:
    # A sharded array must not be sliced in a loop, and a trace does not say what is sharded.
    return jax.device_count() == 1
