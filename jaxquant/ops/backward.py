"""Straight-through gradients: those of the contraction with the dequantized operand."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jaxquant.ops.contract import dequantized
from jaxquant.qtensor import QTensor, dequantize


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("like",))
@dataclasses.dataclass(frozen=True)
class _Static:
    """A static value among the residuals."""

    like: Any


def _values(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.value, tree)


def _refuse(q: Any) -> None:
    if any(leaf.perturbed for leaf in jax.tree.leaves(q)):
        raise TypeError(
            "a QTensor is not differentiable: its codes are integers. Differentiate with respect "
            "to the float leaves only; `jaxquant.partition` splits them from the quantized ones"
        )


@jax.custom_vjp
def constant(q: Any) -> Any:
    """The identity on a pytree of QTensors; differentiating it raises `TypeError`."""
    return q


def _constant_fwd(q: Any) -> tuple[Any, None]:
    _refuse(q)
    return _values(q), None


def _constant_bwd(_: None, __: Any) -> tuple[None]:
    return (None,)


constant.defvjp(_constant_fwd, _constant_bwd, symbolic_zeros=True)


@jax.custom_vjp
def inference_only(x: Array) -> Array:
    """The identity on an array computed in integers; differentiating it raises `TypeError`."""
    return x


def _inference_only_fwd(x: Any) -> tuple[Array, None]:
    if x.perturbed:
        raise TypeError(
            "activations that stay integers between contractions have no gradient; use a recipe "
            "without requantize, whose contractions pass gradients straight through"
        )
    return x.value, None


inference_only.defvjp(_inference_only_fwd, _constant_bwd, symbolic_zeros=True)


def straight_through(
    forward: Callable[[Array, QTensor], Array], reference: Callable[[Array, Array], Array]
) -> Callable[[Array, QTensor], Array]:
    """`forward(x, q)` with the gradient in `x` of `reference(x, dequantize(q))`, linear in `x`.

    `dx = reference(., dequantize(q))^T g`. The residuals are the codes. Differentiating with
    respect to `q` raises `TypeError`.
    """

    @jax.custom_vjp
    def op(x: Array, q: QTensor) -> Array:
        return forward(x, q)

    def fwd(x: Any, q: Any) -> tuple[Array, Any]:
        _refuse(q)
        q = _values(q)
        aval = jax.typeof(x.value)
        like = jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=_explicit(aval))
        return forward(x.value, q), (q, _Static(like))

    def bwd(residuals: Any, g: Any) -> tuple[Any, None]:
        q, like = residuals[0], residuals[1].like
        if isinstance(g, SymbolicZero):
            return jnp.zeros(like.shape, like.dtype), None
        w = dequantize(q)
        (dx,) = jax.linear_transpose(lambda x: reference(x, w), like)(g)
        return dx, None

    op.defvjp(fwd, bwd, symbolic_zeros=True)
    return op


def _explicit(aval: Any) -> Any:
    """The sharding of an aval under an explicit mesh, else `None`."""
    sharding = getattr(aval, "sharding", None)
    return None if sharding is None or sharding.mesh.empty else sharding


def straight_through_both(
    prepare: Callable[[Array, Array], tuple[Any, Any]],
    product: Callable[[Any, Any], Array],
    reference: Callable[[Array, Array], Array],
) -> Callable[[Array, Array], Array]:
    """`product(*prepare(a, b))` with the gradients of `reference` at the rounded operands.

    `da = reference(., b')^T g`, `db = reference(a', .)^T g`, with `a', b' = prepare(a, b)`: arrays,
    or operands, whose residuals are codes.
    """

    @jax.custom_vjp
    def op(a: Array, b: Array) -> Array:
        return product(*prepare(a, b))

    def fwd(a: Array, b: Array) -> tuple[Array, Any]:
        ready = prepare(a, b)
        return product(*ready), (*ready, _Static(a.dtype), _Static(b.dtype))

    def bwd(residuals: Any, g: Array) -> tuple[Array, Array]:
        a, b = (
            v.astype(d.like) if isinstance(v, Array) else dequantized(v).astype(d.like)
            for v, d in zip(residuals[:2], residuals[2:], strict=True)
        )
        return jax.vjp(reference, a, b)[1](g)

    op.defvjp(fwd, bwd)
    return op
