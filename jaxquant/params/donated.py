"""Donated leaves: deleted as soon as they are quantized, to bound peak memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array

from jaxquant.encoders import Info, rtn
from jaxquant.params.leaf import encode_leaf, require_no_inputs
from jaxquant.params.plan import Plan, identity
from jaxquant.qtensor import QTensor
from jaxquant.report import shown


def wait_for(infos: Sequence[Info | None]) -> None:
    """Waits for the last encoded leaf, so that the next one does not run concurrently."""
    last = next((info for info in reversed(infos) if info is not None), None)
    if last is not None and not isinstance(last.error, jax.core.Tracer):
        jax.block_until_ready(last.error)


def rehearse(planned: Sequence[tuple[Plan, Any]], key: Array | None) -> None:
    """Encodes abstractly, so that encoders raise before an array is deleted.

    Raises:
      ValueError: as `encode_leaf`; an array is traced.
    """
    for plan, leaf in planned:
        if isinstance(leaf, jax.core.Tracer):
            raise ValueError(
                f"{shown(plan.path)}: donate=True deletes arrays, and this one is traced; under "
                "jax.jit use its own donate_argnums"
            )
        require_no_inputs(plan)
        abstract = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        encode_leaf(abstract, plan, plan.encoder or rtn(), key)


def last_uses(plans: Sequence[Plan], leaves: Sequence[tuple[str, Any]]) -> dict[Any, int]:
    """The index of the last leaf that quantizes each array; arrays kept by a leaf are left out."""
    kept, last = set(), dict[Any, int]()
    for n, (plan, (path, leaf)) in enumerate(zip(plans, leaves, strict=True)):
        array = identity(path, leaf)
        last[array] = n
        if plan.spec is None:
            kept.add(array)
    return {array: n for array, n in last.items() if array not in kept}


def consume(leaf: Any, made: Sequence[QTensor]) -> None:
    """Deletes a quantized array, unless a result contains the same array."""
    if not isinstance(leaf, jax.Array):
        return
    jax.block_until_ready(made)
    if not any(a is leaf for a in jax.tree.leaves(made)):
        leaf.delete()
