"""Rules for `scan` and `while` with quantized operands and per-site values (`slots`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.interpret import _compat, reshapes
from jaxquant.interpret.bodies import scan_body, while_body
from jaxquant.interpret.slots import Frame
from jaxquant.interpret.values import Facts, Value
from jaxquant.qtensor import is_fake_quant, is_qtensor

if TYPE_CHECKING:
    from jaxquant.interpret.evaluate import Interpreter

Scope = tuple[str, ...]


def with_facts(data: Sequence[Any], facts: Sequence[Facts]) -> list[Value]:
    """Pairs data with facts."""
    return [Value(d, f) for d, f in zip(data, facts, strict=True)]


def signed(operands: list[Value], positive: list[bool]) -> list[Value]:
    """Operands with their `nonneg` facts set."""
    return [
        Value(v.data, dataclasses.replace(v.facts, nonneg=p))
        for v, p in zip(operands, positive, strict=True)
    ]


def scan(
    ip: Interpreter, eqn: Any, operands: list[Value], positive: list[bool], scope: Scope
) -> list[Value]:
    """`QTensor`s enter as constants, scanned inputs and unchanged carries."""
    p, loop = eqn.params, scan_body(eqn)
    consts, init, xs = loop.split(signed(operands, positive))
    xs = [_as_scanned(ip, eqn, v, scope) for v in xs]
    n_carry, kept = loop.n_carry, loop.kept
    init = [v if k else _carried(ip, eqn, v, scope) for v, k in zip(init, kept, strict=True)]
    x_facts = [slice_facts(v.facts) for v in xs]
    out_facts: list[Facts] = []
    at = len(ip.call_path) - 1
    parts = [o for v in xs if v.facts.origin is not None for o in v.facts.origin.parts]
    frame = Frame(at, length=p["length"], params=frozenset(o.path for o in parts))
    inside = ip.slots.inside(ip.call_path)
    stacked = [s for s in inside if at in s.stacked]
    carried = [s for s in inside if at not in s.stacked and ip.slots.updated]

    def body(carry: Any, x: Any) -> tuple[Any, Any]:
        (moving, values), (slices, stacked_values) = carry, x
        rest = iter(moving)
        state = [v if k else Value(next(rest), v.facts) for v, k in zip(init, kept, strict=True)]
        args = [*consts, *state, *with_facts(slices, x_facts)]
        out, new_values = ip.slots.within(
            [*carried, *stacked],
            [*values, *stacked_values],
            lambda: ip.run(loop.jaxpr, loop.consts, args, scope),
            frame,
        )
        out_facts[:] = [v.facts for v in out]
        new = [ip.dense(v, eqn, scope) for v, k in zip(out[:n_carry], kept, strict=True) if not k]
        out = [ip.in_float(v, scope, "scan", "scan takes floats") for v in out]
        n = len(carried)
        return (new, new_values[:n]), ([v.data for v in out[n_carry:]], new_values[n:])

    start = [v.data for v, k in zip(init, kept, strict=True) if not k]
    (last, new_values), (ys, new_stacked) = lax.scan(
        body,
        (start, ip.slots.read(carried)),
        ([v.data for v in xs], ip.slots.read(stacked)),
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    ip.slots.leave([*carried, *stacked], [*new_values, *new_stacked])
    rest = iter(last)
    finals = [
        v if k else Value(next(rest), result_facts(f))
        for v, k, f in zip(init, kept, out_facts, strict=False)
    ]
    return [*finals, *with_facts(ys, [result_facts(f) for f in out_facts[n_carry:]])]


def _carried(ip: Interpreter, eqn: Any, value: Value, scope: Scope) -> Value:
    if value.facts.origin is not None:
        ip.policy.meets(eqn, value)
    if is_qtensor(value.data):
        value = Value(ip.dense(value, eqn, scope), value.facts)
    return Value(value.data, dataclasses.replace(value.facts, origin=None, live=True, nonneg=False))


def result_facts(facts: Facts) -> Facts:
    """Facts of a loop's result."""
    return dataclasses.replace(facts, origin=None, over=None)


def _as_scanned(ip: Interpreter, eqn: Any, value: Value, scope: Scope) -> Value:
    """The value with a leading axis that `scan` can slice: for a `QTensor`, a batch axis."""
    if not is_qtensor(value.data) or value.data.batch:
        return value
    batched = reshapes.demote(value.data)
    if batched is not None and is_fake_quant(batched):
        length = value.data.core[0]  # all steps share the learned values
        learned = jax.tree.map(lambda a: jnp.broadcast_to(a, (length, *a.shape)), batched.learned)
        batched = dataclasses.replace(batched, learned=learned)
    return Value(ip.dense(value, eqn, scope) if batched is None else batched, value.facts)


def slice_facts(facts: Facts) -> Facts:
    """Facts of one slice of a scanned value."""
    if facts.over is not None:
        facts = dataclasses.replace(facts, over=frozenset(a - 1 for a in facts.over if a))
    origin = facts.origin
    if origin is None:
        return facts
    lead = tuple(a for a in origin.axes[0] if a not in origin.scanned)
    inner = dataclasses.replace(origin, axes=origin.axes[1:], scanned=(*origin.scanned, *lead))
    return dataclasses.replace(facts, origin=inner)


def while_loop(
    ip: Interpreter, eqn: Any, operands: list[Value], positive: list[bool], scope: Scope
) -> list[Value]:
    """Unchanged carries, for example a decode loop's parameters, stay quantized."""
    p = eqn.params
    cond, cond_closed = _compat.opened(p["cond_jaxpr"])
    operands, n_cond, loop = signed(operands, positive), p["cond_nconsts"], while_body(eqn)
    cond_consts = operands[:n_cond]
    body_consts, init, _ = loop.split(operands[n_cond:])
    kept = loop.kept
    init = [v if k else _carried(ip, eqn, v, scope) for v, k in zip(init, kept, strict=True)]

    def state(moving: list[Any]) -> list[Value]:
        rest = iter(moving)
        return [v if k else Value(next(rest), v.facts) for v, k in zip(init, kept, strict=True)]

    frame = Frame(len(ip.call_path) - 1)
    slots = ip.slots.inside(ip.call_path) if ip.slots.updated else []

    def cond_fun(carry: Any) -> Any:
        with ip.slots.shutting("the condition of a while loop"):
            return ip.run(cond, cond_closed, [*cond_consts, *state(carry[0])], scope)[0].data

    def body_fun(carry: Any) -> Any:
        moving, values = carry
        args = [*body_consts, *state(moving)]
        out, new_values = ip.slots.within(
            slots, values, lambda: ip.run(loop.jaxpr, loop.consts, args, scope), frame
        )
        new = [ip.dense(v, eqn, scope) for v, k in zip(out, kept, strict=True) if not k]
        return new, new_values

    start = [v.data for v, k in zip(init, kept, strict=True) if not k]
    last, new_values = lax.while_loop(cond_fun, body_fun, (start, ip.slots.read(slots)))
    ip.slots.leave(slots, new_values)
    rest = iter(last)
    return [v if k else Value(next(rest), v.facts) for v, k in zip(init, kept, strict=True)]
