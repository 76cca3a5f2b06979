"""Rules for demands on operations that move values: layout, slices, padding, reductions, loops."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxquant.interpret import primitives
from jaxquant.interpret.shape_factors import factors
from jaxquant.rewrites.demand import UNASKED, Demand, Option, Refused, Rule, Ties, is_zero
from jaxquant.rewrites.graph import Node


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
    """A step of a loop: each step has separate factors."""
    length = node.parents[0].shape[0]
    size = len(ties.classes) * math.prod(n for _, n in d.loops)
    first = np.arange(length).reshape(-1, *(1,) * d.index.ndim) * size
    index = np.where(d.index[None] < 0, UNASKED, d.index[None] + first)
    moved = dataclasses.replace(d, loops=((node.detail, length), *d.loops))
    return [{0: moved.moved(index)}]


def cut(node: Node) -> list[tuple[int, int, int]] | None:
    """Start, end and stride along each axis of a static slice; `None` for other nodes."""
    shape = node.parents[0].shape if node.parents else ()
    if node.op == "slice":
        p = node.params
        strides = p["strides"] or (1,) * len(shape)
        return list(zip(p["start_indices"], p["limit_indices"], strides, strict=True))
    if node.op == "split":
        axis, sizes = node.params["axis"], node.params["sizes"]
        start = sum(sizes[: node.detail])
        bounds = [(0, n, 1) for n in shape]
        bounds[axis] = (start, start + sizes[node.detail], 1)
        return bounds
    return None


def part(index: np.ndarray, bounds: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """The part of an operand's index that a slice of it has."""
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
        raise Refused("it is a dynamic slice of its channels")
    return [{0: d}]


def _concatenate(node: Node, d: Demand, ties: Ties) -> list[Option]:
    axis, demands, start = node.params["dimension"], {}, 0
    for n, parent in enumerate(node.parents):
        constant = d.index.shape[axis] == 1
        at = slice(None) if constant else slice(start, start + parent.shape[axis])
        demands[n] = d.moved(d.index[(slice(None),) * axis + (at,)])
        start += parent.shape[axis]
    return [{n: x for n, x in demands.items() if not is_zero(node.parents[n])}]


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
    for axis in range(d.index.ndim):
        if any(s[axis] != 1 for s in settings) or tuple(p["padding"][axis]) != (0, 0):
            d = d.moved(ties.across(d, axis))
    return [{0: d}]


_LAYOUT: dict[primitives.Move, Rule] = {
    **dict.fromkeys(("none", "place", "convert", "round"), _same),
    "transpose": _transpose,
    "broadcast": _broadcast,
    "reshape": _reshape,
    "squeeze": _reshape,
    "rev": _rev,
    "slice": _cut,
    "split": _cut,
    "dynamic_slice": _dynamic_slice,
}
_MOVING: dict[primitives.Move, Rule] = {
    "concatenate": _concatenate,
    "pad": _pad,
    "reduce": _reduce,
    "window": _window,
}
# by `Node.op`, of which `step` is not a primitive
LAYOUT: dict[str, Rule] = {**primitives.by_move(_LAYOUT), "step": _step}
MOVING: dict[str, Rule] = {**LAYOUT, **primitives.by_move(_MOVING)}
