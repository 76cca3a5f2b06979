"""Encodes one leaf: its `QTensor`, its error, and the encoder's remarks."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from jaxquant.encoders import Encoder, Info
from jaxquant.observers import InputStats
from jaxquant.params.placement import automatic, derive
from jaxquant.params.plan import Plan
from jaxquant.qtensor import QTensor
from jaxquant.recipe import palette
from jaxquant.report import Found, shown


class Encoded(NamedTuple):
    """The result of encoding a leaf.

    Attributes:
      q: the quantized leaf.
      info: the encoder's error measures; `None` under a trace and for shapes.
      notes: remarks for the report.
    """

    q: QTensor
    info: Info | None
    notes: tuple[str | Found, ...] = ()


def require_no_inputs(plan: Plan) -> None:
    """Refuses a leaf whose encoder or rewrite needs input statistics.

    Raises:
      ValueError: it does.
    """
    if plan.gathers is not None:
        owner = plan.encoder if plan.rewrite is None else plan.rewrite
        raise ValueError(
            f"{shown(plan.path)}: {owner!r} needs statistics of the parameter's inputs, and there "
            "are none; use jaxquant.ptq(fn, params, recipe, batches=...)"
        )


def encode_leaf(
    leaf: Any, plan: Plan, encoder: Encoder, key: Array | None, stats: InputStats | None = None
) -> Encoded:
    """Quantizes one leaf and measures its error; the sharding is derived from the leaf's.

    Raises:
      ValueError: as the encoder, naming the leaf.
    """
    leaf_key = None if key is None else jax.random.fold_in(key, zlib.crc32(plan.path.encode()))

    def run(w: Array, k: Array | None, stats: InputStats | None) -> tuple[QTensor, Info]:
        assert plan.spec is not None
        inputs = {} if stats is None else {"stats": stats}
        return encoder(
            w,
            plan.spec,
            key=k,
            storage_last_axes=plan.storage_last_axes,
            batch_axes=plan.batch_axes,
            **inputs,
        )

    try:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return Encoded(_abstract(leaf, stats, lambda w, s: run(w, leaf_key, s)[0]), None)
        if isinstance(leaf, jax.core.Tracer):
            return Encoded(run(leaf, leaf_key, stats)[0], None)
        if isinstance(leaf, np.ndarray):
            leaf = jnp.asarray(leaf)
        with automatic(leaf) as w:
            q, info = run(w, leaf_key, stats)
        if isinstance(leaf.sharding, NamedSharding):
            q = jax.device_put(q, derive(leaf.sharding, leaf.shape, q))
        return Encoded(q, info, _notes(q, info, encoder))
    except ValueError as error:
        raise ValueError(f"{shown(plan.path)}: {error}") from error


def _abstract(leaf: jax.ShapeDtypeStruct, stats: InputStats | None, run: Any) -> QTensor:
    q: QTensor = jax.eval_shape(run, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stats)
    if not isinstance(leaf.sharding, NamedSharding):
        return q
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        q,
        derive(leaf.sharding, leaf.shape, q),
    )


def _notes(q: QTensor, info: Info, encoder: Encoder) -> tuple[str | Found, ...]:
    """Remarks of the encoder, and a better encoder where there is one."""
    notes, fmt = encoder.notes(info.details or {}), q.spec.format
    if q.codebook is None and fmt.is_codebook and fmt == palette(fmt.bits).format:
        return (*notes, "rounded to evenly spaced values: the encoder kmeans() finds better ones")
    return notes
