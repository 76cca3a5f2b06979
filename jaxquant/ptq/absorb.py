"""Placement of a rewrite's factors: in the producers of an activation, or on the activation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxquant.interpret.calls import Call
from jaxquant.interpret.sites import Site
from jaxquant.params import Encoded, Plan
from jaxquant.qtensor import Calibration, QTensor
from jaxquant.report import shown
from jaxquant.rewrites import Absorbed, absorbers, graph_of, scaled_leaf


@dataclasses.dataclass(frozen=True)
class Move:
    """Possible placements of per-channel factors of one activation.

    Attributes:
      paths: all parameters that it feeds and that a rewrite changes.
      online: whether factors may stay on the activation.
      absorbed: the producers that can absorb them, if any.
      reason: why none can.
    """

    paths: tuple[str, ...]
    online: bool
    absorbed: Absorbed | None
    reason: str

    @property
    def folds(self) -> bool:
        """Whether factors are folded; tied channels only if factors may not stay online."""
        return self.absorbed is not None and (self.absorbed.tied is None or not self.online)

    @property
    def allowed(self) -> bool:
        """Whether factors can be placed at all."""
        return self.online or self.folds


def moves_of(
    call: Call, groups: Iterable[Sequence[str]], plans: Mapping[str, Plan]
) -> dict[str, Move]:
    """Finds where the factors of each parameter with a rewrite can go.

    Args:
      call: the traced call.
      groups: for each activation, the paths of the parameters it feeds.
      plans: their plans, by path.
    """
    graph = None
    moves: dict[str, Move] = {}
    for group in groups:
        rewrites = dict.fromkeys(plans[path].rewrite for path in group)
        for rewrite in rewrites:
            same = dict.fromkeys(p for p in group if plans[p].rewrite == rewrite)
            paths = tuple(p for p in same if not stuck(plans[p]))
            if rewrite is None or not paths or paths[0] in moves:
                continue
            graph = graph_of(call) if graph is None else graph
            absorbed = absorbers(graph, paths)
            if isinstance(absorbed, str):
                move = Move(paths, rewrite.online, None, absorbed)
            else:
                tied = "" if absorbed.tied is None else "one value feeds several of its channels"
                move = Move(paths, rewrite.online, absorbed, tied)
            moves |= dict.fromkeys(paths, move)
    return moves


def stuck(plan: Plan) -> str:
    """Why no factors can move between a parameter and its activation; empty if they can."""
    uses = [site for site in plan.sites if site.primitive != "gather"]
    return immovable(uses[0], len(uses)) if uses else "no contraction uses it"


def immovable(site: Site, uses: int) -> str:
    """`stuck` for a parameter with `uses` contractions, of which `site` is the first."""
    if uses != 1:
        return "it is used at several sites"
    if site.primitive != "dot_general":
        return f"scale cannot move across {site.primitive}"
    if site.batched:
        return "it is contracted with several activations, one for each index of a batch axis"
    return ""


def folded(
    encoded: Mapping[str, Encoded], leaves: Mapping[str, Any], moves: Mapping[str, Move]
) -> tuple[dict[str, Encoded], dict[str, Any], dict[str, list[str]]]:
    """Folds divisors into the producers of the activations where possible.

    Returns:
      All encoded leaves; the float leaves that changed; and notes on the latter.
    """
    absorbed: dict[str, list[str]] = {}
    out: dict[str, Encoded] = dict(encoded)
    changed: dict[str, Any] = {}
    for move in dict.fromkeys(moves.values()):
        first = out.get(move.paths[0])
        divisor = None if first is None else _divisor(first.q)
        if divisor is None:
            continue
        if np.all(np.asarray(divisor) == 1.0):
            for path in move.paths:
                q, notes = _undivided(out[path].q), (*out[path].notes, "factors of 1 are best")
                out[path] = out[path]._replace(q=q, notes=notes)
            continue
        notes = (f"factors stay on the activation: {move.reason}",)
        if move.folds and move.absorbed is not None:
            c = divisor.reshape(*move.absorbed.layers, move.absorbed.channels)
            now = {p: out[p].q if p in out else changed.get(p, leaves[p]) for p in _names(move)}
            try:
                for absorber in move.absorbed.producers:
                    now[absorber.path] = scaled_leaf(now[absorber.path], absorber, c)
            except ValueError as error:
                notes = (f"factors stay on the activation: {error}",)
            else:
                note = f"absorbed the factors of {', '.join(map(shown, move.paths))}"
                for path, leaf in now.items():
                    absorbed.setdefault(path, []).append(note)
                    if path in out:
                        out[path] = out[path]._replace(q=leaf, notes=(*out[path].notes, note))
                    else:
                        changed[path] = leaf
                for path in move.paths:
                    out[path] = out[path]._replace(q=_undivided(out[path].q))
                into = ", ".join(map(shown, _names(move)))
                notes = (f"factors folded into {into}",)
        for path in move.paths:
            out[path] = out[path]._replace(notes=out[path].notes + notes)
    return out, changed, {path: absorbed[path] for path in changed}


def _names(move: Move) -> list[str]:
    assert move.absorbed is not None
    return [absorber.path for absorber in move.absorbed.producers]


def _divisor(q: QTensor) -> Any:
    return None if q.calibration is None else q.calibration.divisor


def _undivided(q: QTensor) -> QTensor:
    assert q.calibration is not None
    calibration = dataclasses.replace(q.calibration, divisor=None, axis=())
    return dataclasses.replace(q, calibration=None if calibration == Calibration() else calibration)
