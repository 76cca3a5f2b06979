"""`flatten`: a call as one straight-line program that marks the inputs of chosen parameters.

Helpers are inlined and scans over layers unrolled, so that the program can be cut before any
contraction. Other loops, for example over time, stay one equation.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxquant.interpret import _compat
from jaxquant.interpret.bodies import scan_body
from jaxquant.interpret.calls import Call
from jaxquant.interpret.evaluate import Interpreter, abstract
from jaxquant.interpret.loops import result_facts, signed, slice_facts
from jaxquant.interpret.policy import Contraction, Policy, param_first
from jaxquant.interpret.reading import Reading
from jaxquant.interpret.record import dimensions
from jaxquant.interpret.values import Facts, Value

Piece = tuple[int, ...]
_MARK = "jaxquant:"


@dataclasses.dataclass(frozen=True)
class Mark:
    """One contraction of a chosen parameter with an activation.

    Attributes:
      path: the parameter.
      piece: index of its layer; `()` if no unrolled scan slices the parameter.
      reading: how it reads the activation.
      axes: the parameter's axes (negative) that are contracted, in order.
      batched: the parameter's axes (negative) that are batch dimensions.
    """

    path: str
    piece: Piece
    reading: Reading
    axes: tuple[int, ...]
    batched: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Flat:
    """A straight-line program.

    Attributes:
      jaxpr: the open jaxpr; `mark_of` finds the marks among its equations.
      consts: its constants.
      names: for each input of the jaxpr its parameter and piece; `None` for an input of the call.
      marks: the contractions of chosen parameters, in execution order. A parameter with more than
        one mark for a piece is used more than once.
      lengths: for each parameter split into pieces, the lengths of its scans.
    """

    jaxpr: Any
    consts: list[Any]
    names: tuple[tuple[str, Piece] | None, ...]
    marks: tuple[Mark, ...]
    lengths: Mapping[str, tuple[int, ...]]


def flatten(call: Call, chosen: Collection[str]) -> Flat:
    """Traces a call as one straight-line program; nothing is computed.

    Args:
      call: the traced call, its params float.
      chosen: paths of the parameters whose contractions are marked. A scan that slices one of them
        is unrolled, and every parameter that it slices is split into pieces.
    """
    probe = Flattener(chosen, {}, probing=True)
    _trace(call, probe)
    real = Flattener(chosen, probe.lengths)
    jaxpr, consts, names = _trace(call, real)
    return Flat(jaxpr, consts, names, tuple(real.marks), dict(probe.lengths))


def mark_of(eqn: Any) -> tuple[int, int] | None:
    """The number of a mark and of the operand it marks (0: the activation), else `None`.

    >>> eqn = jax.make_jaxpr(lambda x: checkpoint_name(x, f"{_MARK}3:0"))(1.0).eqns[0]
    >>> mark_of(eqn)
    (3, 0)
    """
    name = eqn.params.get("name")
    if eqn.primitive.name != "name" or not str(name).startswith(_MARK):
        return None
    number, operand = str(name).removeprefix(_MARK).split(":")
    return int(number), int(operand)


def _trace(call: Call, policy: Flattener) -> tuple[Any, list[Any], tuple[Any, ...]]:
    names: list[tuple[str, Piece] | None] = []
    avals = []
    for leaf, path in zip(call.leaves, call.paths, strict=True):
        aval = abstract(leaf)
        lengths = policy.lengths.get(path, ()) if path is not None and not policy.probing else ()
        for piece in itertools.product(*map(range, lengths)):
            names.append(None if path is None else (path, piece))
            shape = aval.shape[len(lengths) :]
            avals.append(jax.ShapeDtypeStruct(shape, aval.dtype, sharding=aval.sharding))

    def run(*arrays: Any) -> None:
        rest = iter(arrays)
        leaves = [
            policy.whole(rest, path, policy.lengths.get(path or "", ()))
            if path is not None and not policy.probing
            else next(rest)
            for path in call.paths
        ]
        if policy.probing:
            named = zip(leaves, call.paths, strict=True)
            policy.known.update({id(leaf): (p, ()) for leaf, p in named if p is not None})
        policy.alive.append(leaves)
        call.run(Interpreter(policy, call.param_paths), leaves)

    jaxpr, consts = _compat.opened(jax.make_jaxpr(run)(*avals))
    return jaxpr, consts, tuple(names)


def _scan(
    ip: Interpreter, eqn: Any, operands: list[Value], positive: list[bool], scope: tuple[str, ...]
) -> list[Value]:
    """Unrolls a scan that slices a chosen parameter; binds any other unchanged."""
    policy: Any = ip.policy
    p, loop = eqn.params, scan_body(eqn)
    operands = signed(operands, positive)
    consts, carry, xs = loop.split(operands)
    paths = [v.facts.origin.path for v in xs if v.facts.origin is not None]
    if not any(path in policy.chosen for path in paths):
        return ip._plain(eqn, operands, positive, scope)
    # as in a loop, nothing is known of a carry
    carry = [Value(v.data, Facts(live=True)) if v.facts.live else v for v in carry]
    slices = [policy.slices(v, p["length"]) for v in xs]
    facts = [slice_facts(v.facts) for v in xs]
    steps: Sequence[int] = range(1 if policy.probing else p["length"])
    collected: list[list[Value]] = []
    outer = dict(policy.at)
    for i in reversed(steps) if p["reverse"] else steps:
        for v in xs:
            if v.facts.origin is not None and id(v.data) in policy.parts:
                path = v.facts.origin.path
                policy.at[path] = (*outer.get(path, ()), i)
        here = [Value(part[i], f) for part, f in zip(slices, facts, strict=True)]
        out = ip.run(loop.jaxpr, loop.consts, [*consts, *carry, *here], scope)
        carry = out[: loop.n_carry]
        collected.append(out[loop.n_carry :])
    policy.at = outer
    if p["reverse"]:
        collected.reverse()
    stacked = []
    for column in zip(*collected, strict=True):
        data = jnp.stack([v.data for v in column])
        if policy.probing:
            data = jnp.broadcast_to(data, (p["length"], *data.shape[1:]))
        stacked.append(Value(data, result_facts(column[0].facts)))
    return [*carry, *stacked]


def _inline(
    ip: Interpreter, eqn: Any, operands: list[Value], positive: list[bool], scope: tuple[str, ...]
) -> list[Value]:
    jaxpr, consts = _compat.body(eqn)
    return ip.run(jaxpr, consts, signed(operands, positive), scope)


def _unchanged(
    ip: Interpreter, eqn: Any, operands: list[Value], positive: list[bool], scope: tuple[str, ...]
) -> list[Value]:
    return ip._plain(eqn, operands, positive, scope)


_RULES: dict[str, Callable[..., list[Value]]] = {
    "scan": _scan,
    "remat2": _inline,
    "while": _unchanged,
    "cond": _unchanged,
    "shard_map": _unchanged,
}


class Flattener(Policy):
    """The policy that inlines, unrolls and marks.

    Attributes:
      chosen: paths of the parameters to mark.
      lengths: for each parameter split into pieces, the lengths of its scans; filled by probing.
      probing: whether this run only fills `lengths`, for which one step of each loop is enough.
      marks: the marks made so far.
      known: id of a tracer -> parameter and piece, if it is all of that piece, unmoved.
      parts: id of a stacked array -> the tracers that were stacked.
      at: path -> the piece at the current step.
      alive: tracers kept alive, so that their ids stay unique.
    """

    rules = _RULES

    def __init__(
        self,
        chosen: Collection[str],
        lengths: Mapping[str, tuple[int, ...]],
        probing: bool = False,
    ) -> None:
        self.chosen, self.probing = chosen, probing
        self.lengths: dict[str, tuple[int, ...]] = dict(lengths)
        self.marks: list[Mark] = []
        self.known: dict[int, tuple[str, Piece]] = {}
        self.parts: dict[int, list[Any]] = {}
        self.at: dict[str, Piece] = {}
        self.alive: list[Any] = []

    def whole(self, pieces: Iterator[Any], path: str, lengths: Sequence[int]) -> Any:
        """The next pieces, stacked; unused stacks are never computed."""
        if not lengths:
            return next(pieces)
        parts = [self.whole(pieces, path, lengths[1:]) for _ in range(lengths[0])]
        stack = jnp.stack(parts)
        self.parts[id(stack)] = parts
        self.alive.append(stack)
        return stack

    def contract(self, ip: Interpreter, site: Contraction) -> Any:
        """Marks the activation that meets a chosen parameter; contracts as the function did."""
        params = param_first(site.lhs, site.rhs)
        origin = params[0].facts.origin if params else None
        if origin is None or origin.joined or origin.path not in self.chosen:
            return super().contract(ip, site)
        piece = self.at.get(origin.path, ())
        weight, (x, side) = params[0], (site.rhs, "rhs")
        if weight is site.rhs:
            x, side = site.lhs, "lhs"
        summed, batched = dimensions(site.eqn, "rhs" if side == "lhs" else "lhs")
        rank = len(origin.shape)
        dims = [[p - rank for a in axes for p in origin.axes[a]] for axes in (summed, batched)]
        if len(piece) != len(origin.scanned) or not x.facts.live:
            return super().contract(ip, site)
        number, shape = len(self.marks), tuple(jnp.shape(weight.data))
        self.marks.append(
            Mark(
                origin.path,
                piece,
                Reading(site.eqn.primitive.name, site.eqn.params, side, shape),
                tuple(dims[0]),
                tuple(dims[1]),
            )
        )
        marked = checkpoint_name(x.data, f"{_MARK}{number}:0")
        rest = [checkpoint_name(v.data, f"{_MARK}{number}:{n}") for n, v in enumerate(site.rest, 1)]
        data = [marked, weight.data] if side == "lhs" else [weight.data, marked]
        return _compat.bind(site.eqn, [*data, *rest])[0]

    def jit_key(self, ip: Interpreter, facts: list[Facts], scope: tuple[str, ...]) -> None:
        """Helpers are inlined."""

    def enters_rules(self, ip: Interpreter, jaxpr: Any, operands: list[Value]) -> bool:
        """Custom rules are inlined: nothing is differentiated."""
        return True

    def slices(self, value: Value, length: int) -> list[Any]:
        """The slices of a scanned value, one per step."""
        parts = self.parts.get(id(value.data))
        if parts is not None:
            return parts
        count = 1 if self.probing else length
        slices = [jax.tree.map(lambda a, i=i: a[i], value.data) for i in range(count)]
        path, piece = self.known.get(id(value.data), ("", ()))
        if self.probing and path:
            self.lengths[path] = (*self.lengths.get(path, ())[: len(piece)], length)
            self.known.update({id(part): (path, (*piece, 0)) for part in slices})
        self.alive.append(slices)
        return slices
