"""A Pallas kernel that contracts float rows with packed 4-bit codes.

It reads packed bytes and scales block by block; neither unpacked codes nor a dequantized weight
are written to memory. One kernel body serves TPUs (Mosaic) and NVIDIA GPUs (Triton); only blocks
differ. Mosaic GPU would need a Hopper GPU and another body; but JAX from 0.11 on warns that Pallas
will drop Triton.

It has run in Pallas' interpret mode and has been compiled for accelerators. It has not run on one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.numerics import Format, tile_size

PLATFORMS = ("tpu", "cuda")

_LANES = 128  # of a TPU vector
_ROOM = 1 << 21  # bytes of one block on a TPU: 16 MiB hold all blocks, each of them twice


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which bytes of a packed row share scales.

    Attributes:
      size: bytes of a row, half the number of codes.
      run: number of consecutive bytes that share scales.
      apart: whether the low and the high halves of a run belong to different groups.
    """

    size: int
    run: int
    apart: bool

    @classmethod
    def of(cls, size: int, group: int) -> Layout | None:
        """For rows of `size` codes in groups of `group`; `None` if a group ends inside half a tile.

        >>> Layout.of(256, 128), Layout.of(128, 32)
        (Layout(size=128, run=64, apart=False), Layout(size=64, run=32, apart=True))
        """
        tile = tile_size(size)
        if size % 8 or size % group:
            return None
        if group % tile == 0:
            return cls(size // 2, group // 2, False)
        return cls(size // 2, group, True) if (tile // 2) % group == 0 else None

    def arranged(self, a: Array, tile: int) -> Array:
        """Scales `[n, groups]` as `[1, runs, n]`, or `[2, runs, n]` for low and high halves."""
        if not self.apart:
            return a.T[None]
        n, groups = a.shape
        halves = a.reshape(n, -1, 2, tile // 2 // self.run)
        return halves.transpose(2, 1, 3, 0).reshape(2, groups // 2, n)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The block sizes of one step of the kernel.

    Attributes:
      platform: `"tpu"` or `"cuda"`.
      rows: rows of the activation.
      outs: rows of the weight, which are columns of the result.
      chunk: bytes of a row of the weight that are unpacked at a time.
    """

    platform: str
    rows: int
    outs: int
    chunk: int


def blocks_for(platform: str, rows: int, outs: int, layout: Layout, itemsize: int) -> Blocks | None:
    """Blocks for `rows` rows of `itemsize` bytes a value; `None` if the shape is not supported.

    Mosaic takes blocks of 128-wide vectors, or full axes. Triton takes powers of two, at least
    16, which must divide the axes, since accesses beyond them are not masked.

    >>> blocks_for("tpu", 3, 512, Layout(1024, 64, False), 2)
    Blocks(platform='tpu', rows=16, outs=512, chunk=128)
    >>> blocks_for("cuda", 3, 512, Layout(1024, 64, False), 2)
    Blocks(platform='cuda', rows=16, outs=64, chunk=64)
    """
    if platform == "tpu":
        limit = 4 * _LANES
        chunk = math.lcm(layout.run, _LANES) if layout.run % _LANES else _LANES
        if chunk > limit or layout.size % chunk:
            chunk = layout.size
        fits = [n for n in (512, 256, 128) if outs % n == 0] or [outs]
        fits = [n for n in fits if n * layout.size <= _ROOM and n <= 1024]
        most = _ROOM // (2 * layout.size * itemsize) // 16 * 16
        if chunk > limit or not fits or most == 0:
            return None
        steps = -(-rows // min(most, 256))
        return Blocks(platform, _up(-(-rows // steps), 16), fits[0], chunk)
    # three stages of both operands have to fit into 99 KiB of shared memory
    chunk, step = _power(layout.run, 128 // itemsize), _power(outs, 64)
    if chunk < 16 or step < 16:
        return None
    return Blocks(platform, min(64, max(16, 1 << (rows - 1).bit_length())), step, chunk)


def packed_product(
    x: Array,
    codes: Array,
    scale: Array,
    zero: Array | None,
    fmt: Format,
    blocks: Blocks,
    dtype: Any,
    interpret: bool = False,
) -> Array:
    """`y[m, n] = sum_g s[n, g] sum_{k in g} x[m, k] (v(c[n, k]) - z[n, g])`, `v` values of codes.

    Args:
      x: float32 or bfloat16 `[m, k]`.
      codes: uint8 `[n, k / 2]`, packed as by `numerics.pack`.
      scale: float32 `[n, g]`, each for `k / g` consecutive codes.
      zero: float32 `[n, g]`, or `None`.
      fmt: any format of 4 bits.
      blocks: from `blocks_for`.
      dtype: of the result.
      interpret: runs the kernel as ordinary JAX operations.

    Returns:
      `[m, n]`, summed in float32.
    """
    # imported here, since it takes half as long as all of jaxquant
    from jax.experimental import pallas as pl

    rows, size = x.shape
    outs, groups = scale.shape
    tile = tile_size(size)
    layout = Layout.of(size, size // groups)
    assert layout is not None
    # halves of bytes are contracted separately, so the activation is split and not the weight
    split = x.reshape(rows, size // tile, 2, tile // 2).transpose(2, 0, 1, 3)
    split = split.reshape(2, rows, size // 2)
    split = jnp.pad(split, [(0, 0), (0, _up(rows, blocks.rows) - rows), (0, 0)])
    grouped = [layout.arranged(a, tile) for a in (scale, zero) if a is not None]
    grid = (outs // blocks.outs, split.shape[1] // blocks.rows)
    of_groups = pl.BlockSpec((*grouped[0].shape[:2], blocks.outs), lambda n, m: (0, 0, n))
    out = pl.pallas_call(
        functools.partial(_body, layout=layout, chunk=blocks.chunk, fmt=fmt),
        out_shape=jax.ShapeDtypeStruct((split.shape[1], outs), dtype),
        grid=grid,  # rows vary fastest, so that each block of the weight is read once
        in_specs=[
            pl.BlockSpec((2, blocks.rows, layout.size), lambda n, m: (0, m, 0)),
            pl.BlockSpec((blocks.outs, layout.size), lambda n, m: (n, 0)),
            *[of_groups] * len(grouped),
        ],
        out_specs=pl.BlockSpec((blocks.rows, blocks.outs), lambda n, m: (m, n)),
        compiler_params=_compiler_params(blocks.platform),
        interpret=interpret,
        name="packed_product",
    )(split, codes, *grouped)
    return out[:rows]


def _body(x_ref: Any, codes_ref: Any, *refs: Any, layout: Layout, chunk: int, fmt: Format) -> None:
    """Computes one block of the result, chunk by chunk of the weight."""
    from jax.experimental import pallas as pl

    *grouped, out_ref = refs
    runs = max(1, chunk // layout.run)
    dtype = x_ref.dtype
    # by default Mosaic rounds float32 to bfloat16, and Triton to 19 bits
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    table = _table(fmt)

    def step(c: Any, total: Array) -> Array:
        at = pl.ds(pl.multiple_of(c * chunk, chunk), chunk)
        # in 32 bits: Mosaic does not shift bytes (https://github.com/jax-ml/jax/issues/38986)
        both = codes_ref[:, at].astype(jnp.int32)
        values = [v.astype(dtype) for v in (_values(both & 15, table), _values(both >> 4, table))]
        rows = [x_ref[half, :, at] for half in (0, 1)]
        for i in range(runs):
            first = c * runs + i if chunk >= layout.run else c // (layout.run // chunk)
            parts = []
            for half in (0, 1):
                masked = rows[half]
                if runs > 1:  # a masked product costs no more than one of a slice of the vector
                    lane = lax.broadcasted_iota(jnp.int32, masked.shape, 1)
                    masked = jnp.where(lane // layout.run == i, masked, jnp.zeros_like(masked))
                part = lax.dot_general(
                    masked, values[half], (((1,), (1,)), ((), ())),
                    precision=precision, preferred_element_type=jnp.float32,
                )  # fmt: skip
                if len(grouped) == 2:
                    ones = jnp.sum(masked.astype(jnp.float32), axis=1, keepdims=True)
                    part -= ones * grouped[1][half * layout.apart, pl.ds(first, 1), :]
                parts.append(part)
            if not layout.apart:
                parts = [parts[0] + parts[1]]
            for half, part in enumerate(parts):
                total += part * grouped[0][half, pl.ds(first, 1), :]
        return total

    total = jnp.zeros(out_ref.shape, jnp.float32)
    total = lax.fori_loop(0, layout.size // chunk, step, total)
    out_ref[...] = total.astype(out_ref.dtype)


def _table(fmt: Format) -> tuple[float, ...]:
    """The values of the 16 codes."""
    if fmt.codebook is not None:
        return fmt.codebook
    if fmt.is_integer:
        return tuple(float(c - 16 if c > fmt.qmax else c) for c in range(16))
    assert fmt.exponent_bits is not None and fmt.mantissa_bits is not None and fmt.bias is not None
    values = []
    for code in range(16):
        exponent, mantissa = divmod(code & 7, 1 << fmt.mantissa_bits)
        size = (mantissa / (1 << fmt.mantissa_bits) + (exponent > 0)) * 2.0 ** (
            max(exponent, 1) - fmt.bias
        )
        values.append(-size if code & 8 else size)
    return tuple(values)


def _values(codes: Array, table: tuple[float, ...]) -> Array:
    """Values of codes 0 to 15 in float32: of integers by arithmetic, else by selects."""
    if table[:8] == tuple(range(8)):
        signed = table[8] < 0
        return (((codes ^ 8) - 8) if signed else codes).astype(jnp.float32)
    values: list[Any] = list(table)
    for bit in range(4):
        odd = (codes & (1 << bit)) != 0
        values = [jnp.where(odd, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _compiler_params(platform: str) -> Any:
    if platform == "tpu":
        from jax.experimental.pallas import tpu

        return tpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"))
    from jax.experimental.pallas import triton

    return triton.CompilerParams(num_warps=4, num_stages=3)


def _up(n: int, to: int) -> int:
    """The next multiple of `to`."""
    return -(-n // to) * to


def _power(n: int, most: int) -> int:
    """The largest power of two, up to `most`, that divides `n`."""
    return min(n & -n, most)
