"""`scan` and `while`, with quantized operands and values of sites (`slots`) inside."""

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
    """Data and facts as values."""
    return [Value(d, f) for d, f in zip(data, facts, strict=True)]


def signed(operands: list[Value], positive: list[bool]) -> list[Value]:
    """Operands with what is known of their signs."""
    return [
        Value(v.data, dataclasses.replace(v.facts, nonneg=p))
        for v, p in zip(operands, positive, strict=True)
    ]


def scan(
    ip: Interpreter, eqn: Any, operands: list[Value], positive: list[bool], scope: Scope
) -> list[Value]:
    """Quantized operands pass as constants, as scanned inputs, and as unchanged carries."""
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
        (moving, values), (slices, own) = carry, x
        rest = iter(moving)
        state = [v if k else Value(next(rest), v.facts) for v, k in zip(init, kept, strict=True)]
        args = [*consts, *state, *with_facts(slices, x_facts)]
        out, left = ip.slots.within(
            [*carried, *stacked],
            [*values, *own],
            lambda: ip.run(loop.jaxpr, loop.consts, args, scope),
            frame,
        )
        out_facts[:] = [v.facts for v in out]
        new = [ip.dense(v, eqn, scope) for v, k in zip(out[:n_carry], kept, strict=True) if not k]
        out = [ip.in_float(v, scope, "scan", "scan takes floats") for v in out]
        n = len(carried)
        return (new, left[:n]), ([v.data for v in out[n_carry:]], left[n:])

    start = [v.data for v, k in zip(init, kept, strict=True) if not k]
    (last, left), (ys, owned) = lax.scan(
        body,
        (start, ip.slots.read(carried)),
        ([v.data for v in xs], ip.slots.read(stacked)),
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    ip.slots.leave([*carried, *stacked], [*left, *owned])
    moved = iter(last)
    finals = [
        v if k else Value(next(moved), result_facts(f))
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
    """Facts of a value that a loop gives."""
    return dataclasses.replace(facts, origin=None, over=None)


def _as_scanned(ip: Interpreter, eqn: Any, value: Value, scope: Scope) -> Value:
    """A value whose leading axis `scan` can take, which for a `QTensor` is a batch axis."""
    if not is_qtensor(value.data) or value.data.batch:
        return value
    led = reshapes.demote(value.data)
    if led is not None and is_fake_quant(led):
        length = value.data.core[0]  # what is learned holds for all steps
        learned = jax.tree.map(lambda a: jnp.broadcast_to(a, (length, *a.shape)), led.learned)
        led = dataclasses.replace(led, learned=learned)
    return Value(ip.dense(value, eqn, scope) if led is None else led, value.facts)


def slice_facts(facts: Facts) -> Facts:
    """Facts of one slice of a scanned value."""
    if facts.over is not None:
        facts = dataclasses.replace(facts, over=frozenset(a - 1 for a in facts.over if a))
    origin = facts.origin
    if origin is None:
        return facts
    lost = tuple(a for a in origin.axes[0] if a not in origin.scanned)
    inner = dataclasses.replace(origin, axes=origin.axes[1:], scanned=(*origin.scanned, *lost))
    return dataclasses.replace(facts, origin=inner)


def while_loop(
    ip: Interpreter, eqn: Any, operands: list[Value], positive: list[bool], scope: Scope
) -> list[Value]:
    """Carries that come out unchanged, such as a decode loop's parameters, stay quantized."""
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
        out, left = ip.slots.within(
            slots, values, lambda: ip.run(loop.jaxpr, loop.consts, args, scope), frame
        )
        return [ip.dense(v, eqn, scope) for v, k in zip(out, kept, strict=True) if not k], left

    start = [v.data for v, k in zip(init, kept, strict=True) if not k]
    last, left = lax.while_loop(cond_fun, body_fun, (start, ip.slots.read(slots)))
    ip.slots.leave(slots, left)
    moved = iter(last)
    return [v if k else Value(next(moved), v.facts) for v, k in zip(init, kept, strict=True)]
