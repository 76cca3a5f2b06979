"""Short names for the specs that rules are written with."""

from __future__ import annotations

from jaxquant.spec import Granularity, PerGroup, QSpec, Range


def _integer(
    name: str,
    group: int | None,
    symmetric: bool,
    range: Range,
    granularity: Granularity | None,
    scale_dtype: str | None,
) -> QSpec:
    if group is not None:
        if granularity is not None:
            raise ValueError(f"{name}: give group={group} or granularity={granularity}, not both")
        if not isinstance(group, int) or isinstance(group, bool):
            raise ValueError(
                f"{name}: group is a number of values, got {group!r}; "
                "any granularity goes in by name: granularity=..."
            )
        granularity = PerGroup(group)
    return QSpec(name, granularity, symmetric, range, scale_dtype)


def int8(
    group: int | None = None,
    *,
    symmetric: bool = True,
    range: Range = "half",
    granularity: Granularity | None = None,
    scale_dtype: str | None = None,
) -> QSpec:
    """Integers of 8 bits, -128 to 127, by default one scale per output channel or row.

    Args:
      group: how many values along the contracted axes share a scale.
      symmetric: whether the zero point is 0.
      range: how the range becomes a scale, see `QSpec`.
      granularity: which values share a scale, in place of `group`.
      scale_dtype: dtype name the scales are stored in, float32 by default.

    Raises:
      ValueError: `group` beside `granularity`, or what `QSpec` refuses.

    >>> import jaxquant as jq
    >>> jq.int8(group=64)
    QSpec(int8, PerGroup(size=64, axis=None))
    """
    return _integer("int8", group, symmetric, range, granularity, scale_dtype)


def int7(
    group: int | None = None,
    *,
    symmetric: bool = True,
    range: Range = "half",
    granularity: Granularity | None = None,
    scale_dtype: str | None = None,
) -> QSpec:
    """Integers of 7 bits, -64 to 63; arguments as in `int8`."""
    return _integer("int7", group, symmetric, range, granularity, scale_dtype)


def int6(
    group: int | None = None,
    *,
    symmetric: bool = True,
    range: Range = "half",
    granularity: Granularity | None = None,
    scale_dtype: str | None = None,
) -> QSpec:
    """Integers of 6 bits, -32 to 31; arguments as in `int8`."""
    return _integer("int6", group, symmetric, range, granularity, scale_dtype)


def int5(
    group: int | None = None,
    *,
    symmetric: bool = True,
    range: Range = "half",
    granularity: Granularity | None = None,
    scale_dtype: str | None = None,
) -> QSpec:
    """Integers of 5 bits, -16 to 15; arguments as in `int8`."""
    return _integer("int5", group, symmetric, range, granularity, scale_dtype)


def int4(
    group: int | None = None,
    *,
    symmetric: bool = True,
    range: Range = "half",
    granularity: Granularity | None = None,
    scale_dtype: str | None = None,
) -> QSpec:
    """Integers of 4 bits, -8 to 7; arguments as in `int8`.

    >>> import jaxquant as jq
    >>> jq.int4(group=128, symmetric=False)
    QSpec(int4, PerGroup(size=128, axis=None), symmetric=False)
    """
    return _integer("int4", group, symmetric, range, granularity, scale_dtype)


def int3(
    group: int | None = None,
    *,
    symmetric: bool = True,
    range: Range = "half",
    granularity: Granularity | None = None,
    scale_dtype: str | None = None,
) -> QSpec:
    """Integers of 3 bits, -4 to 3; arguments as in `int8`."""
    return _integer("int3", group, symmetric, range, granularity, scale_dtype)


def int2(
    group: int | None = None,
    *,
    symmetric: bool = True,
    range: Range = "half",
    granularity: Granularity | None = None,
    scale_dtype: str | None = None,
) -> QSpec:
    """Integers of 2 bits, -2 to 1; arguments as in `int8`."""
    return _integer("int2", group, symmetric, range, granularity, scale_dtype)


def uint8(
    group: int | None = None,
    *,
    symmetric: bool = False,
    range: Range = "half",
    granularity: Granularity | None = None,
    scale_dtype: str | None = None,
) -> QSpec:
    """Integers of 8 bits, 0 to 255; arguments as in `int8`, except that `symmetric` is `False`.

    Without a zero point an unsigned format has no negative values, which suits a softmax or ReLU
    output only.

    >>> import jaxquant as jq
    >>> jq.uint8().symmetric
    False
    """
    return _integer("uint8", group, symmetric, range, granularity, scale_dtype)
