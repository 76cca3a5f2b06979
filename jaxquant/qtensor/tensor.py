"""`QTensor`, the quantized array as a pytree."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxquant.numerics import packed_bytes
from jaxquant.qtensor.calibration import Calibration
from jaxquant.qtensor.nested import BLOCK, Nested
from jaxquant.qtensor.outliers import Outliers
from jaxquant.qtensor.qspec import QSpec


@dataclasses.dataclass(frozen=True)
class ContractionConfig:
    """How contractions use a quantized parameter: what the recipe sets for the other operand.

    Attributes:
      activations: spec that the other operand is quantized to at run time; `None` keeps it float.
      attention: pattern and spec (`None` to skip) of each recipe rule that sets `attention` or
        `skip`, in order, so that contractions without a parameter find theirs.
      requantize: how integer results become the next layer's input, see `Rule`; `None` makes them
        float.
      outliers: which columns of the other operand stay in float; `None` quantizes all.
    """

    activations: QSpec | None = None
    attention: tuple[tuple[Any, QSpec | None], ...] = ()
    requantize: str | None = None
    outliers: Outliers | None = None


DATA = ("codes", "scale", "zero_point", "codebook", "global_scale", "calibration", "nested")
META = ("spec", "core", "axes", "blocks", "dtype", "contraction")


@functools.partial(jax.tree_util.register_dataclass, data_fields=DATA, meta_fields=META)
@dataclasses.dataclass(frozen=True)
class QTensor:
    """An array stored as codes and scales: `r = S (q - Z)`, or `r = S codebook[q]`.

    A pytree: its arrays are leaves and everything else is static, describing the trailing *core*
    axes only, by negative index. Any number of leading batch axes may precede them, and every leaf
    has all of these, so that `jax.tree.map(lambda a: a[0], q)` is the first layer of a stacked
    tensor and `scan`, `vmap`, sharding and checkpoints work without special cases.
    The constructor does not validate, since tree operations pass placeholders; see `validate`.

    Attributes:
      codes: `[*batch, *storage]`; sub-byte formats are packed along the last axis as uint8.
      scale: `[*batch, *groups]`, one per block of `blocks[s]` indices of each storage axis `s`;
        uint8 codes if scales are quantized, see `nested` (`storage_scale` decodes).
      zero_point: `[*batch, *groups]`, in the codes' integer dtype or the spec's `zero_dtype`;
        `None` where `Z = 0`.
      codebook: float32 `[*batch, levels]`, a learned codebook, or `[*batch, *groups, levels]`, one
        for each group; `None` where the format has a fixed one, or none.
      global_scale: `[*batch]` float32, multiplies `scale`; `None` where there is none.
      spec: the `QSpec` it was encoded with.
      core: sizes of the core axes in array order.
      axes: for each storage axis, the core axes (negative) flattened into it.
      blocks: for each storage axis, how many indices share one scale.
      dtype: name of the dtype that `dequantize` returns.
      contraction: how contractions treat the other operand.
      calibration: their static calibration; `None` where activations are quantized dynamically.
      nested: scales and offset of quantized scales; `None` where scales are floats.
    """

    codes: Array
    scale: Array
    zero_point: Array | None
    codebook: Array | None
    global_scale: Array | None
    spec: QSpec
    core: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    blocks: tuple[int, ...]
    dtype: str
    contraction: ContractionConfig = ContractionConfig()
    calibration: Calibration | None = None
    nested: Nested | None = None

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the leading batch axes."""
        return tuple(self.codes.shape[: len(self.codes.shape) - len(self.axes)])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantized array."""
        return self.batch + self.core

    @property
    def ndim(self) -> int:
        """Rank of the dequantized array."""
        return len(self.codes.shape) - len(self.axes) + len(self.core)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales, zero points, codebooks and calibration."""
        return sum(a.size * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per value, scales included."""
        return 8.0 * self.nbytes / self.size if self.size else 0.0

    @property
    def storage(self) -> tuple[int, ...]:
        """Sizes of the storage axes before padding and packing."""
        return tuple(math.prod(self.core[a] for a in merged) for merged in self.axes)

    @property
    def padded(self) -> tuple[int, ...]:
        """Sizes of the storage axes, padded so that blocks are full."""
        return tuple(-(-n // b) * b for n, b in zip(self.storage, self.blocks, strict=True))

    @property
    def groups(self) -> tuple[int, ...]:
        """Number of scales along each storage axis."""
        return tuple(-(-n // b) for n, b in zip(self.storage, self.blocks, strict=True))

    @property
    def grouped_codebook(self) -> bool:
        """Whether there is a learned codebook for each group, not one for the whole array."""
        if self.codebook is None or not self.axes:
            return False
        return len(self.codebook.shape) == len(self.codes.shape) + 1

    def __repr__(self) -> str:
        # tree functions replace arrays by any object, and print the result
        def show(x: Any) -> str:
            if not (hasattr(x, "shape") and hasattr(x, "dtype")):
                return repr(x)
            return f"{jnp.dtype(x.dtype).name}{list(x.shape)}"

        shape = list(self.shape) if hasattr(self.codes, "shape") else f"[..., {list(self.core)}]"
        return (
            f"QTensor({self.spec.format.name}{shape} for {self.dtype}, "
            f"codes={show(self.codes)}, scale={show(self.scale)})"
        )

    def validate(self) -> QTensor:
        """Returns itself if arrays and static data agree.

        Raises:
          ValueError: a shape or dtype differs from the expected one, or `nested` from the spec.
        """
        fmt, batch = self.spec.format, self.batch
        last = self.padded[-1:] if self.axes else ()
        if fmt.packed and self.axes:
            last = (packed_bytes(self.padded[-1], fmt.bits),)
        want: dict[str, tuple[tuple[int, ...], Any]] = {
            "codes": (batch + self.padded[:-1] + last, np.uint8 if fmt.packed else fmt.storage),
            "scale": (batch + self.groups, self.spec.scale_dtype),
        }
        if (self.nested is not None) != self.spec.double:
            raise ValueError(
                f"QTensor.nested: expected {'one' if self.spec.double else 'none'} by {self.spec!r}"
            )
        if self.nested is not None:
            want["scale"] = (batch + self.groups, np.uint8)
            want["nested.scale"] = ((*batch, -(-math.prod(self.groups) // BLOCK)), np.float32)
            want["nested.offset"] = (batch, np.float32)
        if self.zero_point is not None:
            want["zero_point"] = (batch + self.groups, self.spec.zero_dtype or fmt.storage)
        if self.global_scale is not None:
            want["global_scale"] = (batch, np.float32)
        if self.codebook is not None:
            groups = self.groups if self.grouped_codebook else ()
            levels = 2**fmt.bits if fmt.codebook is None else len(fmt.codebook)
            want["codebook"] = ((*batch, *groups, levels), np.float32)
        for name, (shape, dtype) in want.items():
            got = operator.attrgetter(name)(self)
            if tuple(got.shape) != shape or jnp.dtype(got.dtype) != jnp.dtype(dtype):
                raise ValueError(
                    f"QTensor.{name}: expected {jnp.dtype(dtype).name}{list(shape)}, "
                    f"got {jnp.dtype(got.dtype).name}{list(got.shape)}"
                )
        return self


def is_qtensor(x: Any) -> TypeGuard[QTensor]:
    """Whether `x` is a `QTensor`; for the `is_leaf` argument of tree functions."""
    return isinstance(x, QTensor)


def with_contraction(q: QTensor, config: ContractionConfig) -> QTensor:
    """`q` with another contraction config."""
    return dataclasses.replace(q, contraction=config)
