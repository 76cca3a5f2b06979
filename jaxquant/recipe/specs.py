"""Functions with short names that make the usual specs."""

from __future__ import annotations

from typing import Protocol

from jaxquant.numerics import FORMATS, Format, codebook_format
from jaxquant.qtensor import Granularity, PerChannel, PerGroup, PerTensor, QSpec, Range


class IntegerSpec(Protocol):
    """A function that makes the `QSpec` of an integer format; see `int8`."""

    def __call__(
        self,
        group: int | None = None,
        *,
        symmetric: bool = ...,
        range: Range = "half",
        granularity: Granularity | None = None,
        scale_dtype: str | None = None,
    ) -> QSpec:
        """The spec."""


_DOC = """Integers of {bits} bits, {qmin} to {qmax}, by default one scale per output channel or row.

    Args:
      group: how many values along the contracted axes share a scale.
      symmetric: whether the zero point is 0; {default} by default.
      range: rule from the range to the scale, see `QSpec`.
      granularity: which values share a scale, instead of `group`.
      scale_dtype: name of the dtype scales are stored in, float32 by default.

    Raises:
      ValueError: `group` with `granularity`, or `QSpec` raises.

    >>> from jaxquant.recipe import {name}
    >>> {name}(group=64).granularity
    PerGroup(size=64, axis=None)
    """


def _integer(name: str) -> IntegerSpec:
    fmt = FORMATS[name]
    assert isinstance(fmt, Format)

    def make(
        group: int | None = None,
        *,
        symmetric: bool = fmt.signed,
        range: Range = "half",
        granularity: Granularity | None = None,
        scale_dtype: str | None = None,
    ) -> QSpec:
        if group is not None:
            if granularity is not None:
                raise ValueError(
                    f"{name}: give group={group} or granularity={granularity}, not both"
                )
            if not isinstance(group, int) or isinstance(group, bool):
                raise ValueError(
                    f"{name}: group is a number of values, got {group!r}; "
                    "pass a granularity by keyword: granularity=..."
                )
            granularity = PerGroup(group)
        return QSpec(name, granularity, symmetric, range, scale_dtype)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = _DOC.format(
        name=name, bits=fmt.bits, qmin=fmt.qmin, qmax=fmt.qmax, default=fmt.signed
    )
    return make


int2 = _integer("int2")
int3 = _integer("int3")
int4 = _integer("int4")
int5 = _integer("int5")
int6 = _integer("int6")
int7 = _integer("int7")
int8 = _integer("int8")
uint4 = _integer("uint4")
uint8 = _integer("uint8")


def nf4(group: int = 64, *, double: bool = False) -> QSpec:
    """The 4-bit normal-float codebook of QLoRA, in groups.

    Codes and scales equal those of bitsandbytes where the group divides the contracted size.
    Otherwise its blocks continue from one output to the next; for a kernel `[in, out]`, use
    `QSpec("nf4", PerGroup(64, axis=(1, 0)))` for the same blocks.

    Args:
      group: how many values along the contracted axes share a scale.
      double: quantize the scales too; 4.127 bits per weight in groups of 64.

    Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023), section 3.

    >>> nf4(group=32).granularity
    PerGroup(size=32, axis=None)
    """
    return QSpec("nf4", PerGroup(group), double=double)


def fp4(group: int = 64, *, double: bool = False) -> QSpec:
    """The 4-bit floats of bitsandbytes, in groups. Arguments as for `nf4`.

    >>> fp4(double=True)
    QSpec(fp4, PerGroup(size=64, axis=None), double=True)
    """
    return QSpec("fp4", PerGroup(group), double=double)


def fp8() -> QSpec:
    """Float8 e4m3fn, by default one scale per output channel or row.

    >>> fp8()
    QSpec(float8_e4m3fn, PerChannel(axes=None))
    """
    return QSpec("float8_e4m3fn")


def mxfp4() -> QSpec:
    """MXFP4 of the OCP: float4 e2m1 in groups of 32 with a power-of-two scale.

    Source: OCP Microscaling Formats (MX) Specification 1.0, section 5.

    >>> mxfp4()
    QSpec(float4_e2m1fn, PerGroup(size=32, axis=None), scale_dtype='float8_e8m0fnu')
    """
    return QSpec("mxfp4")


def nvfp4() -> QSpec:
    """NVFP4: float4 e2m1 in groups of 16, float8 e4m3fn scales and one float32 global scale.

    >>> nvfp4()
    QSpec(float4_e2m1fn, PerGroup(size=16, axis=None), scale_dtype='float8_e4m3fn')
    """
    return QSpec("nvfp4")


def palette(bits: int = 4, channels: int | None = None) -> QSpec:
    """A codebook of `2^bits` values for each array, from k-means.

    For rules with `encoder=kmeans()`, which computes it once, or `weight_estimator=ste.kmeans()`,
    which trains it.

    Args:
      bits: 1 to 8.
      channels: one codebook for this many consecutive output channels, instead of each array.

    Raises:
      ValueError: other bits, or `channels` that is not a positive integer.

    Source: Han et al., "Deep Compression" (2016), section 3.

    >>> palette(2).format.bits, len(palette(2).format.codebook)
    (2, 4)
    >>> palette(4, channels=16).granularity
    PerChannel(axes=None, size=16)
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"palette: expected 1 to 8 bits, got {bits!r}")
    levels = 2**bits
    values = [2.0 * i / (levels - 1) - 1.0 for i in range(levels)]
    granularity = PerTensor() if channels is None else PerChannel(size=channels)
    return QSpec(codebook_format(values, name=f"palette{bits}"), granularity)
