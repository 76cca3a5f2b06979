"""A traced call as one graph of values, control flow inlined: who computes what, who reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxquant.interpret import _compat
from jaxquant.interpret.calls import Call

# Calls whose body computes exactly the call's results, once.
_INLINED = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint"}
_INLINED |= {"custom_jvp_call", "custom_vjp_call"}


@dataclasses.dataclass(eq=False)
class Node:
    """One value.

    Attributes:
      op: name of the primitive; else `leaf`, `input`, `const`, `step` (one step's slice of a
        scanned value), `carry` (of a loop, as its body sees it) or `result` (the function's own).
      parents: the values it is computed from.
      params: parameters of the primitive.
      shape: its shape.
      detail: key path of a leaf, value of a constant, identity of the loop of a step; else which
        of the primitive's results it is.
      consumers: the values computed from it that the function's results need.
    """

    op: str
    parents: list[Node]
    params: dict[str, Any]
    shape: tuple[int, ...]
    dtype: Any = None
    detail: Any = None
    consumers: list[Node] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Graph:
    """All values of a call that its results need, each after its parents but for loops."""

    nodes: list[Node]


def graph_of(call: Call) -> Graph:
    """The graph of a traced call."""
    builder = _Builder()
    args = []
    for var, path in zip(call.jaxpr.invars, call.paths, strict=True):
        op = "input" if path is None else "leaf"
        args.append(builder.node(op, [], {}, var.aval, path))
    consts = [builder.const(c) for c in call.consts]
    outs = builder.walk(call.jaxpr, consts, args)
    results = [Node("result", [out], {}, out.shape) for out in outs]
    needed: dict[int, Node] = {}
    stack = list(results)
    while stack:
        node = stack.pop()
        if id(node) not in needed:
            needed[id(node)] = node
            stack += node.parents
    for node in needed.values():
        for parent in {id(p): p for p in node.parents}.values():
            parent.consumers.append(node)
    return Graph([n for n in builder.nodes if id(n) in needed])


class _Builder:
    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def node(
        self, op: str, parents: list[Node], params: dict[str, Any], aval: Any, detail: Any = None
    ) -> Node:
        shape = tuple(getattr(aval, "shape", ()))
        node = Node(op, parents, params, shape, getattr(aval, "dtype", None), detail)
        self.nodes.append(node)
        return node

    def const(self, value: Any) -> Node:
        known = np.size(value) == 1 and isinstance(value, (int, float, np.ndarray, np.generic))
        return self.node("const", [], {}, value, float(np.reshape(value, ())) if known else None)

    def walk(self, jaxpr: Any, consts: Sequence[Node], args: Sequence[Node]) -> list[Node]:
        """The results of a jaxpr on nodes."""
        env: dict[Any, Node] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(var: Any) -> Node:
            return self.const(var.val) if isinstance(var, _compat.Literal) else env[var]

        for eqn in jaxpr.eqns:
            outs = self.equation(eqn, [read(v) for v in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def inner(self, jaxpr: Any, args: Sequence[Node]) -> list[Node]:
        opened, consts = _compat.opened(jaxpr)
        return self.walk(opened, [self.const(c) for c in consts], args)

    def equation(self, eqn: Any, operands: list[Node]) -> list[Node]:
        name, p = eqn.primitive.name, eqn.params
        if name in _INLINED:
            return self.inner(p["jaxpr"] if "jaxpr" in p else p["call_jaxpr"], operands)
        if name == "optimization_barrier":
            return operands
        if name == "scan":
            return self.scan(eqn, operands)
        if name == "while":
            return self.loop(eqn, operands)
        if name == "cond":
            found = [self.inner(branch, operands[1:]) for branch in p["branches"]]
            return [
                self.node(name, [operands[0], *outs], {}, var.aval)
                for var, *outs in zip(eqn.outvars, *found, strict=True)
            ]
        return [self.node(name, operands, p, var.aval, n) for n, var in enumerate(eqn.outvars)]

    def scan(self, eqn: Any, operands: list[Node]) -> list[Node]:
        n_consts, n_carry = _compat.scan_split(eqn.params)
        consts, init = operands[:n_consts], operands[n_consts : n_consts + n_carry]
        jaxpr, _ = _compat.opened(eqn.params["jaxpr"])
        kept = _unchanged(jaxpr.invars[n_consts:], jaxpr.outvars, n_carry)
        state = self.carries(init, kept)
        steps = [
            self.node("step", [x], {}, var.aval, id(eqn))
            for x, var in zip(
                operands[n_consts + n_carry :], jaxpr.invars[n_consts + n_carry :], strict=True
            )
        ]
        outs = self.inner(eqn.params["jaxpr"], [*consts, *state, *steps])
        results = self.after(eqn, init, state, kept, outs[:n_carry], [])
        for var, out in zip(eqn.outvars[n_carry:], outs[n_carry:], strict=True):
            results.append(self.node("scan", [out], {}, var.aval))
        return results

    def loop(self, eqn: Any, operands: list[Node]) -> list[Node]:
        p = eqn.params
        n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
        init = operands[n_cond + n_body :]
        body, _ = _compat.opened(p["body_jaxpr"])
        kept = _unchanged(body.invars[n_body:], body.outvars, len(init))
        state = self.carries(init, kept)
        outs = self.inner(p["body_jaxpr"], [*operands[n_cond : n_cond + n_body], *state])
        again = self.inner(p["cond_jaxpr"], [*operands[:n_cond], *state])
        return self.after(eqn, init, state, kept, outs, again)

    def carries(self, init: list[Node], kept: list[bool]) -> list[Node]:
        """What a loop's body sees of its carries: those that it never changes are the value."""
        return [x if k else self.node("carry", [x], {}, x) for x, k in zip(init, kept, strict=True)]

    def after(
        self,
        eqn: Any,
        init: list[Node],
        state: list[Node],
        kept: list[bool],
        outs: list[Node],
        again: list[Node],
    ) -> list[Node]:
        """What a loop's carries are after it; each step's results feed the next step."""
        results = []
        for x, s, k, out in zip(init, state, kept, outs, strict=True):
            if not k:
                s.parents += [out, *again]
                x = self.node(eqn.primitive.name, [x, out, *again], {}, x)
            results.append(x)
        return results


def _unchanged(invars: Sequence[Any], outvars: Sequence[Any], count: int) -> list[bool]:
    return [a is b for a, b in zip(invars[:count], outvars[:count], strict=True)]
