"""Numeric formats: properties, codes, rounding, and packing of sub-byte codes."""

from jaxquant.numerics.bitpattern import decode_bits, encode_bits
from jaxquant.numerics.codec import decode, encode
from jaxquant.numerics.elementwise import clamp, is_nan, number, select
from jaxquant.numerics.formats import ALIASES, FORMATS, codebook_format, get, minifloat
from jaxquant.numerics.packing import pack, packed_bytes, padded_size, tile_size, unpack
from jaxquant.numerics.policy import compute_dtype
from jaxquant.numerics.records import BlockFormat, Format
from jaxquant.numerics.rounding import nearest_even, stochastic, to_codebook

__all__ = [
    "ALIASES",
    "FORMATS",
    "BlockFormat",
    "Format",
    "clamp",
    "codebook_format",
    "compute_dtype",
    "decode",
    "decode_bits",
    "encode",
    "encode_bits",
    "get",
    "is_nan",
    "minifloat",
    "nearest_even",
    "number",
    "pack",
    "packed_bytes",
    "padded_size",
    "select",
    "stochastic",
    "tile_size",
    "to_codebook",
    "unpack",
]
