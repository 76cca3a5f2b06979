"""The table of all numeric formats, and functions that make a format from its parameters."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxquant.numerics.records import BlockFormat, Format

__all__ = ["ALIASES", "FORMATS", "BlockFormat", "Format", "codebook_format", "get", "minifloat"]


def minifloat(
    name: str,
    exponent_bits: int,
    mantissa_bits: int,
    *,
    bias: int | None = None,
    signed: bool = True,
    has_inf: bool = False,
    has_nan: bool = False,
    storage: str | None = None,
) -> Format:
    """Derives every property of a floating-point format from its fields.

    The largest finite magnitude is the largest bit pattern that is not infinity or NaN;
    `epsilon = 2^-m`, smallest normal `2^(1 - bias)`, smallest subnormal `2^(1 - bias - m)`. Without
    mantissa bits the smallest value is `2^-bias`, a normal one. `bias` defaults to `2^(e-1) - 1`,
    `storage` to uint8 bit patterns.

    Raises `ValueError` for infinities without NaN, for a format without mantissa bits that has a
    sign or infinities, and for one with values that float32 cannot represent (as normal numbers,
    unless the bias is that of float32).

    Source: IEEE 754-2019 section 3.3; OCP OFP8 1.0; OCP MX 1.0, element and scale data types.

    >>> minifloat("float5_e2m2", 2, 2).max
    7.0
    """
    bias = 2 ** (exponent_bits - 1) - 1 if bias is None else bias
    bits = int(signed) + exponent_bits + mantissa_bits
    # The codec handles only subnormals that are float32's own, or normal numbers in float32.
    fits = bias == 127 or bias + mantissa_bits <= 127
    if not (2 <= exponent_bits <= 8 and 0 <= mantissa_bits <= 23 and fits):
        raise ValueError(f"{name!r}: expected exponent, mantissa and bias within float32's")
    if has_inf and not has_nan:
        raise ValueError(f"{name!r}: a format with infinities has NaN too")
    if mantissa_bits == 0 and (signed or has_inf):
        raise ValueError(f"{name!r}: without mantissa bits expected no sign and no infinities")
    if storage is None and bits > 8:
        raise ValueError(f"{name!r} has {bits} bits: beyond 8, expected a storage dtype")

    all_ones = 2 ** (exponent_bits + mantissa_bits) - 1
    if has_inf:  # the topmost exponent is reserved
        largest = ((2**exponent_bits - 1) << mantissa_bits) - 1
    else:  # at most the pattern of all ones is reserved, for NaN
        largest = all_ones - int(has_nan)
    field, fraction = largest >> mantissa_bits, largest & (2**mantissa_bits - 1)
    if field - bias > 127:
        raise ValueError(f"{name!r}: expected a largest value within float32's range")
    maximum = math.ldexp(2**mantissa_bits + fraction, field - bias - mantissa_bits)
    subnormal = math.ldexp(1.0, 1 - bias - mantissa_bits) if mantissa_bits else None
    normal = math.ldexp(1.0, (1 if mantissa_bits else 0) - bias)
    return Format(
        name=name,
        bits=bits,
        signed=signed,
        exponent_bits=exponent_bits,
        mantissa_bits=mantissa_bits,
        bias=bias,
        has_inf=has_inf,
        has_nan=has_nan,
        min=-maximum if signed else (normal if subnormal is None else 0.0),
        max=maximum,
        smallest_normal=normal,
        smallest_subnormal=subnormal,
        epsilon=math.ldexp(1.0, -mantissa_bits),
        storage=storage or "uint8",
    )


def codebook_format(values: Iterable[float], name: str = "codebook") -> Format:
    """A format whose codes are indices into `values`, rounded to float32.

    `values` is any iterable of 2 to 256 finite numbers in ascending order, repeats allowed;
    anything else raises `ValueError`. The code is the index, `ceil(log2(n))` bits wide.

    >>> codebook_format([-1, 0, 1], name="ternary").bits
    2
    """
    try:
        array = np.asarray(list(values), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name!r}: codebook values must be numbers, got {values!r}") from error
    if array.ndim != 1 or not 2 <= array.size <= 256:
        raise ValueError(f"{name!r}: a codebook takes 2 to 256 values, got shape {array.shape}")
    if not np.all(np.abs(array) <= np.finfo(np.float32).max):  # False for NaN too
        raise ValueError(
            f"{name!r}: codebook values must be finite in float32, got {array.tolist()}"
        )
    if np.any(np.diff(array) < 0):
        raise ValueError(f"{name!r}: codebook values must ascend, got {array.tolist()}")
    codebook = tuple(array.astype(np.float32).tolist())
    return Format(
        name=name,
        bits=max(1, (array.size - 1).bit_length()),
        signed=codebook[0] < 0,
        exponent_bits=None,
        mantissa_bits=None,
        bias=None,
        has_inf=False,
        has_nan=False,
        min=codebook[0],
        max=codebook[-1],
        smallest_normal=None,
        smallest_subnormal=None,
        epsilon=None,
        storage="uint8",
        codebook=codebook,
    )


def _integer(bits: int, signed: bool) -> Format:
    return Format(
        name=f"{'' if signed else 'u'}int{bits}",
        bits=bits,
        signed=signed,
        exponent_bits=None,
        mantissa_bits=None,
        bias=None,
        has_inf=False,
        has_nan=False,
        min=float(-(2 ** (bits - 1))) if signed else 0.0,
        max=float(2 ** (bits - 1) - 1) if signed else float(2**bits - 1),
        smallest_normal=None,
        smallest_subnormal=None,
        epsilon=None,
        storage=f"{'' if signed else 'u'}int{8 if bits <= 8 else 16}",
    )


# The quantiles of a standard normal distribution, scaled to [-1, 1] and asymmetric so that zero is
# one of them: Dettmers et al., "QLoRA" (2023), appendix E.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# bitsandbytes' FP4, divided by its largest value: sign, two exponent bits and one mantissa bit, but
# not OCP's E2M1. Zero occurs twice, as +0 and -0; values above 0 round to the upper one.
_FP4 = tuple(sign * v / 12 for sign in (-1, 1) for v in (12, 8, 6, 4, 3, 2, 0.0625, 0)[::-sign])


def _table() -> Mapping[str, Format | BlockFormat]:
    ieee = {"has_inf": True, "has_nan": True}
    plain: list[Format] = [
        minifloat("float32", 8, 23, storage="float32", **ieee),
        minifloat("float16", 5, 10, storage="float16", **ieee),
        minifloat("bfloat16", 8, 7, storage="bfloat16", **ieee),
        minifloat("float8_e4m3fn", 4, 3, has_nan=True, storage="float8_e4m3fn"),
        minifloat("float8_e5m2", 5, 2, storage="float8_e5m2", **ieee),
        minifloat("float6_e2m3fn", 2, 3),
        minifloat("float6_e3m2fn", 3, 2),
        minifloat("float4_e2m1fn", 2, 1),
        minifloat("float8_e8m0fnu", 8, 0, signed=False, has_nan=True, storage="float8_e8m0fnu"),
        *(_integer(bits, True) for bits in (2, 3, 4, 5, 6, 7, 8, 16)),
        *(_integer(bits, False) for bits in (2, 3, 4, 5, 6, 7, 8, 16)),
        codebook_format(_NF4, name="nf4"),
        codebook_format(_FP4, name="fp4"),
    ]
    one = {f.name: f for f in plain}
    power_of_two = one["float8_e8m0fnu"]
    blocks = [
        BlockFormat("mxfp8", one["float8_e4m3fn"], 32, power_of_two, False),
        BlockFormat("mxfp8_e5m2", one["float8_e5m2"], 32, power_of_two, False),
        BlockFormat("mxfp6", one["float6_e2m3fn"], 32, power_of_two, False),
        BlockFormat("mxfp6_e3m2", one["float6_e3m2fn"], 32, power_of_two, False),
        BlockFormat("mxfp4", one["float4_e2m1fn"], 32, power_of_two, False),
        BlockFormat("nvfp4", one["float4_e2m1fn"], 16, one["float8_e4m3fn"], True),
    ]
    return MappingProxyType({**one, **{f.name: f for f in blocks}})


FORMATS: Mapping[str, Format | BlockFormat] = _table()
"""Every named format, read-only."""

ALIASES: Mapping[str, str] = MappingProxyType(
    {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}
)
"""Short names that `get` accepts too, read-only."""


def get(format: Any) -> Format | BlockFormat:
    """The format of a name, a short alias or a dtype; a format is returned unchanged.

    Raises `ValueError` for anything else, with the known names and the nearest of them.

    >>> get("bf16").name
    'bfloat16'
    >>> get("int44")
    Traceback (most recent call last):
    ...
    ValueError: unknown format 'int44'; did you mean 'int4'? Known formats: float32, ...
    """
    if isinstance(format, (Format, BlockFormat)):
        return format
    name = format
    if not isinstance(format, str) and format is not None:
        try:
            name = np.dtype(format).name
        except TypeError:
            name = format
    if isinstance(name, str):
        fmt = FORMATS.get(ALIASES.get(name, name))
        if fmt is not None:
            return fmt
    known = [*FORMATS, *ALIASES]
    near = difflib.get_close_matches(str(name).lower(), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"unknown format {format!r}{hint} Known formats: {', '.join(known)}")
