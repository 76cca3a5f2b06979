"""The layout an array is encoded in: axes in array order, so that only codes are transposed."""

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
    """The order and blocks of an array's axes while it is encoded.

    On a CPU, XLA's loops over a float array that is transposed and split into blocks take many
    times as long as in array order (2048 x 2048, JAX 0.12, scales along columns: 24 ms against
    2.6 ms), so values are encoded in array order and only the codes are transposed.

    Attributes:
      blank: how the codes are stored, without arrays.
      own: the same with storage axes in array order.
      order: for each storage axis, its position in `own`.
      whole: whether no axis is split into groups: each has one scale or a scale for every index.
    """

    blank: QTensor
    own: QTensor
    order: tuple[int, ...]
    whole: bool

    @property
    def moved(self) -> bool:
        """Whether storing transposes the codes."""
        return self.order != tuple(range(len(self.order)))

    @property
    def inner(self) -> tuple[int, ...]:
        """The axes of `lay`'s result that scales are shared over."""
        if not self.whole:
            return tuple(range(1, 2 * len(self.own.axes), 2))
        sizes = zip(self.own.groups, self.own.storage, strict=True)
        return tuple(a for a, (g, n) in enumerate(sizes) if g < n)

    def lay(self, w: Array) -> Array:
        """`[*core]` in float32, split so that each scale is shared over the axes `inner`."""
        x = to_storage(self.own, w.astype(jnp.float32))
        return x if self.whole else blocked(self.own, x)

    def meet(self, s: Array) -> Array:
        """`[*groups]` in storage order, reshaped to broadcast with `lay`'s result."""
        s = jnp.transpose(s, [self.order.index(a) for a in range(s.ndim)]) if self.moved else s
        return s if self.whole else spread(self.own, s)

    def groups(self, s: Array) -> Array:
        """Inverse of `meet`: one value for each group, `[*groups]` in storage order."""
        s = s.reshape(self.own.groups)
        return jnp.transpose(s, self.order) if self.moved else s

    def codes(self, codes: Array) -> Array:
        """Codes as stored: packed where the format is, and transposed."""
        codes = self.packed(codes)
        return jnp.transpose(codes, self.order) if self.moved else codes

    def packed(self, codes: Array) -> Array:
        """Codes as stored, except that the axes are in array order."""
        codes = codes if self.whole else unblocked(self.own, codes)
        fmt = self.blank.spec.format
        if not self.moved:
            return pack(codes, fmt.bits) if fmt.packed else codes
        if fmt.packed:
            # packed before the transpose, where rows that share bytes are read as vectors;
            # barriers keep XLA from fusing all of it into one transposed loop
            codes = pack(lax.optimization_barrier(codes), fmt.bits, axis=self.order[-1])
        return lax.optimization_barrier(codes)

    def empty(self, x: Array) -> Array:
        """Which groups of `lay`'s result are all zero: `[*groups]` in storage order."""
        return self.groups(jnp.max(jnp.abs(x), axis=self.inner, keepdims=True, initial=0.0) == 0)

    def cut_short(self) -> Array | None:
        """Which groups are padded, in the shape of `meet`'s result; `None` where none is."""
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
    """Storage axes in array order; `None` unless each merges only adjacent array axes."""
    runs = all(b == a + 1 for merged in axes for a, b in itertools.pairwise(merged))
    return tuple(sorted(range(len(axes)), key=lambda s: axes[s])) if runs else None


def laid(blank: QTensor) -> Laid:
    """The layout in which arrays stored as `blank` are encoded.

    >>> from jaxquant.qtensor.encode import storage_layout
    >>> from jaxquant.qtensor import PerGroup, QSpec
    >>> how = laid(storage_layout((6, 3), QSpec("int8", PerGroup(2, axis=0)), (), "float32"))
    >>> how.order, how.lay(jnp.ones((6, 3))).shape
    ((1, 0), (3, 2, 3, 1))
    """
    order = _own(blank.axes)
    if order is None:
        order = tuple(range(len(blank.axes)))
    own = dataclasses.replace(
        blank,
        axes=tuple(blank.axes[s] for s in order),
        blocks=tuple(blank.blocks[s] for s in order),
    )
    whole = all(
        g in (1, n) and n == p for g, n, p in zip(own.groups, own.storage, own.padded, strict=True)
    )
    return Laid(blank, own, tuple(order.index(s) for s in range(len(order))), whole)
