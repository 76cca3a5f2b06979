"""The static part of one `dot_general` call, and where the axes of its result go."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.ops.operands import Operand, Placement, result_dtype
from jaxquant.ops.out_sharding import Sharding
from jaxquant.qtensor import Outliers, QSpec, QTensor

Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of one call, with `x` the float operand and `w` the quantized one."""

    x_contract: Axes
    w_contract: Axes
    x_batch: Axes
    w_batch: Axes
    flipped: bool  # whether `w` is the left operand
    precision: Any
    preferred: Any
    out_sharding: Any
    activations: QSpec | None
    calibrated: bool = True  # whether the spec goes with the grid that the QTensor carries
    outliers: Outliers | None = None  # which columns of `x` stay in float

    def reference(self, x: Array, w: Array) -> Array:
        """The contraction in float."""
        if self.flipped:
            contracted, batch = (self.w_contract, self.x_contract), (self.w_batch, self.x_batch)
        else:
            contracted, batch = (self.x_contract, self.w_contract), (self.x_batch, self.w_batch)
        return lax.dot_general(
            *((w, x) if self.flipped else (x, w)),
            (contracted, batch),
            precision=self.precision,
            preferred_element_type=self.preferred,
            out_sharding=self.out_sharding,
        )


def sharding_of(call: Call, moved: Operand, at: Placement) -> Sharding | None:
    """The sharding asked for, in the order `[batch, free of x, kept storage axes]`."""
    free, kept = len(moved.free), len(at.keep)
    first, second = (kept, free) if call.flipped else (free, kept)
    asked = Sharding.asked(call.out_sharding, len(moved.batch), first, second)
    if asked is None:
        return None
    of_x, of_w = (asked.w, asked.x) if call.flipped else (asked.x, asked.w)
    axes = [at.members[s][0] for s in at.keep]
    in_storage = tuple(of_w[sorted(axes).index(a)] for a in axes)
    return Sharding(asked.mesh, asked.batch, of_x, in_storage)


def finish(call: Call, x: Array, q: QTensor, at: Placement, out: Array) -> Array:
    """Unpads and splits the kept storage axes, and puts all axes in the result's order."""
    lead = out.ndim - len(at.keep)
    for i, s in enumerate(at.keep):
        if at.padded[s] != at.size[s]:
            out = lax.slice_in_dim(out, 0, at.size[s], axis=lead + i)
    kept = [a for s in at.keep for a in at.members[s]]
    if len(kept) != len(at.keep):
        out = out.reshape(*out.shape[:lead], *(q.shape[a] for a in kept))
    nb = len(call.x_batch)
    tail = [lead + kept.index(a) for a in sorted(kept)]
    middle = list(range(nb, lead))
    order = [*range(nb), *(tail + middle if call.flipped else middle + tail)]
    out = jnp.transpose(out, order).astype(result_dtype(x.dtype, q.dtype, call.preferred))
    # scales that are sharded along kept axes spread their sharding to what they multiply
    return out if call.out_sharding is None else jax.sharding.reshard(out, call.out_sharding)
