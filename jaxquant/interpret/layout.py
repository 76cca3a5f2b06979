"""Layout primitives, which move values without computing: on origins and on `QTensor`s."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant import ops
from jaxquant.interpret import _compat, placed, primitives, reshapes, slices
from jaxquant.interpret.shape_factors import factors
from jaxquant.interpret.values import Origin, Value
from jaxquant.qtensor import Calibration, QTensor, dequantize, is_fake_quant, is_qtensor

Axes = tuple[tuple[int, ...], ...]


def _origin_reshape(axes: Axes, old: Sequence[int], new: Sequence[int]) -> Axes | None:
    if 0 in old:
        return None
    out: list[tuple[int, ...]] = [()] * len(new)
    for olds, news in factors(old, new):
        merged = tuple(p for a in olds for p in axes[a])
        for a in news:
            out[a] = merged if new[a] != 1 or len(news) == 1 else ()
    return tuple(out)


def gathered_axis(params: dict[str, Any], shape: Sequence[int]) -> int | None:
    """The axis that a `gather` indexes, if it is one axis and slices are whole; else `None`."""
    dims, sizes = params["dimension_numbers"], params["slice_sizes"]
    if len(dims.start_index_map) != 1 or tuple(dims.collapsed_slice_dims) != dims.start_index_map:
        return None
    if dims.operand_batching_dims or dims.start_indices_batching_dims:
        return None
    axis = dims.start_index_map[0]
    full = all(n == m for a, (n, m) in enumerate(zip(sizes, shape, strict=True)) if a != axis)
    return axis if full and sizes[axis] == 1 else None


def rows_lead(eqn: Any) -> bool:
    """Whether the axes of a `gather`'s indices come first in its result, in order."""
    rank, offset = eqn.outvars[0].aval.ndim, eqn.params["dimension_numbers"].offset_dims
    return tuple(offset) == tuple(range(rank - len(offset), rank))


def origin_of(eqn: Any, operands: list[Value]) -> Origin | None:
    """The origin of an equation's results, if it only moves or scales a parameter's values."""
    name, params, move = eqn.primitive.name, eqn.params, primitives.of(eqn).move
    sources = [v.facts.origin for v in operands]
    origin = sources[0] if sources else None
    if move == "concatenate":
        return _joined(sources)
    if move == "stack":
        return _stacked(_joined(sources), params["axis"])
    if name == "mul" and origin is None and len(sources) == 2:
        origin, operands = sources[1], operands[::-1]
    if origin is None:
        return None
    shape = (
        tuple(jnp.shape(operands[0].data))
        if not is_qtensor(operands[0].data)
        else (operands[0].data.shape)
    )
    axes: Axes | None = None
    if move == "transpose":
        axes = tuple(origin.axes[p] for p in params["permutation"])
    elif move == "reshape":
        if params.get("dimensions") is None:
            axes = _origin_reshape(origin.axes, shape, params["new_sizes"])
    elif move == "broadcast":
        by_dim = dict(zip(params["broadcast_dimensions"], origin.axes, strict=True))
        axes = tuple(by_dim.get(a, ()) for a in range(len(params["shape"])))
    elif move == "squeeze":
        dims = [d % len(shape) for d in params["dimensions"]]
        axes = tuple(a for i, a in enumerate(origin.axes) if i not in dims)
    elif move == "gather":
        axis = gathered_axis(params, shape)
        if axis is not None and rows_lead(eqn):
            lead: Axes = ((),) * (eqn.outvars[0].aval.ndim - len(shape) + 1)
            axes = lead + tuple(a for i, a in enumerate(origin.axes) if i != axis)
    elif move in _SAME_AXES:
        axes = origin.axes
    elif name in ("mul", "div", "neg"):
        if name == "neg" or (jnp.shape(operands[1].data) == () and not operands[1].is_param):
            axes = origin.axes
    elif move == "convert" and jnp.issubdtype(params["new_dtype"], jnp.floating):
        axes = origin.axes
    if axes is None:
        return None
    moved = origin.moved or move != "none"
    looked_up = origin.looked_up or (move == "gather" and eqn.invars[1].aval.ndim > 1)
    return dataclasses.replace(origin, axes=axes, moved=moved, looked_up=looked_up)


def _joined(sources: list[Origin | None]) -> Origin | None:
    origins = [o for o in sources if o is not None]
    first = origins[0] if origins else None
    if first is None or len(origins) != len(sources):
        return None
    if any((o.axes, o.scanned) != (first.axes, first.scanned) for o in origins):
        return None
    parts = [p for o in origins for p in o.parts]
    alone = [dataclasses.replace(p, joined=()) for p in parts]
    others = tuple(p for p in alone if p.path != first.path)
    return dataclasses.replace(first, joined=others, moved=True)


def _stacked(origin: Origin | None, axis: int) -> Origin | None:
    if origin is None:
        return None
    return dataclasses.replace(origin, axes=(*origin.axes[:axis], (), *origin.axes[axis:]))


_SAME_AXES = ("none", "place", "barrier", "slice", "dynamic_slice", "split", "rev")


def _divisor_moved(eqn: Any, q: Any, data: list[Any]) -> list[Any] | None:
    """Transposes a `QTensor` with a divisor, whose axes are permuted, too."""
    old, new = q.calibration, None
    bare = dataclasses.replace(q, calibration=dataclasses.replace(old, divisor=None))
    results: Any = _RULES["transpose"](eqn, bare, [bare, *data[1:]])
    if results and is_qtensor(results[0]) and results[0].batch == q.batch:
        order = tuple(eqn.params["permutation"])
        axes = tuple(order.index(a + q.ndim) - q.ndim for a in old.axis)
        rest = reshapes.calibrated(results[0], lambda a: a)
        new = dataclasses.replace(rest, divisor=old.divisor, axis=axes) if rest else None
    return None if new is None else [dataclasses.replace(results[0], calibration=new)]


def quantized_results(eqn: Any, operands: list[Value]) -> list[Any] | None:
    """Results of a layout primitive on quantized operands; `None` if they cannot stay quantized."""
    name, params, move = eqn.primitive.name, eqn.params, primitives.of(eqn).move
    data = [v.data for v in operands]
    if any(is_fake_quant(d) for d in data):
        return _trained_results(eqn, operands)
    if move in ("concatenate", "stack"):
        if not all(is_qtensor(d) for d in data):
            return None
        axis = params["dimension"] if move == "concatenate" else params["axis"]
        if move == "stack":
            data = [reshapes.expand(d, [axis]) for d in data]
        return _one(slices.concatenate(data, axis))
    if name == "mul" and len(data) == 2 and not is_qtensor(data[0]):
        data = data[::-1]
    q = data[0]
    if not is_qtensor(q) or (any(is_qtensor(d) for d in data[1:]) and move != "barrier"):
        return None
    if move == "none":
        return [q]
    if q.calibration is not None and q.calibration.divisor is not None and move != "convert":
        return _divisor_moved(eqn, q, data) if move == "transpose" else None
    rule = _RULES.get(name)
    results = _scaled(name, q, data) if name in ("mul", "div") else rule and rule(eqn, q, data)
    if not results or move in ("barrier", "convert"):
        return results or None  # the layout is unchanged
    # calibration made for the old layout is dropped
    return [
        dataclasses.replace(r, calibration=_still(move, q, r)) if is_qtensor(r) else r
        for r in results
    ]


def _still(move: str | None, q: QTensor, moved: QTensor) -> Calibration | None:
    """The part of `q`'s calibration that still holds after a move."""
    rest, old = reshapes.calibrated(moved, lambda a: a), q.calibration
    if rest is None or old is None or old.offset is None or move != "transpose":
        return rest
    # an offset along one axis has no order to change; a tied embedding is transposed for each token
    one_axis = moved.batch == q.batch and old.offset.ndim == len(q.batch) + 1
    return dataclasses.replace(rest, offset=old.offset) if one_axis else rest


def _trained_results(eqn: Any, operands: list[Value]) -> list[Any] | None:
    """`quantized_results` of `FakeQuantTensor`s: on codes and on the float values beside them."""
    tensors = [v.data for v in operands if is_fake_quant(v.data)]
    codes = [Value(v.data.constant, v.facts) if is_fake_quant(v.data) else v for v in operands]
    moved = quantized_results(eqn, codes)
    if moved is None:
        return None
    floats = [dequantize(v.data) if is_qtensor(v.data) else v.data for v in operands]
    values = _compat.bind(eqn, floats)
    if primitives.of(eqn).move == "barrier":
        return [
            v.data.over(m, w) if is_fake_quant(v.data) else m
            for v, m, w in zip(operands, moved, values, strict=True)
        ]
    return [
        tensors[0].over(m, w) if is_qtensor(m) else w for m, w in zip(moved, values, strict=True)
    ]


def _one(q: QTensor | None) -> list[Any] | None:
    return None if q is None else [q]


def _scaled(name: str, q: QTensor, data: list[Any]) -> list[Any] | None:
    # a traced factor may be trained, and the scales of a QTensor have no gradient
    if jnp.shape(data[1]) != () or isinstance(data[1], jax.core.Tracer):
        return None
    factor = jnp.asarray(data[1]).astype(jnp.float32)
    return [slices.rescale(q, factor if name == "mul" else 1.0 / factor)]


def _convert(eqn: Any, q: QTensor, data: list[Any]) -> list[Any] | None:
    dtype = jnp.dtype(eqn.params["new_dtype"])
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return [dataclasses.replace(q, dtype=dtype.name)]


def _reshape(eqn: Any, q: QTensor, data: list[Any]) -> list[Any] | None:
    if eqn.params.get("dimensions") is not None:
        return None
    return _one(reshapes.reshape(q, eqn.params["new_sizes"]))


def _squeeze(eqn: Any, q: QTensor, data: list[Any]) -> list[Any] | None:
    dims = [d % q.ndim for d in eqn.params["dimensions"]]
    squeezed = reshapes.squeeze(q, dims)
    shape = [n for a, n in enumerate(q.shape) if a not in dims]
    return _one(reshapes.reshape(q, shape) if squeezed is None else squeezed)


def _broadcast(eqn: Any, q: QTensor, data: list[Any]) -> list[Any] | None:
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    if math.prod(shape) == q.size:
        return _one(reshapes.reshape(q, shape))
    return _one(slices.broadcast(q, shape, dims))


def _slice(eqn: Any, q: QTensor, data: list[Any]) -> list[Any] | None:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * q.ndim
    sizes = [-(-(e - s) // t) for s, e, t in zip(starts, limits, strides, strict=True)]
    return _one(slices.cut(q, starts, sizes, strides))


def _dynamic_slice(eqn: Any, q: QTensor, data: list[Any]) -> list[Any] | None:
    return _one(slices.cut(q, data[1:], eqn.params["slice_sizes"]))


def _split(eqn: Any, q: QTensor, data: list[Any]) -> list[Any] | None:
    axis, out, start = eqn.params["axis"], [], 0
    for n in eqn.params["sizes"]:
        starts, sizes = [0] * q.ndim, list(q.shape)
        starts[axis], sizes[axis] = start, n
        piece = slices.cut(q, starts, sizes)
        if piece is None:
            return None
        out.append(piece)
        start += n
    return out


def _gather(eqn: Any, q: QTensor, data: list[Any]) -> list[Any] | None:
    p, axis = eqn.params, gathered_axis(eqn.params, q.shape)
    rows = None
    if axis is not None and rows_lead(eqn) and p.get("fill_value") is None:
        rows = slices.rows(q, data[1], axis, p["mode"])
    # otherwise only the rows looked up are dequantized
    out = ops.gather(q, data[1], **p) if rows is None else rows
    return None if out is None else [out]


def _barrier(eqn: Any, q: QTensor, data: list[Any]) -> list[Any] | None:
    return list(lax.optimization_barrier(tuple(data)))


def _placed(eqn: Any, q: QTensor, data: list[Any]) -> list[Any] | None:
    if "dst_sharding" in eqn.params:
        return [placed.reshard(q, eqn.params["dst_sharding"], jax.sharding.reshard)]
    return [placed.reshard(q, eqn.params["sharding"], jax.lax.with_sharding_constraint)]


Rule = Callable[[Any, QTensor, list[Any]], list[Any] | None]
_MOVES: dict[primitives.Move, Rule] = {
    "place": _placed,
    "barrier": _barrier,
    "convert": _convert,
    "transpose": lambda e, q, d: _one(reshapes.transpose(q, e.params["permutation"])),
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast": _broadcast,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "rev": lambda e, q, d: _one(slices.reverse(q, e.params["dimensions"])),
    "gather": _gather,
}
_RULES: dict[str, Rule] = {
    **primitives.by_move(_MOVES),
    "neg": lambda e, q, d: [slices.rescale(q, -1.0)],
}
