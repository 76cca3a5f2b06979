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
    """Facts that ride along with the residuals."""

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
    """A pytree of QTensors as it is, that refuses to be differentiated."""
    return q


def _constant_fwd(q: Any) -> tuple[Any, None]:
    _refuse(q)
    return _values(q), None


def _constant_bwd(_: None, __: Any) -> tuple[None]:
    return (None,)


constant.defvjp(_constant_fwd, _constant_bwd, symbolic_zeros=True)


@jax.custom_vjp
def inference_only(x: Array) -> Array:
    """An array as it is, that refuses to be differentiated: integers have no gradient."""
    return x


def _inference_only_fwd(x: Any) -> tuple[Array, None]:
    if x.perturbed:
        raise TypeError(
            "what is computed in integers throughout has no gradient; use a recipe without "
            "requantize, whose contractions pass gradients straight through"
        )
    return x.value, None


inference_only.defvjp(_inference_only_fwd, _constant_bwd, symbolic_zeros=True)


def straight_through(
    forward: Callable[[Array, QTensor], Array], reference: Callable[[Array, Array], Array]
) -> Callable[[Array, QTensor], Array]:
    """`forward(x, q)` with the gradient in `x` of `reference(x, dequantize(q))`, linear in `x`.

    `dx = reference(., dequantize(q))^T g`. What is kept for the backward pass is the codes.
    Asking for the gradient of `q` raises `TypeError`.
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

    def bwd(kept: Any, g: Any) -> tuple[Any, None]:
        q, like = kept[0], kept[1].like
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

    `da = reference(., b')^T g`, `db = reference(a', .)^T g`, where `a'` and `b'` are what
    `prepare` made of `a` and `b`: arrays, or operands that are kept as codes.
    """

    @jax.custom_vjp
    def op(a: Array, b: Array) -> Array:
        return product(*prepare(a, b))

    def fwd(a: Array, b: Array) -> tuple[Array, Any]:
        ready = prepare(a, b)
        return product(*ready), (*ready, _Static(a.dtype), _Static(b.dtype))

    def bwd(kept: Any, g: Array) -> tuple[Array, Array]:
        a, b = (
            v.astype(d.like) if isinstance(v, Array) else dequantized(v).astype(d.like)
            for v, d in zip(kept[:2], kept[2:], strict=True)
        )
        return jax.vjp(reference, a, b)[1](g)

    op.defvjp(fwd, bwd)
    return op
