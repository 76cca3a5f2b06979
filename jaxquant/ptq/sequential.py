"""True-sequential calibration: quantizes each layer with the inputs from quantized earlier layers.

The function is flattened to a straight-line program and cut in front of every activation that a
chosen parameter is contracted with. Each segment runs on all batches, the parameters at its end are
quantized with that activation, and the next segment computes with their dequantized values.
Activations stay float.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxquant.capture.progress import Progress
from jaxquant.interpret.calls import Call
from jaxquant.interpret.flatten import Flat, Piece, flatten
from jaxquant.interpret.segments import Group, Segment, groups_of, segments_of
from jaxquant.observers import Inputs, InputStats, inputs
from jaxquant.params import Encoded, Plan, identity
from jaxquant.ptq.absorb import Move, stuck
from jaxquant.ptq.encode import Member, encode_members, placed, stacked
from jaxquant.ptq.gather import misfit, require_budget, tree_bytes
from jaxquant.ptq.saved import Folder
from jaxquant.qtensor import dequantize, is_qtensor
from jaxquant.report import shown


@dataclasses.dataclass(frozen=True)
class Walk:
    """A function cut into segments.

    Attributes:
      flat: the straight-line program.
      groups: the activations in front of which it is cut.
      paths: the parameters that are quantized in order.
    """

    flat: Flat
    groups: tuple[Group, ...]
    paths: frozenset[str]


def walk_of(
    call: Call, leaves: Mapping[str, Any], plans: Mapping[str, Plan], needs: Mapping[str, Inputs]
) -> Walk:
    """Cuts a call, and finds which parameters in `needs` can be quantized in order.

    A parameter can if exactly one site uses it, once in each layer, it has one path, and it is in
    no loop other than scans over layers.
    """
    uses = Counter(identity(path, leaf) for path, leaf in leaves.items())
    chosen = frozenset(
        path
        for path in needs
        if len(plans[path].sites) == 1 and uses[identity(path, leaves[path])] == 1
    )
    while True:
        flat = flatten(call, chosen)
        counts = Counter((mark.path, mark.piece) for mark in flat.marks)
        walked = frozenset(path for path in chosen if _walked(path, flat, counts, plans[path]))
        if walked == chosen:
            return Walk(flat, groups_of(flat), chosen)
        chosen = walked


def _walked(path: str, flat: Flat, counts: Mapping[Any, int], plan: Plan) -> bool:
    lengths = flat.lengths.get(path, ())
    pieces = itertools.product(*map(range, lengths))
    return len(lengths) == plan.batch_axes and all(counts.get((path, p)) == 1 for p in pieces)


def quantize_in_order(
    walk: Walk,
    leaves: Mapping[str, Any],
    plans: Mapping[str, Plan],
    needs: Mapping[str, Inputs],
    moves: Mapping[str, Move],
    batches: Sequence[Sequence[Any]],
    encoded: Mapping[str, Encoded],
    *,
    key: Array | None,
    budget: int,
    offload: bool,
    progress: bool | None,
    folder: Folder,
) -> dict[str, Encoded]:
    """Quantizes the parameters of a walk, one activation after the other.

    Args:
      walk: of the call.
      leaves: the float params by path.
      plans: how they are encoded, by path.
      needs: the observer of each parameter, by path.
      moves: where factors can go, by path.
      batches: for each sample the leaves of its arguments.
      encoded: parameters that are encoded already.
      key: see `encode_leaf`.
      budget: bytes of statistics in memory at once.
      offload: keep activations in host memory between segments.
      progress: whether to show a bar; `None` on a terminal, after some seconds.
      folder: stores results and returns those of an interrupted run.

    Raises:
      ValueError: naming the parameter: see `encode_members`; the budget is too small for it.
    """
    flat = walk.flat
    observers = [inputs(any(needs[m.path].hessian for m in _marks(flat, g))) for g in walk.groups]
    _check_budget(walk, observers, budget)
    segments = segments_of(flat, walk.groups)
    runner = _Runner(flat, leaves, encoded, batches, offload)
    pieces: dict[str, dict[Piece, Encoded]] = {path: {} for path in walk.paths}
    bar = Progress(progress, len(segments), "quantize")
    try:
        for number, (segment, observer) in enumerate(zip(segments, observers, strict=True)):
            marks = _marks(flat, segment.group)
            bar.say(_title(marks))
            runner.advance(segment)
            step = f"step_{number:05d}"
            stored, names = folder.read(step), [f"{m.path} {m.piece}" for m in marks]
            members = [_member(m, leaves, plans, moves) for m in marks]
            if stored is None:
                state = runner.observed(segment, observer)
                done = encode_members(members, state, key)
                folder.write(step, dict(zip(names, done, strict=True)))
            else:
                done = [placed(stored[name], m.w) for name, m in zip(names, members, strict=True)]
            for mark, one in zip(marks, done, strict=True):
                pieces[mark.path][mark.piece] = one
                runner.took(mark.path, mark.piece, one)
            runner.drop(segment)
            bar.step()
    finally:
        bar.close()
    return {path: _whole(flat, path, layers, leaves[path]) for path, layers in pieces.items()}


def fed_alike(walk: Walk) -> list[list[str]]:
    """Returns for each activation the paths of the parameters it feeds."""
    return [[mark.path for mark in _marks(walk.flat, group)] for group in walk.groups]


def _whole(flat: Flat, path: str, pieces: Mapping[Piece, Encoded], leaf: Any) -> Encoded:
    lengths = flat.lengths.get(path, ())
    if not lengths:
        return pieces[()]
    return stacked([pieces[p] for p in itertools.product(*map(range, lengths))], lengths, leaf)


def _marks(flat: Flat, group: Group) -> list[Any]:
    return [flat.marks[n] for n in group.marks]


def _title(marks: Sequence[Any]) -> str:
    first = marks[0]
    layer = "" if not first.piece else f" [{', '.join(map(str, first.piece))}]"
    return f"{shown(first.path)}{layer}" + (f" and {len(marks) - 1} more" if marks[1:] else "")


def walked_misfits(walk: Walk, leaves: Mapping[str, Any]) -> dict[str, str]:
    """Why rows of activations would not fit a leaf, by path, from shapes alone."""
    reasons: dict[str, str] = {}
    for group in walk.groups:
        x, *rest = (jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in group.seen)
        for mark in _marks(walk.flat, group):
            shape = leaves[mark.path].shape
            lead = tuple(shape[a] for a in mark.batched)
            k = math.prod(shape[a] for a in mark.axes)
            none: Any = None
            absmax: Any = jax.ShapeDtypeStruct((*lead, k), jnp.float32)
            stats = InputStats(none, absmax, none, none, mark.axes, mark.batched)
            why = misfit(functools.partial(mark.reading.aval, x, rest), stats, 0)
            if why:
                reasons[mark.path] = why
    return reasons


def _check_budget(walk: Walk, observers: Sequence[Inputs], budget: int) -> None:
    sizes: dict[str, int] = {}
    for group, observer in zip(walk.groups, observers, strict=True):
        mark = walk.flat.marks[group.marks[0]]
        avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in group.seen]
        state = jax.eval_shape(observer.init, mark.reading.aval(avals[0], avals[1:]))
        sizes[mark.path] = max(tree_bytes(state), sizes.get(mark.path, 0))
    require_budget(sizes, budget)


def _member(
    mark: Any, leaves: Mapping[str, Any], plans: Mapping[str, Plan], moves: Mapping[str, Move]
) -> Member:
    plan = plans[mark.path]
    here = dataclasses.replace(plan, batch_axes=plan.batch_axes - len(mark.piece))
    reason = stuck(plan)
    w = piece_of(leaves[mark.path], mark.piece)
    return Member(here, w, mark.axes, mark.batched, reason, moves.get(mark.path))


def piece_of(leaf: Any, piece: Piece) -> Any:
    """One layer of a stacked leaf."""
    if is_qtensor(leaf) and len(leaf.batch) < len(piece):
        leaf = dequantize(leaf)  # its layers share scales
    return jax.tree.map(lambda a: a[piece], leaf) if piece else leaf


def _on_host(x: Any) -> Any:
    """Copies an array to host memory; PRNG keys, which are small, stay on the device."""
    return x if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)


class _Runner:
    """Runs segments and keeps the values that pass between them, per batch."""

    def __init__(
        self,
        flat: Flat,
        leaves: Mapping[str, Any],
        encoded: Mapping[str, Encoded],
        batches: Sequence[Sequence[Any]],
        offload: bool,
    ) -> None:
        self.flat, self.leaves, self.offload = flat, leaves, offload
        self.encoded: dict[Any, Encoded] = dict(encoded)
        self.names = dict(zip(flat.jaxpr.invars, flat.names, strict=True))
        arguments = [v for v in flat.jaxpr.invars if self.names[v] is None]
        self.kept: list[dict[Any, Any]] = [
            dict(zip(arguments, batch, strict=True)) for batch in batches
        ]
        self.consts = dict(zip(flat.jaxpr.constvars, flat.consts, strict=True))
        self.compiled: dict[Any, Callable[..., list[Any]]] = {}
        self.updates: dict[Any, Callable[..., Any]] = {}

    def took(self, path: str, piece: Piece, one: Encoded) -> None:
        """Replaces a parameter by its quantized value in the segments that follow."""
        self.encoded[path, piece] = one

    def advance(self, segment: Segment) -> None:
        """Runs a segment on every batch."""
        run = self.compiled.setdefault(segment.key, jax.jit(segment.run))
        fixed = {v: self._fixed(v) for v in segment.inputs if not self._varies(v)}
        for kept in self.kept:
            values = [fixed[v] if v in fixed else jnp.asarray(kept[v]) for v in segment.inputs]
            outputs = zip(segment.outputs, run(values), strict=True)
            kept.update((v, _on_host(x) if self.offload else x) for v, x in outputs)

    def drop(self, segment: Segment) -> None:
        """Drops the values that no later segment needs."""
        for kept in self.kept:
            for v in segment.dropped:
                kept.pop(v, None)

    def observed(self, segment: Segment, observer: Inputs) -> Any:
        """Returns statistics of the activation at the end of a segment, over all batches."""
        reading = self.flat.marks[segment.group.marks[0]].reading
        kind = (observer, reading.key, tuple(str(v.aval) for v in segment.group.seen))

        def update(state: Any, x: Any, rest: Any) -> Any:
            return observer.update(state, reading.rows(x, rest))

        step = self.updates.setdefault(kind, jax.jit(update, donate_argnums=0))
        seen = segment.outputs[: len(segment.group.seen)]
        state: Any = None
        for kept in self.kept:
            x, *rest = (jnp.asarray(kept[v]) for v in seen)
            if state is None:
                aval = reading.aval(x, rest)
                state = jax.tree.map(lambda a: jnp.array(a, copy=True), observer.init(aval))
            state = step(state, x, rest)
        return state

    def _varies(self, var: Any) -> bool:
        return var not in self.consts and self.names.get(var) is None

    def _fixed(self, var: Any) -> Any:
        """Returns a constant, or the current value of a parameter."""
        if var in self.consts:
            return self.consts[var]
        path, piece = self.names[var]
        if (path, piece) in self.encoded:
            return dequantize(self.encoded[path, piece].q)
        if path in self.encoded:
            return _float(piece_of(self.encoded[path].q, piece))
        return _float(piece_of(self.leaves[path], piece))


def _float(leaf: Any) -> Any:
    return dequantize(leaf) if is_qtensor(leaf) else leaf
