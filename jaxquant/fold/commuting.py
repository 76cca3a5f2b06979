"""How a factor for each channel moves from a value to what the value is computed from.

A *demand* on a value `v` asks for `v / c[index]` in its place (or `v * c[index]`), with an index
into the factors `c` for every place of `v`. Each rule says of which operands the same must be asked
so that the operation yields it: all terms of a sum, one factor of a product, the operand of a
contraction that has the channels. Operations that do not commute with factors have no rule.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from jaxquant.fold.graph import Node
from jaxquant.interpret.runs import factors

# One way to meet a demand: what to ask of which operands.
Option = dict[int, "Demand"]

UNASKED = -1


class Refused(Exception):
    """A demand that cannot be met; its text says why."""


@dataclasses.dataclass(eq=False)
class Demand:
    """What is asked of a value.

    Attributes:
      index: for each place of the value, which factor; -1 where nothing is asked. Axes along which
        it is constant have size 1.
      power: -1 to divide, 1 to multiply.
      loops: identity and length of the loops whose steps were taken back, outermost first; the
        index then counts in `[*loops, channels]`.
      kind: what the value does: `norm` multiplies, `bias` is added, `linear` is contracted.
      offset: the value plus this is what is to be divided.
    """

    index: np.ndarray
    power: int
    loops: tuple[tuple[int, int], ...] = ()
    kind: str = "linear"
    offset: float = 0.0

    def moved(self, index: np.ndarray, kind: str = "") -> Demand:
        """The same of a value that has its places elsewhere."""
        return dataclasses.replace(self, index=lean(index), kind=kind or self.kind)


class Ties:
    """Which channels must have the same factor: classes named by their first member."""

    def __init__(self, classes: np.ndarray) -> None:
        self.classes = classes

    def copy(self) -> Ties:
        """Ties to be added to apart from these."""
        return Ties(self.classes.copy())

    def same(self, a: np.ndarray, b: np.ndarray, demand: Demand) -> bool:
        """Whether two indices ask the same."""
        if demand.loops:
            return bool(np.all(a == b))
        return bool(np.all(self._named(a) == self._named(b)))

    def _named(self, index: np.ndarray) -> np.ndarray:
        return np.where(index < 0, index, self.classes[np.maximum(index, 0)])

    def across(self, demand: Demand, axis: int) -> np.ndarray:
        """The index with one axis gone to size 1: factors along it must be the same."""
        index = demand.index
        first = index.take([0], axis)
        if index.shape[axis] == 1 or self.same(index, first, demand):
            return first
        if demand.loops or (index < 0).any():
            raise Refused("its channels differ where what comes before has only one value")
        pairs = np.stack([np.broadcast_to(first, index.shape).ravel(), index.ravel()], 1)
        for a, b in np.unique(self.classes[pairs], axis=0):
            low, high = sorted((self.classes[a], self.classes[b]))
            self.classes[self.classes == high] = low
        if len(self.classes) > 1 and not self.classes.any():
            raise Refused("what comes before has one value for all of its channels")
        return first


def lean(index: np.ndarray) -> np.ndarray:
    """The index with axes along which it is constant cut to size 1."""
    for axis in range(index.ndim):
        if index.shape[axis] > 1:
            first = index.take([0], axis)
            if (index == first).all():
                index = first
    return index


def options(node: Node, demand: Demand, ties: Ties) -> list[tuple[Option, Ties]]:
    """The ways to meet a demand on a node: what to ask of its operands, and what is tied then.

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


def is_zero(node: Node) -> bool:
    """Whether a value is 0 everywhere, by constants alone."""
    while node.op in ("broadcast_in_dim", "convert_element_type", "reshape"):
        node = node.parents[0]
    return node.op == "const" and node.detail == 0.0


# Layout


def _transpose(node: Node, d: Demand, ties: Ties) -> list[Option]:
    return [{0: d.moved(d.index.transpose(np.argsort(node.params["permutation"])))}]


def _broadcast(node: Node, d: Demand, ties: Ties) -> list[Option]:
    shape, to = node.parents[0].shape, node.params["broadcast_dimensions"]
    carried = {a for a, n in zip(to, shape, strict=True) if n == node.shape[a]}
    for axis in set(range(len(node.shape))) - carried:
        d = d.moved(ties.across(d, axis))
    return [{0: d.moved(d.index.reshape([d.index.shape[a] for a in to]))}]


def _reshape(node: Node, d: Demand, ties: Ties) -> list[Option]:
    old, new = node.parents[0].shape, node.shape
    if (node.op == "reshape" and node.params.get("dimensions") is not None) or 0 in old:
        raise Refused("it comes from a reshape that moves its values")
    full, split = [1] * len(new), [1] * len(old)
    for olds, news in factors(old, new):
        if any(d.index.shape[a] > 1 for a in news):
            for a in news:
                full[a] = new[a]
            for a in olds:
                split[a] = old[a]
    return [{0: d.moved(np.broadcast_to(d.index, full).reshape(split))}]


def _rev(node: Node, d: Demand, ties: Ties) -> list[Option]:
    return [{0: d.moved(np.flip(d.index, node.params["dimensions"]))}]


def _same(node: Node, d: Demand, ties: Ties) -> list[Option]:
    if not jnp.issubdtype(node.parents[0].dtype, jnp.floating):
        raise Refused(f"it comes from `{node.op}` of integers")
    return [{0: d}]


def _step(node: Node, d: Demand, ties: Ties) -> list[Option]:
    """A step of a loop: factors of its own for each of them."""
    length = node.parents[0].shape[0]
    size = len(ties.classes) * math.prod(n for _, n in d.loops)
    first = np.arange(length).reshape(-1, *(1,) * d.index.ndim) * size
    index = np.where(d.index[None] < 0, UNASKED, d.index[None] + first)
    moved = dataclasses.replace(d, loops=((node.detail, length), *d.loops))
    return [{0: moved.moved(index)}]


def cut(node: Node) -> list[tuple[int, int, int]] | None:
    """Start, end and stride along each axis, of a node that is a part of its operand."""
    shape = node.parents[0].shape if node.parents else ()
    if node.op == "slice":
        p = node.params
        strides = p["strides"] or (1,) * len(shape)
        return list(zip(p["start_indices"], p["limit_indices"], strides, strict=True))
    if node.op == "split":
        axis, sizes = node.params["axis"], node.params["sizes"]
        start = sum(sizes[: node.detail])
        whole = [(0, n, 1) for n in shape]
        whole[axis] = (start, start + sizes[node.detail], 1)
        return whole
    return None


def part(index: np.ndarray, bounds: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """What of an operand's index a part of it has."""
    at = (slice(*b) if n > 1 else slice(None) for b, n in zip(bounds, index.shape, strict=True))
    return index[tuple(at)]


def _cut(node: Node, d: Demand, ties: Ties) -> list[Option]:
    bounds, shape = cut(node), node.parents[0].shape
    assert bounds is not None
    sizes = [n if m > 1 else 1 for n, m in zip(shape, d.index.shape, strict=True)]
    index = np.full(sizes, UNASKED)
    at = (slice(*b) if n > 1 else slice(None) for b, n in zip(bounds, d.index.shape, strict=True))
    index[tuple(at)] = d.index
    return [{0: d.moved(index)}]


def _dynamic_slice(node: Node, d: Demand, ties: Ties) -> list[Option]:
    old = node.parents[0].shape
    if any(m > 1 and n != o for o, n, m in zip(old, node.shape, d.index.shape, strict=True)):
        raise Refused("it is a part of its channels, chosen at run time")
    return [{0: d}]


def _concatenate(node: Node, d: Demand, ties: Ties) -> list[Option]:
    axis, found, start = node.params["dimension"], {}, 0
    for n, parent in enumerate(node.parents):
        whole = d.index.shape[axis] == 1
        at = slice(None) if whole else slice(start, start + parent.shape[axis])
        found[n] = d.moved(d.index[(slice(None),) * axis + (at,)])
        start += parent.shape[axis]
    return [{n: x for n, x in found.items() if not is_zero(node.parents[n])}]


def _pad(node: Node, d: Demand, ties: Ties) -> list[Option]:
    padded = [config != (0, 0, 0) for config in node.params["padding_config"]]
    if not is_zero(node.parents[1]):
        raise Refused("it is padded with a constant")
    if any(p and n > 1 for p, n in zip(padded, d.index.shape, strict=True)):
        raise Refused("its channels are padded")
    return [{0: d}]


def _reduce(node: Node, d: Demand, ties: Ties) -> list[Option]:
    return [{0: d.moved(np.expand_dims(d.index, tuple(node.params["axes"])))}]


def _window(node: Node, d: Demand, ties: Ties) -> list[Option]:
    p = node.params
    settings = [p["window_dimensions"], p["window_strides"]]
    settings += [p[k] for k in ("base_dilation", "window_dilation") if p.get(k) is not None]
    plain = [
        all(s[a] == 1 for s in settings) and tuple(p["padding"][a]) == (0, 0)
        for a in range(d.index.ndim)
    ]
    if any(n > 1 and not ok for n, ok in zip(d.index.shape, plain, strict=True)):
        raise Refused("its channels are pooled together")
    return [{0: d}]


# Arithmetic


def _every(node: Node, d: Demand, ties: Ties, kind: str = "", first: int = 0) -> list[Option]:
    """All operands but zeros."""
    found: Option = {}
    for n, parent in enumerate(node.parents):
        if n < first or is_zero(parent):
            continue
        if len(parent.shape) != len(node.shape):
            raise Refused("a constant takes part in it")
        asked = d.moved(d.index, kind)
        for axis, size in enumerate(parent.shape):
            if size == 1 < node.shape[axis]:
                asked = asked.moved(ties.across(asked, axis))
        found[n] = asked
    return [found]


def _add(node: Node, d: Demand, ties: Ties) -> list[Option]:
    """All terms; a leaf plus a constant, as in a norm that multiplies by `1 + scale`."""
    known = [(n, p.detail) for n, p in enumerate(node.parents) if p.op == "const"]
    if len(known) == 1 and known[0][1]:
        [(at, value)] = known
        leaf = node.parents[1 - at]
        while leaf.op in _MOVES:
            leaf = leaf.parents[0]
        if leaf.op == "leaf":
            return [{1 - at: dataclasses.replace(d, offset=value)}]
    return _every(node, d, ties, "bias")


def _able(node: Node, d: Demand) -> list[int]:
    """The operands that have the channels."""
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
    """One factor; first what no input changes, then that nearest to a leaf."""
    able = _able(node, d)
    if len(able) > 1:
        able.sort(key=lambda at: (is_live(node.parents[at]), _distance(node.parents[at])))
    if not able:
        raise Refused("it is a product of what cannot be divided")
    return [{at: d.moved(d.index, "norm")} for at in able]


def _div(node: Node, d: Demand, ties: Ties) -> list[Option]:
    turned = dataclasses.replace(d, power=-d.power)
    ways = [{at: (turned if at else d).moved(d.index, "norm")} for at in _able(node, d)]
    if not ways:
        raise Refused("it is a quotient of what cannot be divided")
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
    """How many operations a value is away from the nearest leaf."""
    level = [node]
    for steps in range(most):
        if any(n.op == "leaf" for n in level):
            return steps
        level = [p for n in level if n.op in RULES for p in n.parents]
    return most


# Contractions


def kept_axes(node: Node, side: int) -> dict[int, int]:
    """For an operand of a `dot_general`: which axis of the result is which of its own."""
    (summed, batched), at = node.params["dimension_numbers"], side
    rank = len(node.parents[side].shape)
    free = [a for a in range(rank) if a not in (*summed[at], *batched[at])]
    first = len(batched[0]) if side == 0 else len(node.shape) - len(free)
    return {**dict(enumerate(batched[at])), **{first + n: a for n, a in enumerate(free)}}


def _sides(node: Node, d: Demand) -> list[int]:
    """The operands that have all the channels; else those that have some, which are tied then."""
    relevant = {a for a, n in enumerate(d.index.shape) if n > 1}
    missing = {
        side: len(relevant - set(kept_axes(node, side)))
        for side, parent in enumerate(node.parents[:2])
        if parent.op not in _UNABLE
    }
    fewest = min(missing.values(), default=0)
    found = [side for side, count in missing.items() if count == fewest < max(len(relevant), 1)]
    if not found:
        raise Refused("no operand of the contraction before it has its channels")
    return sorted(found, key=lambda side: _distance(node.parents[side]))


def _dot(node: Node, d: Demand, side: int, ties: Ties) -> tuple[Option, Ties]:
    own = kept_axes(node, side)
    for axis in range(len(node.shape)):
        if axis not in own:
            d = d.moved(ties.across(d, axis))
    others = [a for a in range(d.index.ndim) if a not in own]
    index = d.index.transpose([*own, *others]).reshape([d.index.shape[a] for a in own])
    index = index.transpose(np.argsort(list(own.values())))
    summed = set(range(len(node.parents[side].shape))) - set(own.values())
    return {side: d.moved(np.expand_dims(index, tuple(summed)), "linear")}, ties


def _conv(node: Node, d: Demand, ties: Ties) -> list[Option]:
    """The kernel, along its output channels."""
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


Rule = Callable[[Node, Demand, Ties], list[Option]]

_MOVES = {"transpose", "broadcast_in_dim", "reshape", "squeeze", "convert_element_type", "step"}

LAYOUT: dict[str, Rule] = {
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _reshape,
    "rev": _rev,
    "step": _step,
    "slice": _cut,
    "split": _cut,
    "dynamic_slice": _dynamic_slice,
    **dict.fromkeys(("convert_element_type", "reduce_precision", "copy", "copy_p"), _same),
    **dict.fromkeys(("stop_gradient", "name", "sharding_constraint"), _same),
    **dict.fromkeys(("reshard", "mesh_cast", "pvary", "pcast"), _same),
}

RULES: dict[str, Rule] = {
    **LAYOUT,
    "concatenate": _concatenate,
    "pad": _pad,
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _reduce),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _window),
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
