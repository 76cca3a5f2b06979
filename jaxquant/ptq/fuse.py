"""Integer-only inference: which results stay integers, and the constants computed for them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from jaxquant.interpret.calls import Call
from jaxquant.interpret.plan import Chain, Planner, plan
from jaxquant.interpret.sites import Site, Sites, path_str
from jaxquant.ops import folded, zero_offset
from jaxquant.ptq.static import contractions
from jaxquant.qtensor import Calibration, ContractionConfig, QTensor, QuantParams, is_qtensor
from jaxquant.recipe import Recipe
from jaxquant.report import Edge


def with_offsets(qparams: Any, sites: Sites) -> Any:
    """Adds to the params the offsets that zero points of activations cause in each sum."""

    def one(path: tuple[Any, ...], q: Any) -> Any:
        calibration = q.calibration if is_qtensor(q) else None
        if calibration is None or calibration.input is None or calibration.input.zero_point is None:
            return q
        uses = contractions(sites, path_str(path))
        over = {_contracted(q, site) for site in uses}
        if len(over) != 1:
            return q  # each site computes its own
        # layers with equal shapes and specs share one compiled function
        bare = dataclasses.replace(q, calibration=None, contraction=ContractionConfig())
        offset = _offset(bare, calibration.input.zero_point, *over)
        return dataclasses.replace(q, calibration=dataclasses.replace(calibration, offset=offset))

    return jax.tree.map_with_path(one, qparams, is_leaf=is_qtensor)


def _contracted(q: QTensor, site: Site) -> tuple[int, ...]:
    """The contracted axes, counted without batch axes."""
    return tuple(a - len(q.batch) for a in site.contracted)


@functools.partial(jax.jit, static_argnums=2)
def _offset(q: QTensor, zero_point: Any, over: tuple[int, ...]) -> Any:
    def one(q: QTensor, zero_point: Any) -> Any:
        return zero_offset(q, over, zero_point)

    for _ in q.batch:
        one = jax.vmap(one)
    return one(q, zero_point)


def fused(qparams: Any, call: Call, recipe: Recipe, sites: Sites) -> tuple[Any, tuple[Edge, ...]]:
    """Adds output grids and folded biases to the params; lists which edges stay integer.

    A result stays integer from one contraction to another if its rule has `requantize`, all
    operations in between have an integer form, and the consumer's input has the same grid.
    """
    flat, tree = jax.tree.flatten_with_path(qparams, is_leaf=is_qtensor)
    leaves = {path_str(path): leaf for path, leaf in flat}
    if not any(is_qtensor(q) and q.contraction.requantize for q in leaves.values()):
        return qparams, ()
    planner = plan(call, recipe)
    where = {site.key: site.param for site in sites.sites if site.param is not None}
    split = _apart(planner, leaves, where)
    reasons: dict[tuple[str, str], str] = {}
    for (source, target), same in sorted(planner.edges.items(), key=lambda item: not item[1]):
        if same or leaves[where[source]].calibration.output is None:
            ends = where[source], where[target]
            clips = source in split or planner.clips(source)
            reasons[source, target] = _joined(leaves, ends, clips, sites)
    for key, path in where.items():
        if is_qtensor(leaves[path]) and leaves[path].contraction.requantize:
            leaves[path] = _folded(leaves[path], sites[key], planner.chain(key), sites)
    fused_params = jax.tree.unflatten(tree, list(leaves.values()))
    edges = [Edge(*ends, False, reason) for ends, reason in planner.exits.items()]
    integer_edges = plan(call.with_params(list(leaves.values())), recipe, as_it_is=True).edges
    for ends in planner.edges:
        reason = reasons.get(ends) or "it is added to a float operand"
        edges.append(Edge(*ends, ends in integer_edges, "" if ends in integer_edges else reason))
    order = {site.key: n for n, site in enumerate(sites.sites)}
    edges.sort(key=lambda e: order[e.source])
    return fused_params, tuple(edges)


def _apart(planner: Planner, leaves: dict[str, Any], where: dict[str, str]) -> set[str]:
    """Sites whose results are used in several parts on different grids: no one grid fits all."""
    first: dict[str, tuple[int, QuantParams]] = {}
    split = set()
    for (source, target), array in planner.arrays.items():
        grid = leaves[where[target]].calibration.input
        other = first.setdefault(source, (array, grid))
        if other[0] != array and not _equal(other[1], grid):
            split.add(source)
    return split


def _joined(leaves: dict[str, Any], ends: tuple[str, str], clips: bool, sites: Sites) -> str:
    """Sets a leaf's output grid to the input grid of its consumer; returns why it cannot."""
    source, target = ends
    a, b = leaves[source], leaves[target]
    if len(contractions(sites, source)) != 1:
        return f"{source} is contracted at several sites"
    if clips:
        return "its results are also used elsewhere, beyond the range of this input grid"
    if a.batch != b.batch:
        return "one of them is in a loop"
    grid, output = b.calibration.input, a.calibration.output
    if output is None or output.same(grid):
        calibration = dataclasses.replace(a.calibration, output=grid)
        leaves[source] = dataclasses.replace(a, calibration=calibration)
        return ""
    if not _equal(output, grid) or output.spec != grid.spec:
        return "its input grid differs from that of the first consumer of these results"
    for path, q in leaves.items():  # the same values, calibrated for two sites
        calibration = q.calibration if is_qtensor(q) else None
        grids = {
            n: getattr(calibration, n) for n in ("input", "output") if getattr(calibration, n, None)
        }
        joined = {n: output for n, g in grids.items() if g.same(grid)}
        if calibration is not None and joined:
            leaves[path] = dataclasses.replace(
                q, calibration=dataclasses.replace(calibration, **joined)
            )
    return ""


def _equal(a: QuantParams, b: QuantParams) -> bool:
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=False)
    ) and (a.zero_point is None) == (b.zero_point is None)


def _folded(q: QTensor, site: Site, chain: Chain | None, sites: Sites) -> QTensor:
    assert site.param is not None
    # the channels of sliced or reshaped weights are not those of the parameter
    reshaped = tuple(site.shape) not in site.operands
    if chain is None or q.batch or reshaped or _abstract(q):
        return q
    if len(contractions(sites, site.param)) != 1:
        return q
    calibration: Calibration = q.calibration or Calibration()
    constants = folded(q, _contracted(q, site), chain.gain, chain.bias, chain.channels, chain.steps)
    return (
        q
        if constants is None
        else dataclasses.replace(q, calibration=dataclasses.replace(calibration, folded=constants))
    )


def _abstract(q: QTensor) -> bool:
    return any(not isinstance(a, (jax.Array, np.ndarray)) for a in jax.tree.leaves(q))
