"""The table of all numeric formats, as a mapping that prints itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jaxquant.numerics.formats import FORMATS, get
from jaxquant.numerics.records import BlockFormat, Format

_COLUMNS = (
    "name",
    "bits",
    "sign",
    "exponent",
    "mantissa",
    "bias",
    "largest",
    "smallest normal",
    "smallest subnormal",
    "epsilon",
    "decimal range",
    "bytes",
)
_BLOCK_COLUMNS = ("name", "block", "element", "scale", "global scale", "bits per value")


class FormatTable(Mapping[str, Format | BlockFormat]):
    """A read-only mapping of names to formats that prints itself as a table.

    Indexing works as `get`, so that an unknown name raises a `ValueError` that lists the known
    ones; `in` and iteration use full names only.

    >>> formats["int8"].max
    127.0
    >>> print(formats)  # doctest: +ELLIPSIS
    name ...
    float32 ...
    """

    def __init__(self, entries: Mapping[str, Format | BlockFormat] = FORMATS):
        self._entries = entries

    def __getitem__(self, name: str) -> Format | BlockFormat:
        return self._entries.get(name) or get(name)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return self.table()

    def table(self) -> str:
        """The formats as aligned plain text, block formats in a second part.

        The decimal range is that of `Format.decimal_range`: powers of ten from the smallest
        positive to the largest value. A dash marks a property that a format does not have.

        >>> formats.table().splitlines()[0].split()[:4]
        ['name', 'bits', 'sign', 'exponent']
        """
        entries = self._entries.values()
        plain = [_row(f) for f in entries if isinstance(f, Format)]
        blocks = [_block_row(f) for f in entries if isinstance(f, BlockFormat)]
        parts = [_aligned(_COLUMNS, plain)] if plain else []
        parts += [_aligned(_BLOCK_COLUMNS, blocks)] if blocks else []
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Every property of every format as JSON-serialisable values, keyed by name.

        >>> formats.to_dict()["mxfp4"]["element"], formats.to_dict()["uint4"]["max"]
        ('float4_e2m1fn', 15.0)
        """
        return {name: _facts(f) for name, f in self._entries.items()}


formats = FormatTable()
"""Every named format: `formats["int4"]`, `print(formats)`."""


def _facts(f: Format | BlockFormat) -> dict[str, Any]:
    if isinstance(f, BlockFormat):
        return {
            "name": f.name,
            "element": f.element.name,
            "block": f.block,
            "scale": f.scale.name,
            "global_scale": f.global_scale,
            "bits": f.bits,
            "bytes": f.bytes,
        }
    return {
        "name": f.name,
        "bits": f.bits,
        "bytes": f.bytes,
        "signed": f.signed,
        "exponent_bits": f.exponent_bits,
        "mantissa_bits": f.mantissa_bits,
        "bias": f.bias,
        "has_inf": f.has_inf,
        "has_nan": f.has_nan,
        "min": f.min,
        "max": f.max,
        "smallest_normal": f.smallest_normal,
        "smallest_subnormal": f.smallest_subnormal,
        "epsilon": f.epsilon,
        "decimal_range": list(f.decimal_range),
        "storage": f.storage,
        "codebook": None if f.codebook is None else list(f.codebook),
    }


def _row(f: Format) -> tuple[str, ...]:
    low, high = f.decimal_range
    return (
        f.name,
        str(f.bits),
        str(int(f.signed)),
        _number(f.exponent_bits),
        _number(f.mantissa_bits),
        _number(f.bias),
        _number(f.max),
        _number(f.smallest_normal),
        _number(f.smallest_subnormal),
        _number(f.epsilon),
        f"10^{low:.1f} .. 10^{high:.1f}",
        f"{f.bytes:g}",
    )


def _block_row(f: BlockFormat) -> tuple[str, ...]:
    shared = "float32" if f.global_scale else "-"
    return (f.name, str(f.block), f.element.name, f.scale.name, shared, f"{f.bits:g}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.7g}"


def _aligned(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Left-aligned names, other columns right-aligned, a rule under the header."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [columns, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
