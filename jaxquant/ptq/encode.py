"""Rewrites and encodes the leaves that one activation feeds, by its statistics."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from jaxquant.encoders import Encoder, matrix_spec, measure, rtn, to_matrix
from jaxquant.observers import InputStats, input_stats
from jaxquant.params import Encoded, Plan, derive, encode_leaf
from jaxquant.ptq.absorb import Move
from jaxquant.qtensor import Calibration, QTensor, along
from jaxquant.recipe import Rewrite
from jaxquant.report import Found, shown

_SHOWN = ("ratio", "alpha")  # of a rewrite's details


@dataclasses.dataclass(frozen=True)
class Member:
    """One leaf, or a piece of one, that an activation feeds.

    Attributes:
      plan: how it is encoded; its `batch_axes` count those of `w`.
      w: the array.
      axes: its contracted axes (negative), in the order of the statistics' columns.
      batched: its axes (negative) with separate statistics for each index.
      immovable: why no scale can move between it and its activation; empty if it can.
      move: where factors of its rule's rewrite can go.
    """

    plan: Plan
    w: Any
    axes: tuple[int, ...]
    batched: tuple[int, ...]
    immovable: str = ""
    move: Move | None = None


def encode_members(members: Sequence[Member], state: Any, key: Array | None) -> list[Encoded]:
    """Encodes the leaves that one activation feeds.

    Args:
      members: the leaves; those whose rules have the same rewrite share its factors.
      state: of the observer `inputs`, stacked over the members' batch axes.
      key: see `encode_leaf`.

    Returns:
      One result per leaf; its calibration has the factors as divisor.

    Raises:
      ValueError: naming the leaf: statistics are missing or not finite, or an encoder raises.
    """
    try:
        stats = [input_stats(state, m.axes, m.batched) for m in members]
    except ValueError as error:
        raise ValueError(f"{shown(members[0].plan.path)}: {error}") from None
    factors: dict[int, Array] = {}
    notes: dict[int, tuple[str | Found, ...]] = {}
    for rewrite in dict.fromkeys(m.plan.rewrite for m in members if m.plan.rewrite is not None):
        indices = [n for n, m in enumerate(members) if m.plan.rewrite == rewrite]
        rewritable = [n for n in indices if not _refused(members[n])]
        reasons = {n: _refused(members[n]) for n in indices}
        if not np.any(np.asarray(stats[indices[0]].rows) > 0):
            rewritable, reasons = [], dict.fromkeys(indices, "its inputs were always zero")
        for n in set(indices) - set(rewritable):
            notes[n] = (f"not rewritten: {reasons[n]}",)
        if not rewritable:
            continue
        weights, specs = zip(*(_viewed(members[n]) for n in rewritable), strict=True)
        move, seen = members[rewritable[0]].move, stats[rewritable[0]]
        absorbed = move.absorbed if move is not None and move.folds else None
        seen = seen if absorbed is None else absorbed.tie_stats(seen)
        try:
            c, details = rewrite(weights, specs, seen)
        except ValueError as error:
            paths = ", ".join(shown(members[n].plan.path) for n in rewritable)
            raise ValueError(f"{paths}: {error}") from error
        c = c if absorbed is None else absorbed.tie(c)
        for n in rewritable:
            factors[n], notes[n] = c, _told(rewrite, details)
    return [
        _encoded(m, s, factors.get(n), notes.get(n, ()), key)
        for n, (m, s) in enumerate(zip(members, stats, strict=True))
    ]


def _refused(member: Member) -> str:
    """Why a rewrite does not apply to a leaf; empty if it does."""
    if member.immovable:
        return member.immovable
    if member.plan.encoder is not None and member.plan.encoder.learns_values:
        return f"{member.plan.encoder} learns its values later, and factors depend on them"
    if member.move is not None and not member.move.allowed:
        return member.move.reason
    return ""


def _viewed(member: Member) -> tuple[Array, Any]:
    """Views a leaf as matrices `[*batch, K, N]` as its contraction does; adds their spec."""
    assert member.plan.spec is not None
    matrices = _matrices(member.w, member.axes, member.batched, member.plan.batch_axes)
    return matrices, matrix_spec(member.plan.spec)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _matrices(w: Array, axes: tuple[int, ...], batched: tuple[int, ...], lead: int) -> Array:
    view = functools.partial(to_matrix, axes=axes, batched=batched)
    for _ in range(lead):
        view = jax.vmap(view)
    return view(w)


def _encoded(
    member: Member,
    stats: InputStats,
    c: Array | None,
    notes: tuple[str | Found, ...],
    key: Array | None,
) -> Encoded:
    w, divisor = member.w, None
    encoder = member.plan.encoder or rtn()
    if c is not None:
        lead = member.plan.batch_axes
        divisor = c.reshape(*c.shape[:lead], *(w.shape[a] for a in member.axes))
        w = _times(w, divisor, member.axes)
        stats = _rescaled(stats, c)
    seen = None if encoder.observer is None else stats
    encoded = encode_leaf(w, member.plan, encoder, key, seen)
    q = encoded.q
    if divisor is not None:
        calibration = q.calibration or Calibration()
        calibration = dataclasses.replace(calibration, divisor=divisor, axis=member.axes)
        q = dataclasses.replace(q, calibration=calibration)
    return encoded._replace(q=q, notes=(*notes, *_few(stats, encoder), *encoded.notes))


@jax.jit
def _rescaled(stats: InputStats, c: Array) -> InputStats:
    """The statistics of `x / c`."""
    h = stats.hessian
    return dataclasses.replace(
        stats,
        absmax=stats.absmax / c,
        absmean=stats.absmean / c,
        hessian=None if h is None else h / (c[..., :, None] * c[..., None, :]),
    )


@functools.partial(jax.jit, static_argnums=2)
def _times(w: Any, divisor: Array, axes: tuple[int, ...]) -> Array:
    return (w.astype(jnp.float32) * along(divisor, axes, w.ndim)).astype(w.dtype)


def _told(rewrite: Rewrite, details: Any) -> tuple[Found, ...]:
    """Notes on the numbers that a rewrite chose."""
    found = ((k, np.asarray(details[k], np.float64)) for k in _SHOWN if k in details)
    return tuple(Found(rewrite.name, k, float(v.min()), float(v.max())) for k, v in found)


def _few(stats: InputStats, encoder: Encoder) -> tuple[Found, ...]:
    """Notes fewer rows than columns, for an encoder that inverts their second moments."""
    observer = encoder.observer
    rows, k = np.asarray(stats.rows, np.float64), stats.absmax.shape[-1]
    if observer is None or not observer.hessian or not rows.size or rows.min() >= k:
        return ()
    found = Found(f"fewer calibration rows than its {k} columns", "rows", rows.min(), rows.max())
    return (found,)


def placed(one: Encoded, w: Any) -> Encoded:
    """Shards a stored result like the array `w` that it encodes."""
    if not isinstance(getattr(w, "sharding", None), NamedSharding):
        return one
    return one._replace(q=jax.device_put(one.q, derive(w.sharding, w.shape, one.q)))


def stacked(pieces: Sequence[Encoded], lengths: tuple[int, ...], leaf: Any) -> Encoded:
    """Stacks the pieces of one leaf, in order, along leading axes `lengths`."""

    def together(*arrays: Any) -> Array:
        joined = jnp.stack(arrays)
        return joined.reshape(*lengths, *joined.shape[1:])

    q: QTensor = jax.tree.map(together, *(p.q for p in pieces))
    # each layer's error has another unit: measure the whole leaf again
    info = measure(jnp.asarray(leaf), q)
    return Encoded(q, info, _merged(n for p in pieces for n in p.notes))


def _merged(notes: Iterable[str | Found]) -> tuple[str | Found, ...]:
    """Removes duplicate notes and merges numbers into their range."""
    out: dict[Any, str | Found] = {}
    for note in notes:
        kind = note if isinstance(note, str) else (note.what, note.name)
        previous = out.get(kind)
        if isinstance(note, Found) and isinstance(previous, Found):
            low, high = min(previous.low, note.low), max(previous.high, note.high)
            note = note._replace(low=low, high=high)
        out[kind] = note
    return tuple(out.values())
