"""A traced call as one graph of values, with producers and consumers; control flow is inlined."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxquant.interpret import _compat, primitives
from jaxquant.interpret.bodies import scan_body, while_body
from jaxquant.interpret.calls import Call


@dataclasses.dataclass(eq=False)
class Node:
    """One value.

    Attributes:
      op: name of the primitive; else `leaf`, `input`, `const`, `step` (one step's slice of a
        scanned value), `carry` (of a loop, inside its body) or `result` (of the function).
      parents: the values it is computed from.
      params: parameters of the primitive.
      shape: its shape.
      detail: key path of a leaf, value of a constant, id of the loop of a step; else the number of
        the primitive's result.
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
    """All values that a call's results depend on, in topological order except for loops."""

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
        """Adds the values of a jaxpr, and returns its results."""
        env: dict[Any, Node] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(var: Any) -> Node:
            return self.const(var.val) if isinstance(var, _compat.Literal) else env[var]

        for eqn in jaxpr.eqns:
            outs = self.equation(eqn, [read(v) for v in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def inner(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Node]) -> list[Node]:
        return self.walk(jaxpr, [self.const(c) for c in consts], args)

    def equation(self, eqn: Any, operands: list[Node]) -> list[Node]:
        name, p = eqn.primitive.name, eqn.params
        row = primitives.of(eqn)
        if row.kind == "call":
            return self.inner(*_compat.body(eqn), operands)
        if row.move == "barrier":
            return operands
        if name == "scan":
            return self.scan(eqn, operands)
        if name == "while":
            return self.loop(eqn, operands)
        if name == "cond":
            outs_of = [self.inner(*_compat.opened(b), operands[1:]) for b in p["branches"]]
            return [
                self.node(name, [operands[0], *outs], {}, var.aval)
                for var, *outs in zip(eqn.outvars, *outs_of, strict=True)
            ]
        return [self.node(name, operands, p, var.aval, n) for n, var in enumerate(eqn.outvars)]

    def scan(self, eqn: Any, operands: list[Node]) -> list[Node]:
        body = scan_body(eqn)
        consts, init, xs = body.split(operands)
        state = self.carries(init, body.kept)
        inner = body.split(body.jaxpr.invars)[2]
        steps = [
            self.node("step", [x], {}, var.aval, id(eqn)) for x, var in zip(xs, inner, strict=True)
        ]
        outs = self.inner(body.jaxpr, body.consts, [*consts, *state, *steps])
        results = self.after(eqn, init, state, body.kept, outs[: body.n_carry], [])
        for var, out in zip(eqn.outvars[body.n_carry :], outs[body.n_carry :], strict=True):
            results.append(self.node("scan", [out], {}, var.aval))
        return results

    def loop(self, eqn: Any, operands: list[Node]) -> list[Node]:
        n_cond, body = eqn.params["cond_nconsts"], while_body(eqn)
        consts, init, _ = body.split(operands[n_cond:])
        state = self.carries(init, body.kept)
        outs = self.inner(body.jaxpr, body.consts, [*consts, *state])
        condition = _compat.opened(eqn.params["cond_jaxpr"])
        again = self.inner(*condition, [*operands[:n_cond], *state])
        return self.after(eqn, init, state, body.kept, outs, again)

    def carries(self, init: list[Node], kept: list[bool]) -> list[Node]:
        """A loop's carries inside its body: an unchanged one is the initial value itself."""
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
        """A loop's carries after it; each step's results also feed the next step."""
        results = []
        for x, s, k, out in zip(init, state, kept, outs, strict=True):
            if not k:
                s.parents += [out, *again]
                x = self.node(eqn.primitive.name, [x, out, *again], {}, x)
            results.append(x)
        return results
