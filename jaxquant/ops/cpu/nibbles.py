"""Contractions of packed 4-bit codes, without unpacking them in order.

`numerics.packing` stores codes `j` and `j + tile / 2` of a tile in one byte. Unpacking has to
concatenate the halves, at a fifth of the speed of plain arithmetic on a CPU. So the halves stay
separate, `sum_k x_k w_k = sum_j x_j low_j + sum_j x_{j + tile / 2} high_j`, and the small
activation is split instead of the weight.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from jaxquant.numerics import tile_size, unpack
from jaxquant.ops.operands import Operand, Placement, int8_codes
from jaxquant.qtensor import QTensor


def fits(q: QTensor, at: Placement) -> bool:
    """Whether codes have 4 bits, are packed along a contracted axis, and tiles divide its groups.

    >>> import jax, jaxquant as jq
    >>> from jaxquant.ops.operands import place
    >>> w = jax.random.normal(jax.random.key(0), (256, 8))
    >>> q = jq.quantize(w, jq.QSpec("int4", jq.PerGroup(128, axis=0)))
    >>> fits(q, place(q, (0,), ()))
    True
    """
    if q.spec.format.bits != 4 or not at.contract or at.varies:
        return False
    last = at.contract[-1]
    size = at.padded[last]
    run = at.block(last) if last in at.split else size
    tile = tile_size(size)
    return last == len(at.padded) - 1 and size % 8 == 0 and run % tile == 0 == run % 8


def unpacked(w: Operand) -> Operand:
    """The operand with int8 codes in order; unchanged if it is not packed."""
    fmt = w.packed
    if fmt is None:
        return w
    size = 2 * w.values.shape[-1]
    codes = unpack(w.values, 4, size, fmt.signed and fmt.is_integer)
    return dataclasses.replace(w, values=int8_codes(codes, fmt)[0], packed=None)


def halves(
    x: Operand, w: Operand, shifted: bool = True
) -> tuple[tuple[Operand, Operand], tuple[Operand, Operand]]:
    """Two pairs of operands whose products add up to that of `x` and a packed `w`.

    With `shifted`, signed codes are multiplied by 16 and their scales divided by 16.
    """
    *lead, size = x.values.shape
    tile = tile_size(size)
    tiles = x.values.reshape(*lead, size // tile, 2, tile // 2)

    def of_x(half: int) -> Operand:
        part = lax.index_in_dim(tiles, half, tiles.ndim - 2, keepdims=False)
        return dataclasses.replace(x, values=part.reshape(*lead, size // 2))

    low, high = _parts(w, shifted)
    return (of_x(0), low), (of_x(1), high)


def _parts(w: Operand, shifted: bool) -> tuple[Operand, Operand]:
    """The codes in the low halves of the bytes, and in the high ones."""
    fmt = w.packed
    assert fmt is not None

    def of_w(values: Array, times: int) -> Operand:
        scale = w.scale if times == 1 or w.scale is None else w.scale / times
        zero = w.zero if w.zero is None else w.zero * times
        return dataclasses.replace(w, values=values, scale=scale, zero=zero, packed=None)

    if fmt.is_integer and fmt.signed:
        # left in the high bits, codes are 16 times as large and need no sign extension
        both = lax.bitcast_convert_type(w.values, jnp.int8)
        if not shifted:
            return of_w((both << 4) >> 4, 1), of_w(both >> 4, 1)
        return of_w(both << 4, 16), of_w(both & -16, 16)
    codes = int8_codes(w.values & 15, fmt)[0], int8_codes(w.values >> 4, fmt)[0]
    return of_w(codes[0], 1), of_w(codes[1], 1)


def reordered(values: Array) -> Array:
    """Values in the order of the codes that `low_then_high` returns.

    >>> reordered(jnp.arange(8)).tolist() == list(range(8))  # one tile: its halves are in order
    True
    """
    *lead, size = values.shape
    tile = tile_size(size)
    if tile == size:
        return values
    tiles = values.reshape(*lead, size // tile, 2, tile // 2)
    return jnp.swapaxes(tiles, -3, -2).reshape(values.shape)


def low_then_high(w: Operand) -> Operand:
    """A packed operand as int8 codes, all low halves of its bytes before all high ones.

    Signed codes are multiplied by 16 and their scales divided by 16.
    """
    if w.packed is None:
        return w
    low, high = _parts(w, True)
    return dataclasses.replace(low, values=jnp.concatenate([low.values, high.values], axis=-1))
