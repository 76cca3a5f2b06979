"""Trees with quantized leaves: dequantize, and split into trainable and quantized leaves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.interpret.sites import path_str
from jaxquant.params.placement import automatic, restore
from jaxquant.qtensor import QTensor, dequantize, is_qtensor


def dequantize_params(qparams: Any) -> Any:
    """The tree with every `QTensor` replaced by its dequantized array.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> rule = jq.Rule("**", weights=jq.QSpec("int8", jq.PerTensor(), range="qmax"))
    >>> qparams, _ = jq.quantize_params({"w": jnp.array([-127.0, 5.0])}, rule)
    >>> jq.dequantize_params(qparams)["w"].tolist()
    [-127.0, 5.0]
    """
    return jax.tree.map(
        lambda x: _dequantize(x) if is_qtensor(x) else x, qparams, is_leaf=is_qtensor
    )


def _dequantize(q: QTensor) -> Any:
    if isinstance(q.codes, jax.ShapeDtypeStruct):
        return jax.eval_shape(dequantize, q)
    with automatic(q) as placed:
        w = dequantize(placed)
    return w if isinstance(w, jax.core.Tracer) else restore(w, q)


def partition(qparams: Any) -> tuple[Any, Any]:
    """Splits a tree into trainable leaves and all others.

    Both trees have the structure of `qparams`, with `None` where the other tree has the leaf.
    Float and complex arrays can be trained; `QTensor`s, integers and PRNG keys cannot. `None` is
    an empty subtree to JAX, so the first tree is what `jax.grad` and optax take:

    >>> import jax, jax.numpy as jnp, jaxquant as jq
    >>> rule = jq.Rule("w", weights=jq.QSpec("int8", jq.PerChannel(1)))
    >>> qparams, _ = jq.quantize_params({"w": jnp.ones((4, 2)), "b": jnp.zeros(2)}, rule)
    >>> trainable, quantized = jq.partition(qparams)
    >>> def loss(trainable, x):
    ...     p = jq.dequantize_params(jq.combine(trainable, quantized))
    ...     return jnp.sum(x @ p["w"] + p["b"][None])
    >>> jax.grad(loss)(trainable, jnp.ones((3, 4)))
    {'b': Array([3., 3.], dtype=float32), 'w': None}
    """
    trainable = jax.tree.map(lambda x: x if _trainable(x) else None, qparams, is_leaf=is_qtensor)
    rest = jax.tree.map(lambda x: None if _trainable(x) else x, qparams, is_leaf=is_qtensor)
    return trainable, rest


def combine(trainable: Any, quantized: Any) -> Any:
    """Undoes `partition`: each leaf from the tree that has it.

    Raises:
      ValueError: the trees differ in structure, or both have a leaf.
    """

    def pick(path: tuple[Any, ...], a: Any, b: Any) -> Any:
        if a is not None and b is not None:
            raise ValueError(f"{path_str(path)}: both trees have this leaf, expected only one")
        return b if a is None else a

    return jax.tree.map_with_path(
        pick, trainable, quantized, is_leaf=lambda x: x is None or is_qtensor(x)
    )


def _trainable(x: Any) -> bool:
    if is_qtensor(x) or not hasattr(x, "dtype"):
        return isinstance(x, (float, complex)) and not isinstance(x, bool)
    return jnp.issubdtype(x.dtype, jnp.inexact)
