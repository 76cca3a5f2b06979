"""Encodes real arrays to codes of a format and decodes them, one code per element."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jaxquant.numerics.bitpattern import decode_bits, encode_bits
from jaxquant.numerics.elementwise import clamp, is_nan, select
from jaxquant.numerics.formats import get
from jaxquant.numerics.records import Format
from jaxquant.numerics.rounding import nearest_even, stochastic, to_codebook


def encode(x: ArrayLike, format: Any, *, key: Array | None = None) -> Array:
    """The codes of the values nearest to `x`.

    `code = round(clip(x, min, max))`: ties go to the even code (in a codebook to the lower value),
    and values outside the finite range, infinities included, are clipped. With a `key`, rounding is
    stochastic, to one of the two neighbouring values, so that `decode(encode(x))` has expectation
    `x` inside the range. NaN becomes NaN where the format has one, else the code of zero (in a
    codebook the value nearest to zero).

    Args:
      x: real numbers of any shape, read as float32.
      format: a `Format` or its name.
      key: a PRNG key for stochastic rounding.

    Returns:
      Codes of the same shape, dtype `format.storage`.

    Raises:
      ValueError: unknown format, a block format (its values need a block's scale), complex `x`.

    >>> encode(jnp.array([0.5, 1.5, -300.0]), "int8").tolist()
    [0, 2, -128]
    """
    f = _element(format)
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise ValueError(f"expected real numbers, got {x.dtype}")
    storage = jnp.dtype(f.storage)
    if f.is_float:
        codes = encode_bits(x, f, key=key)
        return codes if codes.dtype == storage else lax.bitcast_convert_type(codes, storage)
    x = x.astype(jnp.float32)
    if f.codebook is not None:
        return to_codebook(x, f.codebook, key).astype(storage)
    x = clamp(f.min, select(is_nan(x), 0.0, x), f.max)
    return (nearest_even(x) if key is None else stochastic(x, key)).astype(storage)


def decode(codes: ArrayLike, format: Any, dtype: DTypeLike = jnp.float32) -> Array:
    """The values of unpacked codes, rounded to `dtype`.

    Args:
      codes: codes as from `encode`: any shape, dtype `format.storage`.
      format: a `Format` or its name.
      dtype: a floating-point dtype for the result.

    Returns:
      Values of the same shape, exact in float32.

    Raises:
      ValueError: unknown or block format, or codes with a dtype other than `format.storage`.

    >>> decode(encode(jnp.array([0.1, -0.9]), "nf4"), "nf4").tolist()
    [0.07958029955625534, -1.0]
    """
    f = _element(format)
    codes = jnp.asarray(codes)
    if codes.dtype != jnp.dtype(f.storage):
        raise ValueError(f"codes of {f.name} are {f.storage}, got {codes.dtype}")
    if f.codebook is not None:
        return _lookup(codes, f.codebook, dtype)
    if f.is_float and jnp.issubdtype(codes.dtype, jnp.integer):
        return decode_bits(codes, f).astype(dtype)
    # A conversion op, which XLA matches when it chooses a kernel. It keeps subnormals.
    return codes.astype(dtype)


def _lookup(codes: Array, values: tuple[float, ...], dtype: DTypeLike) -> Array:
    if len(values) > 16:
        return jnp.take(jnp.asarray(values, dtype), codes, mode="clip")
    # A tree of selects over the code's bits: as fast as a gather on CPU, one fused elementwise
    # operation elsewhere, and it needs no output sharding on meshes with explicit axes.
    bits = (len(values) - 1).bit_length()
    padded = values + values[-1:] * (2**bits - len(values))
    level = [jnp.asarray(v, dtype) for v in padded]
    for bit in range(bits):
        odd = (codes >> bit) & 1 == 1
        level = [jnp.where(odd, hi, lo) for lo, hi in zip(level[::2], level[1::2], strict=True)]
    return jnp.broadcast_to(level[0], codes.shape)


def _element(format: Any) -> Format:
    fmt = get(format)
    if isinstance(fmt, Format):
        return fmt
    raise ValueError(
        f"{fmt.name!r} is a block format: its codes are those of {fmt.element.name!r} "
        "after division by a scale for each block"
    )
