"""bitsandbytes' quantization in NumPy, written from its formulas: float32, one operation a step."""

from __future__ import annotations

import itertools

import numpy as np

F32 = np.float32
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    F32,
)  # fmt: skip
# by bit pattern: sign, two bits of exponent, one of mantissa
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], F32) / F32(12)
TABLES = {"nf4": NF4, "fp4": FP4}


def order(name: str) -> np.ndarray:
    """The code of bitsandbytes for each value of a table in ascending order."""
    return np.argsort(TABLES[name], kind="stable")


def quantize_4bit(w: np.ndarray, name: str, block: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """`(codes, absmax)` of a flattened array, a code for each value."""
    flat, rank = w.reshape(-1).astype(F32), order(name)
    values = TABLES[name][rank]
    bounds = (values[:-1] + values[1:]) / F32(2)
    codes, absmax = [], []
    for start in range(0, flat.size, block):
        x = flat[start : start + block]
        amax = np.max(np.abs(x))
        if x.size == block:
            scaled = x * (F32(1) / max(amax, F32(1e-38)))
        else:
            amax = max(amax, F32(1e-38))
            scaled = x / amax
        absmax.append(amax)
        codes.append(rank[np.searchsorted(bounds, np.clip(scaled, -1, 1), side="left")])
    return np.concatenate(codes), np.array(absmax, F32)


def packed(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte, the first in the high nibble."""
    codes = np.pad(codes, (0, codes.size % 2)).astype(np.uint8)
    return (codes[::2] << 4 | codes[1::2])[:, None]


def dynamic_map() -> np.ndarray:
    """The signed 8-bit map, rounded to float32 at every step as `create_dynamic_map` does."""
    values = [0.0, 1.0]
    for i in range(7):
        n = 2**i
        step = np.float64((F32(1) - F32(0.1)) / F32(n))
        ends = [
            F32(np.float64(F32(0.1)) + step * k) if k < (n + 1) // 2 else F32(1.0 - step * (n - k))
            for k in range(n + 1)
        ]
        for low, high in itertools.pairwise(ends):
            value = F32(10.0 ** (i - 6)) * ((low + high) / F32(2))
            values += [float(value), -float(value)]
    return np.array(sorted(values), F32)


def quantize_8bit(x: np.ndarray, block: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """`(codes, absmax)` by the CPU build's table of 65,536 steps over `[-1, 1]`."""
    table = dynamic_map()
    middle = F32(0.5) * (table[:-1] + table[1:])
    steps = F32(-1.0 + 2.0 * np.arange(65536) / 65535)
    lookup = np.searchsorted(middle, steps, side="left").astype(np.uint8)
    codes, absmax = [], []
    for start in range(0, x.size, block):
        part = x[start : start + block].astype(F32)
        amax = np.max(np.abs(part))
        absmax.append(amax)
        if amax == 0:
            codes.append(np.zeros(part.size, np.uint8))
            continue
        v = np.clip(part * (F32(1) / amax), F32(-1), F32(1))
        index = (((v + F32(1)) * F32(0.5)) * F32(65535) + F32(0.5)).astype(np.int64)
        codes.append(lookup[index])
    return np.concatenate(codes), np.array(absmax, F32)


def dequantize_8bit(codes: np.ndarray, absmax: np.ndarray, block: int = 256) -> np.ndarray:
    """The values that codes stand for."""
    return dynamic_map()[codes] * np.repeat(absmax, block)[: codes.size]


def vectorwise(x: np.ndarray, threshold: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(codes, absmax, outlier columns)` of the rows of a matrix: LLM.int8()'s activations."""
    x = x.astype(F32)
    big = (np.abs(x) >= threshold) if threshold else np.zeros(x.shape, bool)
    rest = np.where(big, F32(0), x)
    amax = np.max(np.abs(rest), axis=1)
    unit = F32(127) / np.where(amax == 0, F32(1), amax)
    codes = np.rint(rest * unit[:, None]).astype(np.int8)
    columns = np.flatnonzero(big.any(axis=0))
    codes[:, columns] = 0
    return codes, amax, columns
