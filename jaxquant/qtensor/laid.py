"""How an array lies while it is encoded: in its own order, so that only codes are transposed."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxquant.numerics import pack
from jaxquant.qtensor.storage import blocked, spread, to_storage, unblocked
from jaxquant.qtensor.tensor import QTensor


class Laid(NamedTuple):
    """Where the axes of an array are while its values become codes.

    XLA's loops over a float array that is transposed and split in blocks take many times as long
    on a CPU as over the array as it lies (2048 x 2048, JAX 0.12: scales along columns 2.6 ms and
    24 ms), so it is encoded as it lies, and what is transposed is bytes.

    Attributes:
      blank: how the codes are stored, without arrays.
      own: the same with storage axes in the array's own order.
      order: where each storage axis lies among those of `own`.
      whole: whether scales belong to whole axes, so that none is split in groups.
    """

    blank: QTensor
    own: QTensor
    order: tuple[int, ...]
    whole: bool

    @property
    def moved(self) -> bool:
        """Whether codes are transposed to be stored."""
        return self.order != tuple(range(len(self.order)))

    @property
    def inner(self) -> tuple[int, ...]:
        """The axes of a laid out array that scales are shared over."""
        if not self.whole:
            return tuple(range(1, 2 * len(self.own.axes), 2))
        sizes = zip(self.own.groups, self.own.storage, strict=True)
        return tuple(a for a, (g, n) in enumerate(sizes) if g < n)

    def lay(self, w: Array) -> Array:
        """`[*core]` in float32, so that a scale is shared over the axes `inner`."""
        x = to_storage(self.own, w.astype(jnp.float32))
        return x if self.whole else blocked(self.own, x)

    def meet(self, s: Array) -> Array:
        """`[*groups]` as stored, laid out to broadcast with the array."""
        s = jnp.transpose(s, [self.order.index(a) for a in range(s.ndim)]) if self.moved else s
        return s if self.whole else spread(self.own, s)

    def groups(self, s: Array) -> Array:
        """Inverse of `meet`: what there is one of for each group, `[*groups]` as stored."""
        s = s.reshape(self.own.groups)
        return jnp.transpose(s, self.order) if self.moved else s

    def codes(self, codes: Array) -> Array:
        """Codes as they are stored: packed where the format is, and transposed."""
        codes = self.packed(codes)
        return jnp.transpose(codes, self.order) if self.moved else codes

    def packed(self, codes: Array) -> Array:
        """Codes as they are stored, but for the order of the axes."""
        codes = codes if self.whole else unblocked(self.own, codes)
        fmt = self.blank.spec.format
        if not self.moved:
            return pack(codes, fmt.bits) if fmt.packed else codes
        if fmt.packed:
            # packed first, as neighbours along another axis are next to each other in registers;
            # behind barriers, or one loop would do all of it, transposed
            codes = pack(lax.optimization_barrier(codes), fmt.bits, axis=self.order[-1])
        return lax.optimization_barrier(codes)

    def empty(self, x: Array) -> Array:
        """Which groups of a laid out array are zero throughout: `[*groups]` as stored."""
        return self.groups(jnp.max(jnp.abs(x), axis=self.inner, keepdims=True, initial=0.0) == 0)

    def cut_short(self) -> Array | None:
        """Which groups are padded, as `meet` lays them out; `None` where none is."""
        own = self.own
        if own.padded == own.storage:
            return None
        out = jnp.zeros((1,) * (2 * len(own.axes)), bool)
        for s, (have, want) in enumerate(zip(own.padded, own.storage, strict=True)):
            if have != want:
                last = jnp.arange(own.groups[s]) == own.groups[s] - 1
                out = out | jnp.expand_dims(last, [i for i in range(out.ndim) if i != 2 * s])
        return out


@functools.lru_cache(maxsize=1024)
def _own(axes: tuple[tuple[int, ...], ...]) -> tuple[int, ...] | None:
    """Storage axes in the order of the array's, if each is a run of neighbours; or `None`."""
    runs = all(b == a + 1 for merged in axes for a, b in itertools.pairwise(merged))
    return tuple(sorted(range(len(axes)), key=lambda s: axes[s])) if runs else None


def laid(blank: QTensor) -> Laid:
    """How arrays that are stored as `blank` are laid out to be encoded.

    >>> from jaxquant.qtensor.encode import storage_layout
    >>> from jaxquant.qtensor import PerGroup, QSpec
    >>> how = laid(storage_layout((6, 3), QSpec("int8", PerGroup(2, axis=0)), (), "float32"))
    >>> how.order, how.lay(jnp.ones((6, 3))).shape
    ((1, 0), (3, 2, 3, 1))
    """
    found = _own(blank.axes)
    if found is None:
        found = tuple(range(len(blank.axes)))
    own = dataclasses.replace(
        blank,
        axes=tuple(blank.axes[s] for s in found),
        blocks=tuple(blank.blocks[s] for s in found),
    )
    whole = all(
        g in (1, n) and n == p for g, n, p in zip(own.groups, own.storage, own.padded, strict=True)
    )
    return Laid(blank, own, tuple(found.index(s) for s in range(len(found))), whole)
