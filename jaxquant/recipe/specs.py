"""Short names for the specs that rules are written with."""

from __future__ import annotations

from typing import TypedDict, Unpack

from jaxquant.spec import Granularity, PerGroup, QSpec, Range


class _Options(TypedDict, total=False):
    group: int | None
    symmetric: bool
    range: Range
    granularity: Granularity | None
    scale_dtype: str | None


def _integer(
    name: str,
    group: int | None = None,
    symmetric: bool = True,
    range: Range = "half",
    granularity: Granularity | None = None,
    scale_dtype: str | None = None,
) -> QSpec:
    if group is not None:
        if granularity is not None:
            raise ValueError(f"{name}: give group={group} or granularity={granularity}, not both")
        granularity = PerGroup(group)
    return QSpec(name, granularity, symmetric, range, scale_dtype)


def int8(**options: Unpack[_Options]) -> QSpec:
    """Integers of 8 bits, -128 to 127, by default one scale per output channel or row.

    Args:
      **options: `group` (one scale for so many values along the contracted axes) or
        `granularity`; `symmetric`, `range` and `scale_dtype` as in `QSpec`.

    Raises:
      ValueError: `group` beside `granularity`, or what `QSpec` refuses.

    >>> import jaxquant as jq
    >>> jq.int8(group=64)
    QSpec(int8, PerGroup(size=64, axis=None))
    """
    return _integer("int8", **options)


def int7(**options: Unpack[_Options]) -> QSpec:
    """Integers of 7 bits, -64 to 63; options as in `int8`."""
    return _integer("int7", **options)


def int6(**options: Unpack[_Options]) -> QSpec:
    """Integers of 6 bits, -32 to 31; options as in `int8`."""
    return _integer("int6", **options)


def int5(**options: Unpack[_Options]) -> QSpec:
    """Integers of 5 bits, -16 to 15; options as in `int8`."""
    return _integer("int5", **options)


def int4(**options: Unpack[_Options]) -> QSpec:
    """Integers of 4 bits, -8 to 7; options as in `int8`.

    >>> import jaxquant as jq
    >>> jq.int4(group=128, symmetric=False)
    QSpec(int4, PerGroup(size=128, axis=None), symmetric=False)
    """
    return _integer("int4", **options)


def int3(**options: Unpack[_Options]) -> QSpec:
    """Integers of 3 bits, -4 to 3; options as in `int8`."""
    return _integer("int3", **options)


def int2(**options: Unpack[_Options]) -> QSpec:
    """Integers of 2 bits, -2 to 1; options as in `int8`."""
    return _integer("int2", **options)


def uint8(**options: Unpack[_Options]) -> QSpec:
    """Integers of 8 bits, 0 to 255; options as in `int8`, except that `symmetric` is `False`.

    Without a zero point an unsigned format has no negative values, which suits a softmax or ReLU
    output only.

    >>> import jaxquant as jq
    >>> jq.uint8().symmetric
    False
    """
    return _integer("uint8", **({"symmetric": False} | options))
