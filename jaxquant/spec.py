"""How one array is quantized: a format, a granularity, and how the range becomes a scale."""

from __future__ import annotations

import builtins
import dataclasses
from typing import Literal

import jax.numpy as jnp

from jaxquant.numerics import BlockFormat, Format, get

RANGES = ("half", "qmax", "signed")
Range = Literal["half", "qmax", "signed"]


def _axes(value: int | tuple[int, ...] | None) -> tuple[int, ...] | None:
    return (value,) if isinstance(value, int) else value if value is None else tuple(value)


def _positive(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size > 0


@dataclasses.dataclass(frozen=True)
class PerTensor:
    """One scale for the whole array.

    >>> QSpec("int8", PerTensor()).resolve((4, 8)).blocks
    (4, 8)
    """


@dataclasses.dataclass(frozen=True)
class PerChannel:
    """One scale for each index of `axes`, shared over all others.

    `axes=None` means the axes that the contraction keeps: output channels of a weight, rows
    (tokens) of an activation. With a `size`, one for each run of so many consecutive indices of the
    last of `axes`; a last run that is not full is padded.

    Raises:
      ValueError: `size` is not a positive integer.

    >>> QSpec("int8", PerChannel(axes=1)).resolve((4, 8)).blocks
    (4, 1)
    >>> QSpec("int8", PerChannel(axes=1, size=2)).resolve((4, 8)).blocks
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

    >>> QSpec("int4", PerGroup(4, axis=0)).resolve((8, 3)).blocks
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

    >>> QSpec("int8", PerBlock(2, 4)).resolve((8, 8)).blocks
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


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A granularity made concrete for one shape.

    `axes[s]` are the array's axes (negative) that storage axis `s` holds, flattened in order;
    `blocks[s]` is how many consecutive indices of it share one scale.
    """

    axes: tuple[tuple[int, ...], ...]
    blocks: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class QSpec:
    """How one array is quantized.

    Linear formats follow `r = S (q - Z)`. With `symmetric=True`, `Z = 0` and the scale comes from
    the largest magnitude `amax` by the `range` rule:

    - `"half"`: `S = amax / (qmax + 1/2)`; the negative extreme rounds out to `qmin`.
    - `"qmax"`: `S = amax / qmax`; data that uses the whole integer range comes back exactly.
    - `"signed"`: `S = -extreme / |qmin|`, `extreme` the signed value of largest magnitude, which
      so falls on `qmin` exactly (the rule of GGUF's Q4_0).

    With `symmetric=False`, `S = (max - min) / (2^b - 1)` over a range that contains 0, and `Z` is
    an integer of the format. Float formats and codebooks use `S = amax / max`; a block format
    (`mxfp4`, `nvfp4`, ...) sets element, group size and scale format at once.

    Attributes:
      format: a `Format`, or the name of one (`"int4"`, `"nf4"`, `"float8_e4m3fn"`, `"mxfp4"`).
      granularity: which values share a scale.
      symmetric: whether the zero point is 0.
      range: the rule above; integers only.
      scale_dtype: dtype name the scales are stored in.
      global_scale: whether scales are themselves relative to one float32 scale per array.
      double: whether scales are themselves quantized, to 8 bits in blocks of 256 (see `nest`).
      zero_dtype: dtype name of zero points that need not be integers, as HQQ finds them; `None`
        keeps them integers of the format.

    Raises:
      ValueError: unknown format, range or dtype; an asymmetric float or codebook format; `double`
        beside a global scale or other scales than float32; `zero_dtype` without a zero point.

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
                f"format: expected a name or a Format, got a {type(format).__name__}; values of a "
                "codebook become a format by jq.codebook_format(values, name='mine')"
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

    def __repr__(self) -> str:
        notes = [self.format.name, repr(self.granularity)]
        notes += [] if self.symmetric else ["symmetric=False"]
        notes += [] if self.range == "half" else [f"range={self.range!r}"]
        notes += [] if self.scale_dtype == "float32" else [f"scale_dtype={self.scale_dtype!r}"]
        notes += ["double=True"] if self.double else []
        notes += [] if self.zero_dtype is None else [f"zero_dtype={self.zero_dtype!r}"]
        return f"QSpec({', '.join(notes)})"

    def at(self, contracted: tuple[int, ...], ndim: int) -> QSpec:
        """Fills the axes that were left to the contraction.

        `contracted` are the axes of the array (of rank `ndim`) that are summed over.

        >>> QSpec("int4", PerGroup(64)).at((0,), 2).granularity
        PerGroup(size=64, axis=(-2,))
        """
        contracted = tuple(a % ndim - ndim for a in contracted)
        kept = tuple(a for a in builtins.range(-ndim, 0) if a not in contracted)
        gran = self.granularity
        if isinstance(gran, PerChannel) and gran.axes is None:
            gran = PerChannel(kept, gran.size)
        elif isinstance(gran, PerGroup) and gran.axis is None:
            gran = PerGroup(gran.size, contracted)
        return dataclasses.replace(self, granularity=gran)

    def resolve(self, shape: tuple[int, ...], minor: tuple[int, ...] = ()) -> Blocks:
        """The storage axes and block sizes for an array of `shape`.

        Grouped axes, and those named in `minor`, are stored last, so that what is contracted is
        contiguous and sub-byte codes pack along it.

        Raises:
          ValueError: an axis out of range or named twice, or axes left open.
        """
        ndim, gran = len(shape), self.granularity
        grouped: tuple[int, ...] = ()
        if isinstance(gran, PerGroup):
            grouped = self._check(gran.axis, ndim)
        minor = tuple(a % ndim - ndim for a in minor)
        order = [a for a in builtins.range(-ndim, 0) if a not in minor and a not in grouped]
        order += [a for a in minor if a not in grouped]
        size = {a: shape[a] for a in builtins.range(-ndim, 0)}
        axes: list[tuple[int, ...]] = [(a,) for a in order]
        if isinstance(gran, PerTensor):
            blocks = [size[a] for a in order]
        elif isinstance(gran, PerChannel):
            channels = self._check(gran.axes, ndim)
            run = dict.fromkeys(channels, 1)
            run |= {a: min(gran.size, max(size[a], 1)) for a in channels[-1:]}
            blocks = [run.get(a, size[a]) for a in order]
        elif isinstance(gran, PerGroup):
            total = 1
            for a in grouped:
                total *= size[a]
            blocks = [1 for _ in order]
            if grouped:
                axes.append(grouped)
                blocks.append(min(gran.size, max(total, 1)))
        else:
            rows, cols = self._check(gran.axes or (-2, -1), ndim)
            tile = {rows: gran.rows, cols: gran.cols}
            blocks = [min(tile.get(a, 1), max(size[a], 1)) for a in order]
        return Blocks(tuple(axes), tuple(max(b, 1) for b in blocks))

    def _check(self, axes: int | tuple[int, ...] | None, ndim: int) -> tuple[int, ...]:
        if axes is None:
            raise ValueError(
                f"{self!r}: the axis is not given and no contraction says it; name the axis, "
                "as in PerGroup(128, axis=0) or PerChannel(axes=-1)"
            )
        given = _axes(axes) or ()
        for a in given:
            if not -ndim <= a < ndim:
                raise ValueError(f"{self!r}: axis {a} is out of range for an array of rank {ndim}")
        negative = tuple(a % ndim - ndim for a in given)
        if len(set(negative)) != len(negative):
            raise ValueError(f"{self!r}: an axis is named twice in {given}")
        return negative


@dataclasses.dataclass(frozen=True)
class Gradients:
    """How the gradient of a contraction's result is quantized before it is contracted in turn.

    For `y = x w` and `g = dL/dy`: `dx = Q_i(g) w'^T`, `dw = x'^T Q_w(g)`, with `x'` and `w'` the
    quantized operands of the forward pass. Scales that `x'` or `w'` have along a contracted axis go
    to `g` before it is quantized, one scale for each index that is kept.

    Attributes:
      input: spec of `g` where it gives the gradient of the input; `None` contracts in float.
      weight: spec of `g` where it gives the gradient of the weight; `None` contracts in float.
      stochastic: round `g` to one of the two neighbours at random, so that gradients stay unbiased.
        Integers then take `range="qmax"`: by the other rules an extreme may lie beyond all codes.

    Raises:
      ValueError: neither, or a spec of another granularity than `PerTensor()` or `PerChannel()`, or
        of another format than integers or 8-bit floats.

    Source: stochastic rounding of gradients alone, Gupta et al., "Deep Learning with Limited
    Numerical Precision" (2015); scales for each contraction, AQT (2022).

    >>> Gradients(input=QSpec("int8"), weight=None).weight is None
    True
    """

    input: QSpec | None = QSpec("int8")
    weight: QSpec | None = QSpec("int8")
    stochastic: bool = True

    def __post_init__(self) -> None:
        if self.input is None and self.weight is None:
            raise ValueError("Gradients: expected a spec for input or weight, got neither")
        for name in ("input", "weight"):
            spec = getattr(self, name)
            if spec is None:
                continue
            if not isinstance(spec, QSpec):
                raise ValueError(f"Gradients: {name} takes a QSpec, got {spec!r}")
            fmt = spec.format
            if not fmt.signed or not (fmt.is_integer or (fmt.is_float and fmt.bits == 8)):
                raise ValueError(
                    f"Gradients: {name}: expected a signed integer or 8-bit float format, "
                    f"got {fmt.name}"
                )
            if self.stochastic and fmt.is_integer and spec.range != "qmax":
                spec = dataclasses.replace(spec, range="qmax")
                object.__setattr__(self, name, spec)
            if spec.granularity not in (PerTensor(), PerChannel()):
                raise ValueError(
                    f"Gradients: {name}: expected PerTensor() or PerChannel() (a scale for each "
                    f"index that is kept), got {spec.granularity!r}"
                )
