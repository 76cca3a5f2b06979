"""How per-channel factors move from a value to the operands that it is computed from.

A *demand* on a value `v` asks for `v / c[index]` (or `v * c[index]`) instead, with an index into
the factors `c` for every element of `v`. Each rule returns the demands on operands that meet it:
all terms of a sum, one factor of a product, the operand of a contraction that has the channels.
Operations that do not commute with factors have no rule.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxquant.rewrites.demand import Demand, Option, Refused, Rule, Ties, is_zero
from jaxquant.rewrites.graph import Node
from jaxquant.rewrites.layout_rules import LAYOUT, MOVING


def options(node: Node, demand: Demand, ties: Ties) -> list[tuple[Option, Ties]]:
    """The ways to meet a demand on a node: demands on its operands, with the ties they need.

    Raises:
      Refused: there is none.
    """
    rule = RULES.get(node.op)
    if rule is None:
        raise Refused(f"it comes from `{node.op}`, which does not commute with factors")
    if demand.offset and node.op not in LAYOUT and node.op != "leaf":
        raise Refused("a constant is added to it")
    if node.op == "dot_general":
        return [_dot(node, demand, side, ties.copy()) for side in _sides(node, demand)]
    ties = ties.copy()
    return [(option, ties) for option in rule(node, demand, ties)]


# Arithmetic


def _every(node: Node, d: Demand, ties: Ties, kind: str = "", first: int = 0) -> list[Option]:
    """Demands on all operands except zeros."""
    demands: Option = {}
    for n, parent in enumerate(node.parents):
        if n < first or is_zero(parent):
            continue
        if len(parent.shape) != len(node.shape):
            raise Refused("it is computed with a constant")
        demand = d.moved(d.index, kind)
        for axis, size in enumerate(parent.shape):
            if size == 1 < node.shape[axis]:
                demand = demand.moved(ties.across(demand, axis))
        demands[n] = demand
    return [demands]


def _add(node: Node, d: Demand, ties: Ties) -> list[Option]:
    """Demands on all terms, or on a leaf plus a constant (a norm's factor `1 + scale`)."""
    constants = [(n, p.detail) for n, p in enumerate(node.parents) if p.op == "const"]
    if len(constants) == 1 and constants[0][1]:
        [(at, value)] = constants
        leaf = node.parents[1 - at]
        while leaf.op in LAYOUT:
            leaf = leaf.parents[0]
        if leaf.op == "leaf":
            return [{1 - at: dataclasses.replace(d, offset=value)}]
    return _every(node, d, ties, "bias")


def _able(node: Node, d: Demand) -> list[int]:
    """The operands that have the channels and may be divided."""
    return [
        at
        for at, p in enumerate(node.parents)
        if p.op not in _UNABLE
        and len(p.shape) == len(node.shape)
        and all(
            m == 1 or n == s for m, n, s in zip(d.index.shape, p.shape, node.shape, strict=True)
        )
    ]


def _mul(node: Node, d: Demand, ties: Ties) -> list[Option]:
    """A demand on one factor; first those without inputs, then those nearest to a leaf."""
    able = _able(node, d)
    if len(able) > 1:
        able.sort(key=lambda at: (is_live(node.parents[at]), _distance(node.parents[at])))
    if not able:
        raise Refused("it is a product without a factor that can be divided")
    return [{at: d.moved(d.index, "norm")} for at in able]


def _div(node: Node, d: Demand, ties: Ties) -> list[Option]:
    inverse = dataclasses.replace(d, power=-d.power)
    ways = [{at: (inverse if at else d).moved(d.index, "norm")} for at in _able(node, d)]
    if not ways:
        raise Refused("it is a quotient without an operand that can be divided")
    return ways


_UNABLE = ("const", "input")


def is_live(node: Node) -> bool:
    """Whether a value depends on inputs of the function."""
    seen, stack = {id(node)}, [node]
    while stack:
        node = stack.pop()
        if node.op == "input":
            return True
        stack += [p for p in node.parents if id(p) not in seen]
        seen |= {id(p) for p in node.parents}
    return False


def _distance(node: Node, most: int = 8) -> int:
    """The number of operations from a value to the nearest leaf, at most `most`."""
    level = [node]
    for steps in range(most):
        if any(n.op == "leaf" for n in level):
            return steps
        level = [p for n in level if n.op in RULES for p in n.parents]
    return most


# Contractions


def kept_axes(node: Node, side: int) -> dict[int, int]:
    """For an operand of a `dot_general`, axis of the result -> axis of the operand."""
    (summed, batched), at = node.params["dimension_numbers"], side
    rank = len(node.parents[side].shape)
    free = [a for a in range(rank) if a not in (*summed[at], *batched[at])]
    first = len(batched[0]) if side == 0 else len(node.shape) - len(free)
    return {**dict(enumerate(batched[at])), **{first + n: a for n, a in enumerate(free)}}


def _sides(node: Node, d: Demand) -> list[int]:
    """The operands that lack the fewest channel axes; channels along lacking axes are tied."""
    relevant = {a for a, n in enumerate(d.index.shape) if n > 1}
    missing = {
        side: len(relevant - set(kept_axes(node, side)))
        for side, parent in enumerate(node.parents[:2])
        if parent.op not in _UNABLE
    }
    fewest = min(missing.values(), default=0)
    sides = [side for side, count in missing.items() if count == fewest < max(len(relevant), 1)]
    if not sides:
        raise Refused("no operand of the contraction before it has its channels")
    return sorted(sides, key=lambda side: _distance(node.parents[side]))


def _dot(node: Node, d: Demand, side: int, ties: Ties) -> tuple[Option, Ties]:
    axes = kept_axes(node, side)
    for axis in range(len(node.shape)):
        if axis not in axes:
            d = d.moved(ties.across(d, axis))
    others = [a for a in range(d.index.ndim) if a not in axes]
    index = d.index.transpose([*axes, *others]).reshape([d.index.shape[a] for a in axes])
    index = index.transpose(np.argsort(list(axes.values())))
    summed = set(range(len(node.parents[side].shape))) - set(axes.values())
    return {side: d.moved(np.expand_dims(index, tuple(summed)), "linear")}, ties


def _conv(node: Node, d: Demand, ties: Ties) -> list[Option]:
    """A demand on the kernel, along its output channels."""
    numbers = node.params["dimension_numbers"]
    feature, out = numbers.out_spec[1], numbers.rhs_spec[0]
    if any(n > 1 and a != feature for a, n in enumerate(d.index.shape)):
        raise Refused("its channels are no output channels of the convolution before it")
    shape = [1] * len(node.parents[1].shape)
    shape[out] = d.index.shape[feature]
    return [{1: d.moved(d.index.reshape(shape), "linear")}]


# Ends


def _leaf(node: Node, d: Demand, ties: Ties) -> list[Option]:
    if not jnp.issubdtype(node.dtype, jnp.floating):
        raise Refused(f"{node.detail} is not a float array")
    return [{}]


def _const(node: Node, d: Demand, ties: Ties) -> list[Option]:
    if is_zero(node):
        return [{}]
    raise Refused("it comes from a constant")


def _input(node: Node, d: Demand, ties: Ties) -> list[Option]:
    raise Refused("it comes from an input of the function")


def _lookup(node: Node, d: Demand, ties: Ties) -> list[Option]:
    raise Refused("it comes from a lookup of rows")


RULES: dict[str, Rule] = {
    **MOVING,
    **dict.fromkeys(("neg", "abs", "max", "min"), _every),
    **dict.fromkeys(("add", "add_any"), _add),
    "sub": lambda node, d, ties: _every(node, d, ties, "bias"),
    "select_n": lambda node, d, ties: _every(node, d, ties, first=1),
    "cond": lambda node, d, ties: _every(node, d, ties, first=1),
    "mul": _mul,
    "div": _div,
    "dot_general": lambda node, d, ties: [_dot(node, d, s, ties)[0] for s in _sides(node, d)[:1]],
    "conv_general_dilated": _conv,
    "leaf": _leaf,
    "const": _const,
    "input": _input,
    "gather": _lookup,
}
