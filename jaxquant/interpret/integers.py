"""What becomes of integer activations between contractions: which operations keep them integers."""

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
    """The equation on integers, `None` where it has no integer form here."""
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
    """Sums of a contraction and a vector over its channels that no input changes."""
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
    what = f"{name}{'' if first else ' from'} {_named(other)}"
    if name in ("mul", "neg"):
        return [x.scaled(vector, what)]
    if name == "div":
        return [x.scaled(1.0 / vector, what)]
    if name == "sub" and not first:
        return [x.scaled(jnp.float32(-1.0), what).shifted(vector, what)]
    return [x.shifted(-vector if name == "sub" else vector, what)]


def _named(value: Value) -> str:
    """What tells one vector from another: a parameter's path, a constant's value."""
    if value.facts.origin is not None:
        return value.facts.origin.path
    if not isinstance(value.data, jax.core.Tracer) and jnp.ndim(value.data) == 0:
        return str(float(value.data))
    return "a vector"


def _channel_vector(x: Accumulator, value: Value) -> Array | None:
    """A value that varies over the channels of `x` only, of size 1 elsewhere, in float32."""
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
    # what is traced may be differentiated; what is known may be folded beforehand
    return inference_only(data) if isinstance(data, jax.core.Tracer) else data


def _codes(x: Any) -> Activation | None:
    """The activation itself, once nothing more will be added to its sums."""
    return x.activation() if isinstance(x, Accumulator) else x


def _clamped(eqn: Any, operands: list[Value]) -> list[Any] | None:
    """Clipped between scalars; or the larger of two activations on one grid."""
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
    on = [x for x in map(_codes, data) if x is not None]
    if len(on) < len(data) or not all(x.grid.same(on[0].grid) for x in on):
        return None
    codes = _compat.bind(eqn, [x.codes for x in on])[0]
    source = tuple(dict.fromkeys(key for x in on for key in x.source))
    also = tuple(dict.fromkeys(key for x in on for key in x.added))
    return [dataclasses.replace(on[0], codes=codes, source=source, added=also)]


def _scalar(value: Value) -> Array | None:
    """A bound that is the same everywhere."""
    data = value.data
    if value.facts.live or not hasattr(data, "ndim") or is_integers(data):
        return jnp.float32(data) if isinstance(data, (int, float)) else None
    if data.ndim and varying(value):
        return None
    return jnp.ravel(data)[0] if data.ndim else data


def _moved(eqn: Any, operands: list[Value]) -> list[Any] | None:
    """Layout operations and the larger of neighbours, done on the codes."""
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
    """Sums with their axes permuted, where channels keep their order: a bias may yet come."""
    channels = [perm.index(a) for a in x.channels]
    if channels != sorted(channels):
        return None

    def turn(a: Array) -> Array:
        return jnp.transpose(a, perm) if a.ndim == len(perm) else a

    grid, bare = x.output, dataclasses.replace(x, output=None)
    return dataclasses.replace(jax.tree.map(turn, bare), output=grid, channels=tuple(channels))


def _fill(x: Activation, value: Array) -> Array:
    """The code that a padding value has; below the grid (minus infinity) it is the lowest one."""
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
        return "neither term is a sum yet" if both else "the other term is float"
    if row.integers == "affine":
        if any(isinstance(v.data, Activation) for v in operands):
            return f"{name} after a clamp, a move or a sum, where results are codes already"
        return f"{name} by what varies along other axes than the channels"
    if name == "concatenate":
        return "what it joins is not on one grid"
    return f"{name} has no integer form"
