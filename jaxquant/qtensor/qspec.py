"""`QSpec`: how one array is quantized."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from jaxquant.numerics import FORMATS, BlockFormat, Format, get
from jaxquant.qtensor import granularity as _granularity
from jaxquant.qtensor.granularity import (
    Blocks,
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
)

RANGES = ("half", "qmax", "signed")
Range = Literal["half", "qmax", "signed"]


@dataclasses.dataclass(frozen=True)
class QSpec:
    """How one array is quantized.

    Linear formats follow `r = S (q - Z)`. With `symmetric=True`, `Z = 0` and the scale comes from
    the largest magnitude `amax` by the `range` rule:

    - `"half"`: `S = amax / (qmax + 1/2)`; the negative extreme rounds to `qmin`.
    - `"qmax"`: `S = amax / qmax`; integer data that uses the full range is restored exactly.
    - `"signed"`: `S = -extreme / |qmin|`, `extreme` the signed value of largest magnitude, which
      maps exactly to `qmin` (the rule of GGUF's Q4_0).

    With `symmetric=False`, `S = (max - min) / (2^b - 1)` over a range that contains 0, and `Z` is
    an integer of the format. Float formats and codebooks use `S = amax / max`; a block format
    (`mxfp4`, `nvfp4`, ...) sets element, group size and scale format at once.

    Attributes:
      format: a `Format`, or the name of one (`"int4"`, `"nf4"`, `"float8_e4m3fn"`, `"mxfp4"`).
      granularity: which values share a scale.
      symmetric: whether the zero point is 0.
      range: the rule above; integers only.
      scale_dtype: name of the dtype scales are stored in.
      global_scale: whether scales are relative to one float32 scale per array.
      double: whether scales are quantized too, to 8 bits in blocks of 256 (see `nest`).
      zero_dtype: dtype name of zero points that need not be integers, as HQQ finds them; `None`
        keeps them integers of the format.

    Raises:
      ValueError: unknown format, range or dtype; an asymmetric float or codebook format; `double`
        with a global scale or scales that are not float32; `zero_dtype` without a zero point.

    >>> QSpec("int4", granularity=PerGroup(128, axis=0)).format.name
    'int4'
    >>> QSpec("mxfp4").scale_dtype
    'float8_e8m0fnu'
    """

    format: Format
    granularity: Granularity = PerChannel()
    symmetric: bool = True
    range: Range = "half"
    scale_dtype: str = "float32"
    global_scale: bool = False
    double: bool = False
    zero_dtype: str | None = None

    def __init__(
        self,
        format: str | Format | BlockFormat,
        granularity: Granularity | None = None,
        symmetric: bool = True,
        range: Range = "half",
        scale_dtype: str | None = None,
        global_scale: bool = False,
        double: bool = False,
        zero_dtype: str | None = None,
    ) -> None:
        if isinstance(format, (list, tuple)) or hasattr(format, "__array__"):
            raise ValueError(
                f"format: expected a name or a Format, got a {type(format).__name__}; to make a "
                "format of codebook values use jq.numerics.codebook_format(values, name='mine')"
            )
        fmt = get(format)
        if isinstance(fmt, BlockFormat):
            if granularity is None:
                granularity = PerGroup(fmt.block)
            scale_dtype = scale_dtype or fmt.scale.storage
            global_scale = fmt.global_scale
            fmt = fmt.element
        elif granularity is None:
            granularity = PerChannel()
        if not isinstance(granularity, (PerTensor, PerChannel, PerGroup, PerBlock)):
            raise ValueError(f"granularity: expected PerTensor, ... PerBlock, got {granularity!r}")
        if range not in RANGES:
            raise ValueError(f"range: expected one of {RANGES}, got {range!r}")
        if not symmetric and not fmt.is_integer:
            raise ValueError(f"{fmt.name}: only integer formats can be asymmetric (no zero point)")
        scale_dtype = scale_dtype or "float32"
        try:
            scale = jnp.dtype(scale_dtype)
        except TypeError:
            raise ValueError(f"scale_dtype: {scale_dtype!r} is not a dtype") from None
        if not jnp.issubdtype(scale, jnp.floating):
            raise ValueError(f"scale_dtype: expected a float dtype, got {scale.name}")
        if range == "signed" and float(jnp.finfo(scale).min) >= 0:
            raise ValueError(f"range='signed' makes negative scales, which {scale.name} lacks")
        if double and (global_scale or scale.name != "float32"):
            raise ValueError(
                "double=True quantizes float32 scales without a global scale, got "
                f"{scale.name}{' with a global scale' if global_scale else ''}"
            )
        if zero_dtype is not None:
            zero_dtype = _zero_dtype(zero_dtype, symmetric)
        for name, value in (
            ("format", fmt),
            ("granularity", granularity),
            ("symmetric", symmetric),
            ("range", range),
            ("scale_dtype", scale.name),
            ("global_scale", global_scale),
            ("double", double),
            ("zero_dtype", zero_dtype),
        ):
            object.__setattr__(self, name, value)

    @property
    def name(self) -> str:
        """Name of the format, or of the block format whose definition this spec matches.

        >>> QSpec("mxfp4").name, QSpec("float4_e2m1fn").name
        ('mxfp4', 'float4_e2m1fn')
        """
        parts = self.format, self.scale_dtype, self.global_scale
        for name, block in FORMATS.items():
            if not isinstance(block, BlockFormat):
                continue
            size = isinstance(self.granularity, PerGroup) and self.granularity.size == block.block
            if size and parts == (block.element, block.scale.name, block.global_scale):
                return name
        return self.format.name

    def __repr__(self) -> str:
        notes = [self.format.name, repr(self.granularity)]
        notes += [] if self.symmetric else ["symmetric=False"]
        notes += [] if self.range == "half" else [f"range={self.range!r}"]
        notes += [] if self.scale_dtype == "float32" else [f"scale_dtype={self.scale_dtype!r}"]
        notes += ["double=True"] if self.double else []
        notes += [] if self.zero_dtype is None else [f"zero_dtype={self.zero_dtype!r}"]
        return f"QSpec({', '.join(notes)})"

    def at(self, contracted: tuple[int, ...], ndim: int) -> QSpec:
        """The spec with open axes filled in for a contraction.

        `contracted` are the contracting dimensions of the array, of rank `ndim`.

        >>> QSpec("int4", PerGroup(64)).at((0,), 2).granularity
        PerGroup(size=64, axis=(-2,))
        """
        filled = _granularity.at(self.granularity, contracted, ndim)
        return dataclasses.replace(self, granularity=filled)

    def resolve(self, shape: tuple[int, ...], storage_last_axes: tuple[int, ...] = ()) -> Blocks:
        """The storage axes and block sizes for an array of `shape`.

        Grouped axes and `storage_last_axes` are stored last, so that contracted axes are contiguous
        and sub-byte codes are packed along them.

        Raises:
          ValueError: an axis out of range or named twice, or axes left open.
        """
        return _granularity.resolve(self.granularity, shape, storage_last_axes)


def _zero_dtype(name: str, symmetric: bool) -> str:
    if symmetric:
        raise ValueError("zero_dtype: a symmetric spec has no zero point; use symmetric=False")
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        raise ValueError(f"zero_dtype: {name!r} is not a dtype") from None
    if dtype.name not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"zero_dtype: expected float32, float16 or bfloat16, got {dtype.name}")
    return str(dtype.name)
