"""True-sequential calibration: each layer is quantized with the inputs that really arrive there.

The function becomes one straight program, cut in front of every activation that a chosen parameter
is contracted with. Each segment runs on all batches, the parameters it has led to are quantized by
what arrived, and the next segment computes with what they stand for now. Activations stay float.
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
    """A function cut in segments.

    Attributes:
      flat: the straight program.
      groups: the activations in front of which it is cut.
      paths: the parameters that are walked.
    """

    flat: Flat
    groups: tuple[Group, ...]
    paths: frozenset[str]


def walk_of(
    call: Call, leaves: Mapping[str, Any], plans: Mapping[str, Plan], needs: Mapping[str, Inputs]
) -> Walk:
    """Cuts a call, and finds which of the parameters in `needs` can be walked.

    Those that one site uses, once in each layer: not what several sites use, what stands at several
    paths, or what is inside loops other than scans over layers.
    """
    same = Counter(identity(path, leaf) for path, leaf in leaves.items())
    chosen = frozenset(
        path
        for path in needs
        if len(plans[path].sites) == 1 and same[identity(path, leaves[path])] == 1
    )
    while True:
        flat = flatten(call, chosen)
        found = Counter((mark.path, mark.piece) for mark in flat.marks)
        once = frozenset(path for path in chosen if _walked(path, flat, found, plans[path]))
        if once == chosen:
            return Walk(flat, groups_of(flat), chosen)
        chosen = once


def _walked(path: str, flat: Flat, found: Mapping[Any, int], plan: Plan) -> bool:
    lengths = flat.lengths.get(path, ())
    pieces = itertools.product(*map(range, lengths))
    return len(lengths) == plan.batch_axes and all(found.get((path, p)) == 1 for p in pieces)


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
      plans: how they are encoded.
      needs: the observer for each.
      moves: where factors can go, by path.
      batches: for each sample the leaves of its arguments.
      encoded: parameters that are encoded already.
      key: see `encode_leaf`.
      budget: bytes of statistics held at once.
      offload: keep activations in the host's memory between segments.
      progress: whether to show a bar; `None` on a terminal, after some seconds.
      folder: where results are kept, and found again.

    Raises:
      ValueError: naming the parameter: see `encode_members`; the budget is too small for one.
    """
    flat = walk.flat
    watching = [inputs(any(needs[m.path].hessian for m in _marks(flat, g))) for g in walk.groups]
    _check_budget(walk, watching, budget)
    segments = segments_of(flat, walk.groups)
    runner = _Runner(flat, leaves, encoded, batches, offload)
    pieces: dict[str, dict[Piece, Encoded]] = {path: {} for path in walk.paths}
    bar = Progress(progress, len(segments), "quantize")
    try:
        for number, (segment, observer) in enumerate(zip(segments, watching, strict=True)):
            marks = _marks(flat, segment.group)
            bar.say(_title(marks))
            runner.advance(segment)
            step = f"step_{number:05d}"
            kept, names = folder.read(step), [f"{m.path} {m.piece}" for m in marks]
            members = [_member(m, leaves, plans, moves) for m in marks]
            if kept is None:
                state = runner.observed(segment, observer)
                done = encode_members(members, state, key)
                folder.write(step, dict(zip(names, done, strict=True)))
            else:
                done = [placed(kept[name], m.w) for name, m in zip(names, members, strict=True)]
            for mark, one in zip(marks, done, strict=True):
                pieces[mark.path][mark.piece] = one
                runner.took(mark.path, mark.piece, one)
            runner.drop(segment)
            bar.step()
    finally:
        bar.close()
    return {path: _whole(flat, path, found, leaves[path]) for path, found in pieces.items()}


def fed_alike(walk: Walk) -> list[list[str]]:
    """Paths of the parameters that each activation feeds."""
    return [[mark.path for mark in _marks(walk.flat, group)] for group in walk.groups]


def _whole(flat: Flat, path: str, found: Mapping[Piece, Encoded], leaf: Any) -> Encoded:
    lengths = flat.lengths.get(path, ())
    if not lengths:
        return found[()]
    return stacked([found[p] for p in itertools.product(*map(range, lengths))], lengths, leaf)


def _marks(flat: Flat, group: Group) -> list[Any]:
    return [flat.marks[n] for n in group.marks]


def _title(marks: Sequence[Any]) -> str:
    first = marks[0]
    layer = "" if not first.piece else f" [{', '.join(map(str, first.piece))}]"
    return f"{shown(first.path)}{layer}" + (f" and {len(marks) - 1} more" if marks[1:] else "")


def walked_misfits(walk: Walk, leaves: Mapping[str, Any]) -> dict[str, str]:
    """Why rows would not be those of a leaf, by path, known from shapes alone."""
    found: dict[str, str] = {}
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
                found[mark.path] = why
    return found


def _check_budget(walk: Walk, watching: Sequence[Inputs], budget: int) -> None:
    sizes: dict[str, int] = {}
    for group, observer in zip(walk.groups, watching, strict=True):
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
    """An array in the host's memory; keys, which are small, stay where they are."""
    return x if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)


class _Runner:
    """The values that segments hand on, batch by batch."""

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
        given = [v for v in flat.jaxpr.invars if self.names[v] is None]
        self.kept: list[dict[Any, Any]] = [
            dict(zip(given, batch, strict=True)) for batch in batches
        ]
        self.consts = dict(zip(flat.jaxpr.constvars, flat.consts, strict=True))
        self.compiled: dict[Any, Callable[..., list[Any]]] = {}
        self.updates: dict[Any, Callable[..., Any]] = {}

    def took(self, path: str, piece: Piece, one: Encoded) -> None:
        """A parameter is what it is quantized to from now on."""
        self.encoded[path, piece] = one

    def advance(self, segment: Segment) -> None:
        """Runs a segment on every batch."""
        run = self.compiled.setdefault(segment.key, jax.jit(segment.run))
        fixed = {v: self._fixed(v) for v in segment.inputs if not self._varies(v)}
        for kept in self.kept:
            values = [fixed[v] if v in fixed else jnp.asarray(kept[v]) for v in segment.inputs]
            found = zip(segment.outputs, run(values), strict=True)
            kept.update((v, _on_host(x) if self.offload else x) for v, x in found)

    def drop(self, segment: Segment) -> None:
        """Lets go of what nothing after a segment needs."""
        for kept in self.kept:
            for v in segment.dropped:
                kept.pop(v, None)

    def observed(self, segment: Segment, observer: Inputs) -> Any:
        """The statistics of the activation that a segment ends at, over all batches."""
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
        """A constant, or a parameter as it is by now."""
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
