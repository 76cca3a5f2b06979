"""Finds the leaves that can absorb a division of an activation by per-channel factors.

`x w = (x / c) (c w)`. A factor that stays on the activation costs a division at every call; moved
into a norm's scale or a linear layer before it, it costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxquant.rewrites.absorb import Absorbed, Absorber
from jaxquant.rewrites.commuting import RULES, options
from jaxquant.rewrites.demand import UNASKED, Demand, Option, Refused, Ties, is_zero, lean
from jaxquant.rewrites.graph import Graph, Node
from jaxquant.rewrites.layout_rules import LAYOUT, cut, part

_COMPARISONS = ("ge", "gt", "le", "lt", "eq", "ne")
Asked = list[tuple[Node, Demand]]
_MOST_TRIALS = 500  # of ways to choose a factor of each product


def absorbers(graph: Graph, paths: Sequence[str]) -> Absorbed | str:
    """Finds the leaves that can absorb the division by `c` of the input of some weights.

    Walks back from the activation that the weights are contracted with to leaves, through
    operations that commute with positive per-channel factors: layout; sums (all terms absorb them);
    products (one factor absorbs them: a norm's scale, `up` in `silu(gate) * up`); `relu` and other
    functions that are linear on either side of 0; attention and other contractions that keep the
    channels. Every value on the way must be used for these weights only, or the function would
    change; so must the weights and the leaves. Leaves that are scanned together with the weights
    have separate factors for each layer.

    Args:
      graph: the traced call, see `jaxquant.rewrites.graph.graph_of`.
      paths: key paths of all weights that share the factors.

    Returns:
      The leaves that absorb them, or the reason why none can.

    >>> import jax.numpy as jnp
    >>> from jaxquant.rewrites.graph import graph_of
    >>> from jaxquant.interpret.calls import trace_call
    >>> def fn(p, x):
    ...     return jnp.maximum(x @ p["up"] + p["bias"][None], 0.0) @ p["down"]
    >>> params = {"up": jnp.ones((2, 3)), "bias": jnp.ones(3), "down": jnp.ones((3, 2))}
    >>> graph = graph_of(trace_call(fn, params, (jnp.ones((1, 2)),), {}))
    >>> found = absorbers(graph, ["down"])
    >>> sorted((leaf.path, leaf.axes, leaf.kind) for leaf in found.producers)
    [('bias', (0,), 'bias'), ('up', (1,), 'linear')]
    >>> absorbers(graph, ["up"])
    'it comes from an input of the function'
    """
    try:
        targets = [use for path in dict.fromkeys(paths) for use in _uses(graph, path)]
        channels = _sizes(*targets[0])
        asked: Asked = []
        for node, side in targets:
            if _sizes(node, side) != channels:
                raise Refused(f"{' and '.join(paths)} are not contracted over the same channels")
            asked.append((node.parents[1 - side], _demand(node, 1 - side, channels, -1)))
            asked.append((node.parents[side], _demand(node, side, channels, 1)))
        edges = {(id(node), at) for node, _ in targets for at in (0, 1)}
        walk = _Walk({}, {}, Ties(np.arange(int(np.prod(channels)))), edges, [0])
        return _result(_search(walk, asked[::-1]), paths)
    except Refused as reason:
        return str(reason)


# The weights


def _uses(graph: Graph, path: str) -> list[tuple[Node, int]]:
    """The contractions of a leaf, each with the number of its operand."""
    stack = [n for n in graph.nodes if n.op == "leaf" and n.detail == path]
    uses: list[tuple[Node, int]] = []
    while stack:
        node = stack.pop()
        for reader in node.consumers:
            if reader.op in ("dot_general", "conv_general_dilated"):
                sides = [at for at in (0, 1) if reader.parents[at] is node]
                if len(sides) > 1:
                    raise Refused(f"{path} is contracted with itself")
                uses.append((reader, sides[0]))
            elif reader.op in LAYOUT and reader.parents[0] is node:
                stack.append(reader)
            else:
                raise Refused(f"{path} is {_reads(reader)}")
    if not uses:
        raise Refused(f"{path} is not contracted with an activation")
    return uses


def _axes(node: Node, side: int) -> list[int]:
    """The channel axes of an operand: batch axes, then contracted axes."""
    numbers = node.params["dimension_numbers"]
    if node.op == "dot_general":
        return [*numbers[1][side], *numbers[0][side]]
    if node.params["feature_group_count"] != 1 or node.params["batch_group_count"] != 1:
        raise Refused("its weight is the kernel of a convolution in groups")
    # specs are (batch, feature, *spatial), a kernel's (out, in, *spatial)
    return [numbers.lhs_spec[1] if side == 0 else numbers.rhs_spec[1]]


def _sizes(node: Node, side: int) -> tuple[int, ...]:
    if node.op == "conv_general_dilated" and side == 0:
        raise Refused("its weight is convolved, not a kernel")
    return tuple(node.parents[side].shape[a] for a in _axes(node, side))


def _demand(node: Node, side: int, sizes: tuple[int, ...], power: int) -> Demand:
    axes = _axes(node, side)
    index = np.arange(int(np.prod(sizes))).reshape(sizes).transpose(np.argsort(axes))
    others = tuple(a for a in range(len(node.parents[side].shape)) if a not in axes)
    return Demand(lean(np.expand_dims(index, others)), power)


# The walk back


@dataclasses.dataclass
class _Walk:
    """The demands so far, and how they are met."""

    demands: dict[Node, Demand]
    ways: dict[Node, tuple[int, ...]]  # the operands that have demands
    ties: Ties
    targets: set[tuple[int, int]]  # operands of the contractions with the weights
    trials: list[int]

    def copy(self) -> _Walk:
        """A copy for a trial that may fail."""
        self.trials[0] += 1
        if self.trials[0] > _MOST_TRIALS:
            raise Refused("there are too many ways to choose a factor of each product before it")
        demands, ways = dict(self.demands), dict(self.ways)
        return _Walk(demands, ways, self.ties, self.targets, self.trials)


def _search(walk: _Walk, asked: Asked) -> _Walk:
    """Passes demands back to leaves; tries the factors of a product one by one."""
    while asked:
        node, new = asked.pop()
        old = walk.demands.get(node)
        demand = new if old is None else _merged(old, new, walk.ties)
        if demand is old or (demand.index < 0).all():
            continue
        for reader in node.consumers:  # fail early where no demand could ever help
            if reader.op not in RULES and not _harmless(reader, node, walk):
                raise Refused(f"{_named(node, walk)} is also {_reads(reader)}")
        walk.demands[node] = demand
        ways = options(node, demand, walk.ties)
        if node in walk.ways:
            ways = [way for way in ways if tuple(way[0]) == walk.ways[node]]
        elif len(ways) > 1:
            return _tried(walk, node, ways, asked)
        [(way, ties)] = ways
        walk.ways[node], walk.ties = tuple(way), ties
        asked += [(node.parents[at], d) for at, d in way.items()]
    _require_closed(walk)
    return walk


def _tried(walk: _Walk, node: Node, ways: list[tuple[Option, Ties]], asked: Asked) -> _Walk:
    reasons = []
    for way, ties in ways:
        trial = walk.copy()
        trial.ways[node], trial.ties = tuple(way), ties
        try:
            return _search(trial, asked + [(node.parents[at], d) for at, d in way.items()])
        except Refused as reason:
            reasons.append(reason)
    raise reasons[0]


def _merged(a: Demand, b: Demand, ties: Ties) -> Demand:
    """Merges two demands on one value; `a` itself if `b` adds nothing."""
    if (a.power, a.loops, a.offset) != (b.power, b.loops, b.offset):
        raise Refused("it comes from a value that would be divided in two ways")
    x, y = np.broadcast_arrays(a.index, b.index)
    both = (x >= 0) & (y >= 0)
    if not ties.same(np.where(both, x, 0), np.where(both, y, 0), a):
        raise Refused("it comes from a value that the weights also use along other channels")
    if not ((x < 0) & (y >= 0)).any():
        return a
    return a.moved(np.where(x < 0, y, x))


def _harmless(reader: Node, node: Node, walk: _Walk) -> bool:
    """Whether a reader allows the division: the weights do, and readers of the sign alone."""
    if reader.op in _COMPARISONS:
        return all(p is node or is_zero(p) for p in reader.parents) and node in reader.parents
    places = [at for at, p in enumerate(reader.parents) if p is node]
    return reader.op == "sign" or all((id(reader), at) in walk.targets for at in places)


def _require_closed(walk: _Walk) -> None:
    """Requires every reader of a value to expect exactly its demand."""
    for node, demand in walk.demands.items():
        for reader in node.consumers:
            if _harmless(reader, node, walk):
                continue
            for at, parent in enumerate(reader.parents):
                if parent is node and not _expects(reader, at, demand, walk):
                    raise Refused(f"{_named(node, walk)} is also {_reads(reader)}")


def _expects(reader: Node, at: int, demand: Demand, walk: _Walk) -> bool:
    reader_demand, bounds = walk.demands.get(reader), cut(reader)
    if bounds is not None:
        want = np.full(1, UNASKED) if reader_demand is None else reader_demand.index
        return _equal(want, part(demand.index, bounds), demand, walk.ties)
    if reader_demand is None or at not in walk.ways[reader]:
        return False
    ways = options(reader, reader_demand, walk.ties)
    [asked] = [way[at] for way, _ in ways if tuple(way) == walk.ways[reader]]
    return _equal(asked.index, demand.index, demand, walk.ties)


def _equal(a: np.ndarray, b: np.ndarray, demand: Demand, ties: Ties) -> bool:
    x, y = np.broadcast_arrays(a, b)
    return ties.same(x, y, demand)


def _named(node: Node, walk: _Walk) -> str:
    if node.op == "leaf":
        return str(node.detail)
    is_activation = any((id(r), at) in walk.targets for r in node.consumers for at in (0, 1))
    return "its activation" if is_activation else f"the result of `{node.op}` before it"


def _reads(reader: Node) -> str:
    """How a reader uses a value, in words."""
    if reader.op == "result":
        return "a result of the function"
    leaves = []
    for node in reader.parents if reader.op in ("dot_general", "conv_general_dilated") else ():
        while node.op in LAYOUT:
            node = node.parents[0]
        leaves += [node.detail] if node.op == "leaf" else []
    return f"contracted with {leaves[0]}" if leaves else f"used by `{reader.op}`"


def _result(walk: _Walk, paths: Sequence[str]) -> Absorbed:
    weights: list[Absorber] = []
    producers: list[Absorber] = []
    loops = {d.loops for node, d in walk.demands.items() if _is_one_of(node, paths)}
    if len(loops) != 1:
        raise Refused(f"{' and '.join(paths)} are not scanned by the same loops")
    [over] = loops
    for node, d in walk.demands.items():
        if node.op != "leaf":
            continue
        if d.loops != over:
            raise Refused(f"{node.detail} and {paths[0]} are not scanned by the same loops")
        absorber = Absorber(node.detail, node.shape, d.index, d.power, d.kind, d.offset)
        (weights if _is_one_of(node, paths) else producers).append(absorber)
    if not producers:
        raise Refused("it comes from no parameter")
    classes = walk.ties.classes
    tied = None if (classes == np.arange(classes.size)).all() else classes
    layers = tuple(length for _, length in over)
    return Absorbed(layers, classes.size, tuple(weights), tuple(producers), tied)


def _is_one_of(node: Node, paths: Sequence[str]) -> bool:
    return node.op == "leaf" and node.detail in paths
