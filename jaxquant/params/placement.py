"""Shardings of a `QTensor`'s arrays, derived from that of the weight."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxquant.qtensor import QTensor

Entry = tuple[str, ...]


def derive(sharding: NamedSharding, shape: tuple[int, ...], q: QTensor) -> QTensor:
    """A `QTensor` of shardings for `q`, which was made from an array of `shape`.

    Codes are sharded as the weight is. Scales are sharded along the axes they share with it; axes
    of size 1, and axes whose size the mesh does not divide, are not sharded.
    """
    spec = tuple(sharding.spec) + (None,) * (len(shape) - len(sharding.spec))
    entries = [_entry(e) for e in spec]
    batch, rank = entries[: len(q.batch)], len(shape)
    storage = [sum((entries[a % rank] for a in merged), ()) for merged in q.axes]

    def place(array: Any) -> NamedSharding | None:
        if array is None:
            return None
        # after the batch axes, a codebook or a global scale may have other axes than the codes
        if array is q.codebook:
            along_codes = q.grouped_codebook
        else:
            along_codes = len(array.shape) == len(q.batch) + len(q.axes)
        wanted = batch + (storage if along_codes else [])
        wanted += [()] * (len(array.shape) - len(wanted))
        fitted = [_fit(e, n, sharding.mesh) for e, n in zip(wanted, array.shape, strict=True)]
        return NamedSharding(sharding.mesh, PartitionSpec(*fitted))

    names = ("codes", "scale", "zero_point", "codebook", "global_scale")
    placed: dict[str, Any] = {name: place(getattr(q, name)) for name in names}
    if q.nested is not None:  # blocks of scales run across all axes of a core array
        storage = [()] * len(q.axes)
        placed["scale"] = place(q.scale)
        placed["nested"] = jax.tree.map(place, q.nested)
    return dataclasses.replace(q, **placed)


def _entry(entry: Any) -> Entry:
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _fit(entry: Entry, size: int, mesh: Any) -> Entry | None:
    """The longest prefix of the mesh axes whose size divides `size`."""
    while entry and (size <= 1 or size % math.prod(mesh.shape[name] for name in entry)):
        entry = entry[:-1]
    return entry or None


@contextlib.contextmanager
def automatic(tree: Any) -> Iterator[Any]:
    """The same arrays on a mesh with automatic axes, set as the mesh within the context.

    With explicit axes every reshape of a sharded axis must name the sharding of its result; with
    automatic ones the compiler infers it. No data moves. `restore` undoes it for results.
    """
    mesh = _explicit_mesh(tree)
    if mesh is None:
        yield tree
        return
    axis_types = (AxisType.Auto,) * len(mesh.axis_names)
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=axis_types)

    def move(x: Any) -> Any:
        named = isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding)
        return jax.device_put(x, NamedSharding(auto, x.sharding.spec)) if named else x

    with jax.set_mesh(auto):
        yield jax.tree.map(move, tree)


def restore(x: jax.Array, tree: Any) -> jax.Array:
    """An array computed within `automatic(tree)`, back on the mesh of `tree`; no data moves."""
    mesh = _explicit_mesh(tree)
    if mesh is None or not isinstance(x.sharding, NamedSharding):
        return x
    return jax.device_put(x, NamedSharding(mesh, x.sharding.spec))


def _explicit_mesh(tree: Any) -> Mesh | None:
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
            mesh = x.sharding.mesh if isinstance(x.sharding, NamedSharding) else None
            if isinstance(mesh, Mesh) and AxisType.Explicit in mesh.axis_types:
                return mesh
    return None
