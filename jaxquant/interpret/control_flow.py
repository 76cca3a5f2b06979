"""Control flow: entered, and emitted again as the same primitive."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax import lax

from jaxquant.interpret import _compat, moves
from jaxquant.interpret.sharded import shard_map
from jaxquant.interpret.values import Facts, Value, merge
from jaxquant.qtensor import is_qtensor

if TYPE_CHECKING:
    from jaxquant.interpret.evaluate import Interpreter

Scope = tuple[str, ...]


def _with(data: Sequence[Any], facts: Sequence[Facts]) -> list[Value]:
    return [Value(d, f) for d, f in zip(data, facts, strict=True)]


def _signed(operands: list[Value], positive: list[bool]) -> list[Value]:
    return [
        Value(v.data, dataclasses.replace(v.facts, nonneg=p))
        for v, p in zip(operands, positive, strict=True)
    ]


def _jit(
    ip: Interpreter, eqn: Any, operands: list[Value], positive: list[bool], scope: Scope
) -> list[Value]:
    """A helper called often with the same kind of operands is transformed once."""
    jaxpr, consts = _compat.opened(eqn.params["jaxpr"])
    operands = _signed(operands, positive)
    facts = [v.facts for v in operands]
    data = [
        _constrained(v.data, s)
        for v, s in zip(operands, eqn.params.get("in_shardings", ()), strict=True)
    ]
    structure = jax.tree.structure(data)
    cache_key = (id(jaxpr), structure, *ip.policy.jit_key(ip, facts, scope))
    if cache_key not in ip.jits:
        results: list[list[Facts]] = []

        def inner(consts: list[Any], data: list[Any]) -> list[Any]:
            out = ip.run(jaxpr, consts, _with(data, facts), scope)
            results[:] = [[v.facts for v in out]]
            return [v.data for v in out]

        inner.__name__ = inner.__qualname__ = eqn.params.get("name", "inner")
        ip.jits[cache_key] = jax.jit(inner, **_compat.jit_options(eqn.params)), results
    emitted, results = ip.jits[cache_key]
    out = emitted(consts, data)
    shardings = eqn.params.get("out_shardings", ())
    out = [_constrained(d, s) for d, s in zip(out, shardings, strict=True)]
    return _with(out, results[0])


def _constrained(data: Any, sharding: Any) -> Any:
    given = _compat.given_sharding(sharding)
    if given is None or is_qtensor(data):
        return data
    return lax.with_sharding_constraint(data, given)


def _scan(
    ip: Interpreter, eqn: Any, operands: list[Value], positive: list[bool], scope: Scope
) -> list[Value]:
    """Quantized operands pass as constants, as scanned inputs, and as unchanged carries."""
    p = eqn.params
    jaxpr, closed = _compat.opened(p["jaxpr"])
    n_consts, n_carry = _compat.scan_split(p)
    operands = _signed(operands, positive)
    consts = operands[:n_consts]
    init = operands[n_consts : n_consts + n_carry]
    xs = [_as_scanned(ip, eqn, v, scope) for v in operands[n_consts + n_carry :]]
    kept = _unchanged(jaxpr, n_consts, n_carry, offset=0)
    init = [v if k else _carried(ip, eqn, v, scope) for v, k in zip(init, kept, strict=True)]
    x_facts = [_inside(v.facts) for v in xs]
    out_facts: list[Facts] = []

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        moving = iter(carry)
        state = [v if k else Value(next(moving), v.facts) for v, k in zip(init, kept, strict=True)]
        out = ip.run(jaxpr, closed, [*consts, *state, *_with(x, x_facts)], scope)
        out_facts[:] = [v.facts for v in out]
        new = [ip.dense(v, eqn, scope) for v, k in zip(out[:n_carry], kept, strict=True) if not k]
        return new, [v.data for v in out[n_carry:]]

    start = [v.data for v, k in zip(init, kept, strict=True) if not k]
    last, ys = lax.scan(
        body,
        start,
        [v.data for v in xs],
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    moved = iter(last)
    carried = [
        v if k else Value(next(moved), _moved(f))
        for v, k, f in zip(init, kept, out_facts, strict=False)
    ]
    return [*carried, *_with(ys, [_moved(f) for f in out_facts[n_carry:]])]


def _unchanged(jaxpr: Any, first: int, count: int, offset: int) -> list[bool]:
    """Which carries leave a loop's body as the variable that came in."""
    ins = jaxpr.invars[first : first + count]
    outs = jaxpr.outvars[offset : offset + count]
    return [a is b for a, b in zip(ins, outs, strict=True)]


def _carried(ip: Interpreter, eqn: Any, value: Value, scope: Scope) -> Value:
    if value.facts.origin is not None:
        ip.policy.meets(eqn, value)
    if is_qtensor(value.data):
        value = Value(ip.dense(value, eqn, scope), value.facts)
    return Value(value.data, dataclasses.replace(value.facts, origin=None, live=True, nonneg=False))


def _moved(facts: Facts) -> Facts:
    return dataclasses.replace(facts, origin=None)


def _as_scanned(ip: Interpreter, eqn: Any, value: Value, scope: Scope) -> Value:
    """A value whose leading axis `scan` can take, which for a `QTensor` is a batch axis."""
    if not is_qtensor(value.data) or value.data.batch:
        return value
    led = moves.demote(value.data)
    return Value(ip.dense(value, eqn, scope) if led is None else led, value.facts)


def _inside(facts: Facts) -> Facts:
    """Facts of one slice of a scanned value."""
    origin = facts.origin
    if origin is None:
        return facts
    lost = tuple(a for a in origin.axes[0] if a not in origin.scanned)
    inner = dataclasses.replace(origin, axes=origin.axes[1:], scanned=(*origin.scanned, *lost))
    return dataclasses.replace(facts, origin=inner)


def _while(
    ip: Interpreter, eqn: Any, operands: list[Value], positive: list[bool], scope: Scope
) -> list[Value]:
    """Carries that come out unchanged, such as a decode loop's parameters, stay quantized."""
    p = eqn.params
    cond, cond_closed = _compat.opened(p["cond_jaxpr"])
    body, body_closed = _compat.opened(p["body_jaxpr"])
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    operands = _signed(operands, positive)
    cond_consts, body_consts = operands[:n_cond], operands[n_cond : n_cond + n_body]
    init = operands[n_cond + n_body :]
    kept = _unchanged(body, n_body, len(init), offset=0)
    init = [v if k else _carried(ip, eqn, v, scope) for v, k in zip(init, kept, strict=True)]

    def state(moving: list[Any]) -> list[Value]:
        rest = iter(moving)
        return [v if k else Value(next(rest), v.facts) for v, k in zip(init, kept, strict=True)]

    def cond_fun(moving: Any) -> Any:
        return ip.run(cond, cond_closed, [*cond_consts, *state(moving)], scope)[0].data

    def body_fun(moving: Any) -> Any:
        out = ip.run(body, body_closed, [*body_consts, *state(moving)], scope)
        return [ip.dense(v, eqn, scope) for v, k in zip(out, kept, strict=True) if not k]

    start = [v.data for v, k in zip(init, kept, strict=True) if not k]
    moved = iter(lax.while_loop(cond_fun, body_fun, start))
    return [v if k else Value(next(moved), v.facts) for v, k in zip(init, kept, strict=True)]


def _cond(
    ip: Interpreter, eqn: Any, operands: list[Value], positive: list[bool], scope: Scope
) -> list[Value]:
    """Branches return ordinary arrays: what they pass on quantized is dequantized there."""
    index, *rest = _signed(operands, positive)
    facts = [v.facts for v in rest]
    out_facts: list[list[Facts]] = []

    def branch(closed: Any) -> Callable[..., list[Any]]:
        jaxpr, consts = _compat.opened(closed)

        def call(*data: Any) -> list[Any]:
            out = ip.run(jaxpr, consts, _with(data, facts), scope)
            out_facts.append([v.facts for v in out])
            return [ip.dense(v, eqn, scope) for v in out]

        return call

    branches = [branch(b) for b in eqn.params["branches"]]
    data = [v.data for v in rest]
    platforms = eqn.params.get("branches_platforms")
    if platforms is not None:
        named: dict[str, Any] = {}
        for names, call in zip(platforms, branches, strict=True):
            named.update(dict.fromkeys(names, call) if names else {"default": call})
        out = lax.platform_dependent(*data, **named)
    else:
        out = lax.switch(index.data, branches, *data)
    merged = [
        dataclasses.replace(merge(list(fs)), nonneg=all(f.nonneg for f in fs))
        for fs in zip(*out_facts, strict=True)
    ]
    return _with(out, merged)


def _remat(
    ip: Interpreter, eqn: Any, operands: list[Value], positive: list[bool], scope: Scope
) -> list[Value]:
    p = eqn.params
    jaxpr, consts = _compat.opened(p["jaxpr"])
    operands = _signed(operands, positive)
    facts = [v.facts for v in operands]
    out_facts: list[Facts] = []

    def call(data: list[Any]) -> list[Any]:
        out = ip.run(jaxpr, consts, _with(data, facts), scope)
        out_facts[:] = [v.facts for v in out]
        return [v.data for v in out]

    again = jax.checkpoint(call, prevent_cse=p["prevent_cse"], policy=p["policy"])
    return _with(again([v.data for v in operands]), out_facts)


def _custom_rule(
    ip: Interpreter, eqn: Any, operands: list[Value], positive: list[bool], scope: Scope
) -> list[Value]:
    """`custom_jvp` and `custom_vjp`: bound whole, rule kept, unless a site inside needs entry."""
    jaxpr, consts = _compat.opened(eqn.params["call_jaxpr"])
    if not ip.policy.enters_rules(ip, jaxpr, operands):
        return ip._plain(eqn, operands, positive, scope)
    if ip.policy.inline_rules:
        kind = eqn.primitive.name.removesuffix("_call")
        message = "a contraction is inside, so its own derivative rule is not kept"
        ip.report("inlined", ip.where(scope), kind, message)
    return ip.run(jaxpr, consts, _signed(operands, positive), scope)


def _call(
    ip: Interpreter, eqn: Any, operands: list[Value], positive: list[bool], scope: Scope
) -> list[Value]:
    jaxpr, consts = _compat.opened(eqn.params["call_jaxpr"])
    return ip.run(jaxpr, consts, _signed(operands, positive), scope)


Rule = Callable[["Interpreter", Any, list[Value], list[bool], Scope], list[Value]]

RULES: dict[str, Rule] = {
    "jit": _jit,
    "pjit": _jit,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "remat2": _remat,
    "checkpoint": _remat,
    "custom_jvp_call": _custom_rule,
    "custom_vjp_call": _custom_rule,
    "closed_call": _call,
    "core_call": _call,
    "shard_map": shard_map,
}
