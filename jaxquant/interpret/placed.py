"""Shardings of a `QTensor`'s arrays, from and to that of the array that it stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from jaxquant.interpret import _compat
from jaxquant.qtensor import QTensor, with_plain_scales


def storage_spec(q: QTensor, spec: Sequence[Any], groups: bool) -> PartitionSpec:
    """Converts a partition of `q`'s axes to one of its codes (if `groups`, of its scales)."""
    nb = len(q.batch)
    full = tuple(spec) + (None,) * (q.ndim - len(spec))
    parts = list(full[:nb])
    for merged, count in zip(q.axes, q.groups, strict=True):
        part = full[nb + len(q.core) + merged[0]]
        parts.append(None if groups and count == 1 else part)
    return PartitionSpec(*parts)


def reshard(q: QTensor, sharding: Any, apply: Callable[[Any, Any], Any]) -> QTensor:
    """Applies a sharding of the array that `q` stands for to codes and scales."""
    if not isinstance(sharding, NamedSharding):
        return q
    q = with_plain_scales(q)

    def place(x: Any, groups: bool) -> Any:
        if x is None:
            return None
        return apply(x, NamedSharding(sharding.mesh, storage_spec(q, tuple(sharding.spec), groups)))

    return dataclasses.replace(
        q,
        codes=place(q.codes, False),
        scale=place(q.scale, True),
        zero_point=place(q.zero_point, True),
        codebook=place(q.codebook, True) if q.grouped_codebook else q.codebook,
    )


def sharding_of(q: QTensor) -> NamedSharding | None:
    """The sharding of the array that `q` stands for, where its mesh has explicit axes."""
    sharding = _compat.explicit_sharding(q.codes)
    if sharding is None:
        return None
    nb, spec = len(q.batch), tuple(sharding.spec)
    spec += (None,) * (q.codes.ndim - len(spec))
    parts: list[Any] = list(spec[:nb]) + [None] * len(q.core)
    for merged, part in zip(q.axes, spec[nb:], strict=True):
        parts[nb + len(q.core) + merged[0]] = part
    return NamedSharding(sharding.mesh, PartitionSpec(*parts))
