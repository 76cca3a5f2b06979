"""Granularities: which values of an array share a scale."""

from __future__ import annotations

import dataclasses
import math


def _positive(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size > 0


@dataclasses.dataclass(frozen=True)
class PerTensor:
    """One scale for the whole array.

    >>> import jaxquant as jq
    >>> jq.QSpec("int8", jq.PerTensor()).resolve((4, 8)).blocks
    (4, 8)
    """


@dataclasses.dataclass(frozen=True)
class PerChannel:
    """One scale for each index of `axes`, shared over all other axes.

    `axes=None` means the axes that are not contracted: output channels of a weight, rows (tokens)
    of an activation. `size` consecutive indices of the last of `axes` share one scale; a last run
    that is not full is padded.

    Raises:
      ValueError: `size` is not a positive integer.

    >>> import jaxquant as jq
    >>> jq.QSpec("int8", jq.PerChannel(axes=1)).resolve((4, 8)).blocks
    (4, 1)
    >>> jq.QSpec("int8", jq.PerChannel(axes=1, size=2)).resolve((4, 8)).blocks
    (4, 2)
    """

    axes: int | tuple[int, ...] | None = None
    size: int = 1

    def __post_init__(self) -> None:
        if not _positive(self.size):
            raise ValueError(f"channels: expected a positive integer, got {self.size!r}")

    def __repr__(self) -> str:
        size = "" if self.size == 1 else f", size={self.size}"
        return f"PerChannel(axes={self.axes}{size})"


@dataclasses.dataclass(frozen=True)
class PerGroup:
    """One scale for each run of `size` values along `axis`, for every index of the other axes.

    `axis=None` means the contracted axes; several axes are flattened in order and the groups run
    over the result. A last group that is not full is padded.

    Raises:
      ValueError: `size` is not a positive integer.

    >>> import jaxquant as jq
    >>> jq.QSpec("int4", jq.PerGroup(4, axis=0)).resolve((8, 3)).blocks
    (1, 4)
    """

    size: int
    axis: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not _positive(self.size):
            raise ValueError(f"group size: expected a positive integer, got {self.size!r}")


@dataclasses.dataclass(frozen=True)
class PerBlock:
    """One scale for each tile of `rows` x `cols` values over the two `axes`.

    `axes=None` means the last two axes of the array.

    Raises:
      ValueError: `rows` or `cols` is not a positive integer.

    >>> import jaxquant as jq
    >>> jq.QSpec("int8", jq.PerBlock(2, 4)).resolve((8, 8)).blocks
    (2, 4)
    """

    rows: int
    cols: int
    axes: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for size in (self.rows, self.cols):
            if not _positive(size):
                raise ValueError(f"block size: expected positive integers, got {self}")


Granularity = PerTensor | PerChannel | PerGroup | PerBlock


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A granularity resolved for one shape.

    `axes[s]` are the array's axes (negative) flattened in order into storage axis `s`;
    `blocks[s]` is how many consecutive indices of it share one scale.
    """

    axes: tuple[tuple[int, ...], ...]
    blocks: tuple[int, ...]


def at(granularity: Granularity, contracted: tuple[int, ...], ndim: int) -> Granularity:
    """The granularity with open axes filled in for a contraction over `contracted`.

    >>> at(PerChannel(), (0,), 2)
    PerChannel(axes=(-1,))
    """
    contracted = tuple(a % ndim - ndim for a in contracted)
    if isinstance(granularity, PerChannel) and granularity.axes is None:
        kept = tuple(a for a in range(-ndim, 0) if a not in contracted)
        return PerChannel(kept, granularity.size)
    if isinstance(granularity, PerGroup) and granularity.axis is None:
        return PerGroup(granularity.size, contracted)
    return granularity


def resolve(
    granularity: Granularity, shape: tuple[int, ...], storage_last_axes: tuple[int, ...] = ()
) -> Blocks:
    """The storage axes and block sizes for an array of `shape`; see `QSpec.resolve`.

    >>> resolve(PerGroup(4, axis=0), (8, 3))
    Blocks(axes=((-1,), (-2,)), blocks=(1, 4))
    """
    ndim = len(shape)
    grouped: tuple[int, ...] = ()
    if isinstance(granularity, PerGroup):
        grouped = _checked(granularity, granularity.axis, ndim)
    storage_last_axes = tuple(a % ndim - ndim for a in storage_last_axes)
    order = [a for a in range(-ndim, 0) if a not in storage_last_axes and a not in grouped]
    order += [a for a in storage_last_axes if a not in grouped]
    size = {a: shape[a] for a in range(-ndim, 0)}
    axes: list[tuple[int, ...]] = [(a,) for a in order]
    if isinstance(granularity, PerTensor):
        blocks = [size[a] for a in order]
    elif isinstance(granularity, PerChannel):
        channels = _checked(granularity, granularity.axes, ndim)
        run = dict.fromkeys(channels, 1)
        run |= {a: min(granularity.size, max(size[a], 1)) for a in channels[-1:]}
        blocks = [run.get(a, size[a]) for a in order]
    elif isinstance(granularity, PerGroup):
        blocks = [1 for _ in order]
        if grouped:
            axes.append(grouped)
            total = math.prod(size[a] for a in grouped)
            blocks.append(min(granularity.size, max(total, 1)))
    else:
        rows, cols = _checked(granularity, granularity.axes or (-2, -1), ndim)
        tile = {rows: granularity.rows, cols: granularity.cols}
        blocks = [min(tile.get(a, 1), max(size[a], 1)) for a in order]
    return Blocks(tuple(axes), tuple(max(b, 1) for b in blocks))


def _checked(
    granularity: Granularity, axes: int | tuple[int, ...] | None, ndim: int
) -> tuple[int, ...]:
    """The axes as negative numbers.

    Raises:
      ValueError: no axes, or one out of range or named twice.
    """
    if axes is None:
        raise ValueError(
            f"{granularity!r}: no axis is named and no contraction implies one; name the axis, "
            "as in PerGroup(128, axis=0) or PerChannel(axes=-1)"
        )
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(
                f"{granularity!r}: axis {a} is out of range for an array of rank {ndim}"
            )
    negative = tuple(a % ndim - ndim for a in axes)
    if len(set(negative)) != len(negative):
        raise ValueError(f"{granularity!r}: an axis is named twice in {axes}")
    return negative
