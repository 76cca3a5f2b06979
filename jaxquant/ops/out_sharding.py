"""The requested sharding of a contraction's result, and of partial sums."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Sharding:
    """The requested sharding of the batch axes, the free axes of `x` and the free axes of `w`."""

    mesh: Any
    batch: tuple[Any, ...]
    x: tuple[Any, ...]
    w: tuple[Any, ...]

    @classmethod
    def asked(cls, out_sharding: Any, batch: int, x: int, w: int) -> Sharding | None:
        """Splits an `out_sharding` by the numbers of batch axes and free axes of `x` and `w`."""
        if out_sharding is None:
            return None
        if isinstance(out_sharding, PartitionSpec):
            mesh, spec = None, out_sharding
        else:
            mesh, spec = out_sharding.mesh, out_sharding.spec
        entries = (*spec, *(None,) * (batch + x + w - len(spec)))
        return cls(mesh, entries[:batch], entries[batch : batch + x], entries[batch + x :])

    def of(self, groups: int) -> NamedSharding | PartitionSpec:
        """The sharding of `[batch, groups, free of x, free of w]`, groups not sharded."""
        spec = PartitionSpec(*self.batch, *(None,) * groups, *self.x, *self.w)
        return spec if self.mesh is None else NamedSharding(self.mesh, spec)

    def one_more(self) -> Sharding:
        """With a new first free axis of `x`, not sharded."""
        return dataclasses.replace(self, x=(None, *self.x))
