"""Maps axes of a parameter to axes of its core, the array that encoders take."""

from __future__ import annotations

import dataclasses

from jaxquant.qtensor import PerBlock, PerChannel, PerGroup, PerTensor, QSpec


def localize(
    spec: QSpec, contracted: tuple[int, ...] | None, ndim: int, batch: int, where: str
) -> QSpec:
    """The spec with every axis named, counted from the end within the core axes.

    Args:
      spec: a rule's spec; the axes it names are those of the parameter.
      contracted: contracting axes, `None` if unknown.
      ndim: rank of the parameter.
      batch: number of leading batch axes; a scale is never shared over those.
      where: names leaf and rule in errors.

    Raises:
      ValueError: an axis out of range or named twice; groups along a batch axis; unnamed axes
        without a contraction that determines them.

    >>> localize(QSpec("int4", PerGroup(64)), (1,), 3, 1, "w").granularity
    PerGroup(size=64, axis=(-2,))
    """
    gran = spec.granularity
    if isinstance(gran, PerTensor):
        return spec
    if isinstance(gran, PerBlock):
        rows, cols = _named(gran.axes or (-2, -1), ndim, batch, where)
        blocks = PerBlock(gran.rows, gran.cols, (rows, cols))
        return dataclasses.replace(spec, granularity=blocks)
    named = gran.axes if isinstance(gran, PerChannel) else gran.axis
    if named is None:
        if contracted is None:
            raise ValueError(
                f"{where}: no sites are given and the rule names no axis, so the axes to share "
                "a scale over would be a guess; pass sites=jaxquant.trace(fn, params, *args), or "
                "name the axis, as in PerGroup(128, axis=0) or PerChannel(axes=-1)"
            )
        inner = tuple(a - batch for a in (c % ndim for c in contracted) if a >= batch)
        return spec.at(inner, ndim - batch)
    if isinstance(gran, PerChannel):
        axes = _named(named, ndim, 0, where)
        kept = tuple(a for a in axes if a >= batch - ndim)
        return dataclasses.replace(spec, granularity=PerChannel(kept, gran.size))
    assert isinstance(gran, PerGroup)
    axes = _named(named, ndim, batch, where)
    return dataclasses.replace(spec, granularity=PerGroup(gran.size, axes))


def _named(axes: int | tuple[int, ...], ndim: int, batch: int, where: str) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(f"{where}: axis {a} is out of range, expected -{ndim} to {ndim - 1}")
    negative = tuple(a % ndim - ndim for a in axes)
    if len(set(negative)) < len(negative):
        raise ValueError(f"{where}: an axis is named twice in {axes}")
    for a in negative:
        if a < batch - ndim:
            raise ValueError(
                f"{where}: axis {a} is scanned over, layer by layer; a scale cannot be shared "
                "between layers"
            )
    return negative
