"""Integer activations between contractions: which operations keep them integer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.interpret import _compat, primitives
from jaxquant.interpret.values import Value, varying
from jaxquant.ops import (
    Accumulator,
    Activation,
    Integers,
    added,
    inference_only,
    is_integers,
)


def results(eqn: Any, operands: list[Value]) -> list[Any] | None:
    """Evaluates an equation on integers; `None` if it has no integer form."""
    match primitives.of(eqn).integers:
        case "affine":
            return _affine(eqn, operands)
        case "same":
            return [operands[0].data] if len(operands) == 1 else None
        case "convert":
            return _converted(eqn, operands[0].data)
        case "clip":
            return _clamped(eqn, operands)
        case "move":
            return _moved(eqn, operands)
    return None


def _converted(eqn: Any, x: Integers) -> list[Any] | None:
    dtype = jnp.dtype(eqn.params["new_dtype"])
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return [dataclasses.replace(x, dtype=dtype.name)]


def _affine(eqn: Any, operands: list[Value]) -> list[Any] | None:
    """Shifts or scales a contraction's sums by a vector over channels; adds two activations."""
    name = eqn.primitive.name
    if name == "neg":
        x, other, first = operands[0].data, Value(jnp.float32(-1.0)), True
    else:
        first = is_integers(operands[0].data)
        x, other = (operands[0].data, operands[1]) if first else (operands[1].data, operands[0])
    if is_integers(other.data):
        total = (
            added(x, other.data)
            if name in ("add", "add_any") and x.shape == other.data.shape
            else None
        )
        return None if total is None else [total]
    if not isinstance(x, Accumulator):
        return None
    vector = _channel_vector(x, other)
    if vector is None or (name == "div" and not first):
        return None
    step = f"{name}{'' if first else ' from'} {_named(other)}"
    if name in ("mul", "neg"):
        return [x.scaled(vector, step)]
    if name == "div":
        return [x.scaled(1.0 / vector, step)]
    if name == "sub" and not first:
        return [x.scaled(jnp.float32(-1.0), step).shifted(vector, step)]
    return [x.shifted(-vector if name == "sub" else vector, step)]


def _named(value: Value) -> str:
    """Identifies a vector: a parameter's path or a constant's value."""
    if value.facts.origin is not None:
        return value.facts.origin.path
    if not isinstance(value.data, jax.core.Tracer) and jnp.ndim(value.data) == 0:
        return str(float(value.data))
    return "a vector"


def _channel_vector(x: Accumulator, value: Value) -> Array | None:
    """A value that varies over the channels of `x` only, in float32 with size 1 elsewhere."""
    data = value.data
    if value.facts.live or not hasattr(data, "shape") or hasattr(data, "codes"):
        return None
    if not jnp.issubdtype(data.dtype, jnp.floating):
        return None
    shape = tuple(data.shape)
    if len(shape) not in (0, x.ndim) or not varying(value) <= set(x.channels):
        return None
    if shape:
        keep = [n if a in x.channels else 1 for a, n in enumerate(shape)]
        data = lax.slice(data, [0] * len(shape), keep)
    data = data.astype(jnp.float32)
    # a tracer may be differentiated; a concrete vector may be folded ahead of time
    return inference_only(data) if isinstance(data, jax.core.Tracer) else data


def _codes(x: Any) -> Activation | None:
    """The activation; of sums, their codes, or `None` without an output grid."""
    return x.activation() if isinstance(x, Accumulator) else x


def _clamped(eqn: Any, operands: list[Value]) -> list[Any] | None:
    """Clips codes between scalars; takes the maximum or minimum of two activations on one grid."""
    name = eqn.primitive.name
    if name == "clamp":
        low, value, high = operands
        x = _codes(value.data) if is_integers(value.data) else None
        ends = [_scalar(low), _scalar(high)]
        if x is None or ends[0] is None or ends[1] is None:
            return None
        return [x.clamped(*ends)]
    a, b = operands
    if is_integers(a.data) and is_integers(b.data):
        return _of_two(eqn, [a.data, b.data])
    value, other = (a, b) if is_integers(a.data) else (b, a)
    end, x = _scalar(other), _codes(value.data)
    if x is None or end is None:
        return None
    return [x.clamped(low=end) if name == "max" else x.clamped(high=end)]


def _of_two(eqn: Any, data: list[Any]) -> list[Any] | None:
    xs = [x for x in map(_codes, data) if x is not None]
    if len(xs) < len(data) or not all(x.grid.same(xs[0].grid) for x in xs):
        return None
    codes = _compat.bind(eqn, [x.codes for x in xs])[0]
    source = tuple(dict.fromkeys(key for x in xs for key in x.source))
    also = tuple(dict.fromkeys(key for x in xs for key in x.added))
    return [dataclasses.replace(xs[0], codes=codes, source=source, added=also)]


def _scalar(value: Value) -> Array | None:
    """The value as a scalar, if it is uniform and depends on no input; else `None`."""
    data = value.data
    if value.facts.live or not hasattr(data, "ndim") or is_integers(data):
        return jnp.float32(data) if isinstance(data, (int, float)) else None
    if data.ndim and varying(value):
        return None
    return jnp.ravel(data)[0] if data.ndim else data


def _moved(eqn: Any, operands: list[Value]) -> list[Any] | None:
    """Applies layout operations and maxima (`reduce_max`, max pooling) to the codes."""
    name, rest = eqn.primitive.name, [v.data for v in operands[1:]]
    if name == "concatenate":
        data = [v.data for v in operands]
        return _of_two(eqn, data) if all(map(is_integers, data)) else None
    if not is_integers(operands[0].data) or any(map(is_integers, rest)):
        return None
    if name == "gather" and eqn.params.get("mode") is lax.GatherScatterMode.FILL_OR_DROP:
        return None
    sums = operands[0].data
    if name == "transpose" and isinstance(sums, Accumulator):
        turned = _turned(sums, eqn.params["permutation"])
        if turned is not None:
            return [turned]
    x = _codes(sums)
    if x is None:
        return None
    if name == "pad":
        fill = _scalar(operands[1])
        if fill is None:
            return None
        rest = [_fill(x, fill)]
    out = _compat.bind(eqn, [x.codes, *rest])
    return [dataclasses.replace(x, codes=codes) for codes in out]


def _turned(x: Accumulator, perm: Sequence[int]) -> Accumulator | None:
    """Transposes sums whose channels keep their order, so that a bias can still be added."""
    channels = [perm.index(a) for a in x.channels]
    if channels != sorted(channels):
        return None

    def turn(a: Array) -> Array:
        return jnp.transpose(a, perm) if a.ndim == len(perm) else a

    grid, bare = x.output, dataclasses.replace(x, output=None)
    return dataclasses.replace(jax.tree.map(turn, bare), output=grid, channels=tuple(channels))


def _fill(x: Activation, value: Array) -> Array:
    """The code of a padding value; the lowest code if it is below the grid (minus infinity)."""
    return dataclasses.replace(x, codes=jnp.int8(-128)).clamped(low=value).codes


def why(eqn: Any, operands: list[Value]) -> str:
    """Why integers end at an equation, for the report."""
    name, row = eqn.primitive.name, primitives.of(eqn)
    if row.kind == "contraction":
        return "a contraction that is not requantized takes floats"
    if row.kind == "control":
        return f"{name} takes floats"
    if row.integers == "affine" and sum(v.facts.live for v in operands) > 1:
        if name not in ("add", "add_any"):
            return f"{name} of two activations"
        both = all(is_integers(v.data) for v in operands)
        return "neither term is still a sum" if both else "the other term is float"
    if row.integers == "affine":
        if any(isinstance(v.data, Activation) for v in operands):
            return f"{name} after a clamp, a move or a sum, where results are codes already"
        return f"{name} with a value that varies along non-channel axes"
    if name == "concatenate":
        return "its operands are on different grids"
    return f"{name} has no integer form"
