"""What the interpreter knows of a value besides its data: its origin and other facts."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.interpret import _compat, primitives
from jaxquant.qtensor import is_qtensor


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """The parameter that a value comes from by layout operations only.

    Attributes:
      path: the parameter's key path.
      shape: the parameter's whole shape.
      dtype: name of the parameter's dtype.
      axes: for each axis of the value, the parameter's axes it holds; `()` for a new one.
      scanned: axes of the parameter that the loops around it slice.
      joined: other parameters concatenated to this one, with the same axes.
      moved: whether any operation but an identity was applied.
      looked_up: whether the values are rows looked up in a table.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[tuple[int, ...], ...]
    scanned: tuple[int, ...] = ()
    joined: tuple[Origin, ...] = ()
    moved: bool = False
    looked_up: bool = False

    @property
    def parts(self) -> tuple[Origin, ...]:
        """All parameters in the value."""
        return (
            self,
            *(
                dataclasses.replace(other, axes=self.axes, scanned=self.scanned)
                for other in self.joined
            ),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a value statically.

    Attributes:
      origin: set while the value is a parameter, moved at most by layout operations.
      live: whether it depends on the function's inputs, not on parameters alone.
      nonneg: whether it cannot be negative (softmax, relu), so that unsigned codes fit it.
      near: scopes of the last sites that fed it; names contractions without a parameter.
      over: axes along which the value may vary; `None` is all.
    """

    origin: Origin | None = None
    live: bool = False
    nonneg: bool = False
    near: frozenset[str] = frozenset()
    over: frozenset[int] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """Data, which may be quantized, with its facts."""

    data: Any  # an array or a QTensor
    facts: Facts = Facts()

    @property
    def is_param(self) -> bool:
        """Whether this is a parameter moved by layout operations only."""
        return self.facts.origin is not None or is_qtensor(self.data)


def merge(facts: list[Facts], nonneg: bool = False) -> Facts:
    """Facts of a result computed from values with these facts."""
    near = frozenset().union(*(f.near for f in facts)) if facts else frozenset()
    return Facts(None, any(f.live for f in facts), nonneg, near)


def varying(value: Value) -> frozenset[int]:
    """The axes along which a value may vary."""
    shape = jnp.shape(value.data)
    if value.facts.over is not None:
        return value.facts.over
    return frozenset(a for a, n in enumerate(shape) if n != 1)


def varies(eqn: Any, operands: list[Value]) -> frozenset[int] | None:
    """The axes along which an equation's results may vary; `None` is all.

    Tracked from parameters on, so that a bias or a norm's scale is known as a vector after it has
    been broadcast.
    """
    if any(v.facts.live for v in operands) or len(eqn.outvars) != 1 or not operands:
        return None
    row, shape = primitives.of(eqn), tuple(eqn.outvars[0].aval.shape)
    axes, sizes = varying(operands[0]), tuple(jnp.shape(operands[0].data))
    if row.move == "broadcast":
        dims = eqn.params["broadcast_dimensions"]
        return frozenset(dims[a] for a in axes if sizes[a] != 1)
    if row.move == "transpose":
        return frozenset(eqn.params["permutation"].index(a) for a in axes)
    if row.move in ("reshape", "squeeze"):
        old = [a for a, n in enumerate(sizes) if n != 1]
        new = [a for a, n in enumerate(shape) if n != 1]
        if [sizes[a] for a in old] != [shape[a] for a in new]:
            return None
        return frozenset(new[old.index(a)] for a in axes if a in old)
    pointwise = row.kind == "elementwise" or row.move in ("none", "convert", "round")
    if pointwise and all(jnp.ndim(v.data) in (0, len(shape)) for v in operands):
        return frozenset().union(*(varying(v) for v in operands if jnp.shape(v.data)))
    return None


def nonneg(eqn: Any, operands: list[bool]) -> list[bool]:
    """Whether each result of an equation is certain not to be negative.

    `operands` say the same of its inputs (literals included). Conservative: `False` when unknown.
    """
    row, count = primitives.of(eqn), len(eqn.outvars)
    if row.kind == "call":
        return _nonneg_jaxpr(_compat.body(eqn)[0], operands)
    if row.sign is None:
        return list(operands) if len(operands) == count else [False] * count
    return [row.sign(eqn, operands)] * count


def _nonneg_jaxpr(jaxpr: Any, operands: list[bool]) -> list[bool]:
    env: dict[Any, bool] = dict(zip(jaxpr.invars, operands, strict=True))
    for eqn in jaxpr.eqns:
        results = nonneg(eqn, [known_nonneg(env, v) for v in eqn.invars])
        env.update(zip(eqn.outvars, results, strict=True))
    return [known_nonneg(env, v) for v in jaxpr.outvars]


def known_nonneg(env: dict[Any, bool], var: Any) -> bool:
    """The entry of a variable, or the sign of a literal."""
    if isinstance(var, _compat.Literal):
        try:
            return bool(np.all(var.val >= 0))
        except TypeError:
            return False
    return env.get(var, False)
