"""Dataclasses of numeric formats; code branches on their fields, never on a name."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """An encoding of one real number in a few bits.

    A floating-point code with sign `s`, exponent field `E` and mantissa field `M` of `m`
    bits has the value::

        E != 0 (normal):     (-1)^s * 2^(E - bias)     * (1 + M / 2^m)
        E == 0 (subnormal):  (-1)^s * 2^(1 - bias) * M / 2^m

    A format without mantissa bits (the scales of OCP MX) has no zero and no subnormals:
    `2^(E - bias)` throughout. An integer has neither exponent nor mantissa; the code of a codebook
    is an index into its ascending values.

    Attributes:
      name: the key in :data:`FORMATS`.
      bits: width of one code.
      signed: whether negative values exist.
      exponent_bits, mantissa_bits, bias: fields of a floating-point format, else `None`.
      has_inf: the topmost exponent is reserved for infinities and NaNs, as in IEEE 754.
      has_nan: NaN exists; without infinities it is the one magnitude whose bits are all ones.
      min, max: lowest and largest finite value.
      smallest_normal, smallest_subnormal, epsilon: positive; `None` where the format has none.
      storage: dtype name of an array of unpacked codes: an integer, a floating-point dtype of 8
        bits or more, or `uint8` for the bit patterns of narrower floats and for codebook indices.
      codebook: the values, ascending, exactly representable in float32; `None` otherwise.

    Sources: IEEE 754-2019 section 3; OCP 8-bit Floating Point Specification (OFP8) 1.0; OCP
    Microscaling Formats (MX) 1.0.

    >>> from jaxquant.numerics import get
    >>> f = get("float8_e4m3fn")
    >>> f.max, f.smallest_normal, f.smallest_subnormal, f.epsilon
    (448.0, 0.015625, 0.001953125, 0.125)
    >>> get("int4").qmin, get("int4").qmax, get("int4").bytes
    (-8, 7, 0.5)
    """

    name: str
    bits: int
    signed: bool
    exponent_bits: int | None
    mantissa_bits: int | None
    bias: int | None
    has_inf: bool
    has_nan: bool
    min: float
    max: float
    smallest_normal: float | None
    smallest_subnormal: float | None
    epsilon: float | None
    storage: str
    codebook: tuple[float, ...] | None = None

    @property
    def is_float(self) -> bool:
        """Whether codes have an exponent."""
        return self.exponent_bits is not None

    @property
    def is_codebook(self) -> bool:
        """Whether codes are indices into a list of values."""
        return self.codebook is not None

    @property
    def is_integer(self) -> bool:
        """Whether codes are the values themselves."""
        return not self.is_float and not self.is_codebook

    @property
    def qmin(self) -> int:
        """Lowest integer; `ValueError` for a format that is not an integer."""
        return int(self._integer("qmin").min)

    @property
    def qmax(self) -> int:
        """Largest integer; `ValueError` for a format that is not an integer."""
        return int(self._integer("qmax").max)

    @property
    def bytes(self) -> float:
        """Bytes of one code, a fraction below 8 bits."""
        return self.bits / 8

    @property
    def packed(self) -> bool:
        """Whether codes are narrower than a byte, and so stored as a bit stream."""
        return self.bits < 8

    @property
    def smallest_positive(self) -> float:
        """The smallest value above zero."""
        if self.codebook is not None:
            return min(v for v in self.codebook if v > 0) if self.max > 0 else 0.0
        return self.smallest_subnormal or self.smallest_normal or 1.0

    @property
    def decimal_range(self) -> tuple[float, float]:
        """`(log10(smallest positive value), log10(largest value))`; `-inf` without any.

        >>> from jaxquant.numerics import get
        >>> [round(v, 1) for v in get("bfloat16").decimal_range]
        [-40.0, 38.5]
        """
        if self.max <= 0:
            return (-math.inf, -math.inf)
        return (math.log10(self.smallest_positive), math.log10(self.max))

    def _integer(self, field: str) -> Format:
        if not self.is_integer:
            raise ValueError(f"only integer formats have {field}; {self.name!r} is not one")
        return self


@dataclass(frozen=True)
class BlockFormat:
    """A format whose elements share one scale per block of consecutive values.

    `value = element * scale`, and `element * scale * global_scale` with one more float32 scale
    per tensor where `global_scale` is set, which lets a narrow `scale` format follow data of any
    magnitude.

    Sources: OCP Microscaling Formats (MX) 1.0 (mxfp8, mxfp6, mxfp4); NVIDIA, "Pretraining
    Large Language Models with NVFP4" (2025) (nvfp4).

    >>> from jaxquant.numerics import get
    >>> f = get("mxfp4")
    >>> f.element.name, f.block, f.scale.name, f.bits
    ('float4_e2m1fn', 32, 'float8_e8m0fnu', 4.25)
    """

    name: str
    element: Format
    block: int
    scale: Format
    global_scale: bool

    @property
    def bits(self) -> float:
        """Bits per value, the block's share of its scale included."""
        return self.element.bits + self.scale.bits / self.block

    @property
    def bytes(self) -> float:
        """Bytes per value, the block's share of its scale included."""
        return self.bits / 8
