"""The sharding asked of a contraction's result, and of what it is made from."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Sharding:
    """The sharding asked of a result: of its batch axes, those free in `x`, those free in `w`."""

    mesh: Any
    batch: tuple[Any, ...]
    x: tuple[Any, ...]
    w: tuple[Any, ...]

    @classmethod
    def asked(cls, wanted: Any, batch: int, x: int, w: int) -> Sharding | None:
        """An `out_sharding` for a result of so many batch axes, axes free in `x`, in `w`."""
        if wanted is None:
            return None
        bare = isinstance(wanted, PartitionSpec)
        mesh, spec = (None, wanted) if bare else (wanted.mesh, wanted.spec)
        entries = (*spec, *(None,) * (batch + x + w - len(spec)))
        return cls(mesh, entries[:batch], entries[batch : batch + x], entries[batch + x :])

    def of(self, groups: int) -> NamedSharding | PartitionSpec:
        """For `[batch, groups, free of x, free of w]`."""
        spec = PartitionSpec(*self.batch, *(None,) * groups, *self.x, *self.w)
        return spec if self.mesh is None else NamedSharding(self.mesh, spec)

    def one_more(self) -> Sharding:
        """With a new first free axis of `x`."""
        return dataclasses.replace(self, x=(None, *self.x))
