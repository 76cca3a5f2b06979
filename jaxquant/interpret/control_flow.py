"""Rules for control flow: bodies are entered and emitted again as the same primitive.

Per-site values (`ip.slots`) pass in and out with the operands; see `slots`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.interpret import _compat
from jaxquant.interpret.loops import Scope, scan, signed, while_loop, with_facts
from jaxquant.interpret.sharded import shard_map
from jaxquant.interpret.slots import Frame
from jaxquant.interpret.values import Facts, Value, merge
from jaxquant.ops import is_integers, with_gradients_of
from jaxquant.qtensor import dequantize, is_qtensor

if TYPE_CHECKING:
    from jaxquant.interpret.evaluate import Interpreter


def _jit(
    ip: Interpreter, eqn: Any, operands: list[Value], positive: list[bool], scope: Scope
) -> list[Value]:
    """Transforms a helper once for all calls with the same kinds of operands."""
    jaxpr, consts = _compat.body(eqn)
    operands = signed(operands, positive)
    facts = [v.facts for v in operands]
    data = [
        _constrained(v.data, s)
        for v, s in zip(operands, eqn.params.get("in_shardings", ()), strict=True)
    ]
    structure = jax.tree.structure(data)
    kind = ip.policy.jit_key(ip, facts, scope)
    if kind is None:
        return ip.run(jaxpr, consts, with_facts(data, facts), scope)
    slots = ip.slots.inside(ip.call_path)
    cache_key = (id(jaxpr), structure, ip.slots.signature(ip.call_path), *kind)
    if cache_key not in ip.jits:
        results: list[list[Facts]] = []

        def inner(consts: list[Any], data: list[Any], values: list[Any]) -> tuple[list, list]:
            out, new_values = ip.slots.within(
                ip.slots.inside(ip.call_path),  # of the call for which `inner` is traced
                values,
                lambda: ip.run(jaxpr, consts, with_facts(data, facts), scope),
            )
            results[:] = [[v.facts for v in out]]
            return [v.data for v in out], new_values

        inner.__name__ = inner.__qualname__ = eqn.params.get("name", "inner")
        ip.jits[cache_key] = jax.jit(inner, **_compat.jit_options(eqn.params)), results
    emitted, results = ip.jits[cache_key]
    out, new_values = emitted(consts, data, ip.slots.read(slots))
    ip.slots.leave(slots, new_values)
    shardings = eqn.params.get("out_shardings", ())
    out = [_constrained(d, s) for d, s in zip(out, shardings, strict=True)]
    return with_facts(out, results[0])


def _constrained(data: Any, sharding: Any) -> Any:
    constraint = _compat.given_sharding(sharding)
    if constraint is None or is_qtensor(data) or is_integers(data):
        return data
    return lax.with_sharding_constraint(data, constraint)


def _inside(
    ip: Interpreter,
    body: tuple[Any, list[Any]],
    facts: list[Facts],
    scope: Scope,
    frame: Frame | None = None,
    dense: Any = None,
) -> tuple[Callable[[Any, Any], tuple[list, list]], list[Facts]]:
    """A body as a function of its operands' data and per-site values, and its results' facts.

    The list of facts is filled when the function runs. With `dense`, an equation, results are
    ordinary arrays.
    """
    slots = ip.slots.inside(ip.call_path)
    results: list[Facts] = []

    def call(data: Any, values: Any) -> tuple[list, list]:
        out, new_values = ip.slots.within(
            slots, values, lambda: ip.run(*body, with_facts(data, facts), scope), frame
        )
        results[:] = [v.facts for v in out]
        return [v.data if dense is None else ip.dense(v, dense, scope) for v in out], new_values

    return call, results


def _cond(
    ip: Interpreter, eqn: Any, operands: list[Value], positive: list[bool], scope: Scope
) -> list[Value]:
    """Branches return ordinary arrays: quantized results are dequantized inside the branch."""
    index, *rest = signed(operands, positive)
    facts, data = [v.facts for v in rest], [v.data for v in rest]
    slots = ip.slots.inside(ip.call_path)
    branches, out_facts = [], []
    for number, closed in enumerate(eqn.params["branches"]):
        frame = Frame(len(ip.call_path) - 1, number)
        call, branch_facts = _inside(ip, _compat.opened(closed), facts, scope, frame, dense=eqn)
        branches.append(call)
        out_facts.append(branch_facts)
    platforms = eqn.params.get("branches_platforms")
    if platforms is not None:
        named: dict[str, Any] = {}
        for names, call in zip(platforms, branches, strict=True):
            named.update(dict.fromkeys(names, call) if names else {"default": call})
        out, new_values = lax.platform_dependent(data, ip.slots.read(slots), **named)
    else:
        out, new_values = lax.switch(index.data, branches, data, ip.slots.read(slots))
    ip.slots.leave(slots, new_values)
    merged = [
        dataclasses.replace(merge(list(fs)), nonneg=all(f.nonneg for f in fs))
        for fs in zip(*out_facts, strict=True)
    ]
    return with_facts(out, merged)


def _remat(
    ip: Interpreter, eqn: Any, operands: list[Value], positive: list[bool], scope: Scope
) -> list[Value]:
    p, operands = eqn.params, signed(operands, positive)
    slots, frame = ip.slots.inside(ip.call_path), Frame(len(ip.call_path) - 1)
    facts = [v.facts for v in operands]
    call, out_facts = _inside(ip, _compat.body(eqn), facts, scope, frame)
    again = jax.checkpoint(call, prevent_cse=p["prevent_cse"], policy=p["policy"])
    out, new_values = again([v.data for v in operands], ip.slots.read(slots))
    ip.slots.leave(slots, new_values)
    return with_facts(out, out_facts)


def _custom_rule(
    ip: Interpreter, eqn: Any, operands: list[Value], positive: list[bool], scope: Scope
) -> list[Value]:
    """Binds `custom_jvp` and `custom_vjp` unchanged, unless the policy must enter the body."""
    jaxpr, consts = _compat.body(eqn)
    if not ip.policy.enters_rules(ip, jaxpr, operands):
        return ip._plain(eqn, operands, positive, scope)
    if ip.policy.keeps_rules and ip.contracts(jaxpr):
        return _rule_kept(ip, eqn, signed(operands, positive), scope)
    if ip.policy.inline_rules and ip.contracts(jaxpr):
        kind = eqn.primitive.name.removesuffix("_call")
        message = "a contraction is inside, so its own derivative rule is not kept"
        ip.report("inlined", ip.where(scope), kind, message)
    return ip.run(jaxpr, consts, signed(operands, positive), scope)


def _rule_kept(ip: Interpreter, eqn: Any, operands: list[Value], scope: Scope) -> list[Value]:
    """Computes on codes, and differentiates by the custom rule at the dequantized operands."""
    slots = ip.slots.inside(ip.call_path)
    facts = [v.facts for v in operands]
    call, out_facts = _inside(ip, _compat.body(eqn), facts, scope, dense=eqn)

    def forward(inputs: Any) -> tuple[list, list]:
        return call(*inputs)

    floats = tuple(dequantize(v.data) if is_qtensor(v.data) else v.data for v in operands)
    inputs = [v.data for v in operands], ip.slots.read(slots)
    like = jax.eval_shape(forward, inputs)[1]

    def reference(*floats: Any) -> tuple[list, list]:
        return _compat.bind(eqn, list(floats)), [jax.tree.map(_zeros, a) for a in like]

    out, new_values = with_gradients_of(forward, reference, inputs, floats)
    ip.slots.leave(slots, new_values)
    return with_facts(out, out_facts)


def _zeros(like: Any) -> Any:
    return jnp.zeros(like.shape, like.dtype)


def _call(
    ip: Interpreter, eqn: Any, operands: list[Value], positive: list[bool], scope: Scope
) -> list[Value]:
    jaxpr, consts = _compat.body(eqn)
    return ip.run(jaxpr, consts, signed(operands, positive), scope)


Rule = Callable[["Interpreter", Any, list[Value], list[bool], Scope], list[Value]]

RULES: dict[str, Rule] = {
    "jit": _jit,
    "scan": scan,
    "while": while_loop,
    "cond": _cond,
    "remat2": _remat,
    "custom_jvp_call": _custom_rule,
    "custom_vjp_call": _custom_rule,
    "closed_call": _call,
    "eval_jaxpr": _call,
    "shard_map": shard_map,
}
