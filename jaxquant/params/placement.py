"""Where the arrays of a `QTensor` live, derived from where the weight lives."""

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

    Codes are laid out as the weight is. Scales follow where they have an axis to follow with;
    axes of size 1, and those that the mesh does not divide, are not split.
    """
    spec = tuple(sharding.spec) + (None,) * (len(shape) - len(sharding.spec))
    entries = [_entry(e) for e in spec]
    batch, rank = entries[: len(q.batch)], len(shape)
    storage = [sum((entries[a % rank] for a in merged), ()) for merged in q.axes]

    def place(array: Any) -> NamedSharding | None:
        if array is None:
            return None
        # a codebook or a global scale has other axes after the batch than the codes have
        own = len(array.shape) == len(q.batch) + len(q.axes) and array is not q.codebook
        wanted = batch + (storage if own else [()] * (len(array.shape) - len(q.batch)))
        fitted = [_fit(e, n, sharding.mesh) for e, n in zip(wanted, array.shape, strict=True)]
        return NamedSharding(sharding.mesh, PartitionSpec(*fitted))

    fields = ("codes", "scale", "zero_point", "codebook", "global_scale")
    return dataclasses.replace(q, **{name: place(getattr(q, name)) for name in fields})


def _entry(entry: Any) -> Entry:
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _fit(entry: Entry, size: int, mesh: Any) -> Entry | None:
    """The mesh axes that divide `size`, the later ones given up first."""
    while entry and (size <= 1 or size % math.prod(mesh.shape[name] for name in entry)):
        entry = entry[:-1]
    return entry or None


@contextlib.contextmanager
def automatic(w: jax.Array) -> Iterator[jax.Array]:
    """The same array with a mesh whose axes are automatic, current within the context.

    With explicit axes every reshape of a split axis must say how its result is split; here the
    compiler may find out. No data moves.
    """
    sharding = w.sharding
    explicit = isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types
    if not explicit or not isinstance(sharding.mesh, Mesh):
        yield w
        return
    mesh = Mesh(
        sharding.mesh.devices,
        sharding.mesh.axis_names,
        axis_types=(AxisType.Auto,) * len(sharding.mesh.axis_names),
    )
    with jax.set_mesh(mesh):
        yield jax.device_put(w, NamedSharding(mesh, sharding.spec))
