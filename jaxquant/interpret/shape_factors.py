"""Runs of values in flattened order: how blocks and shapes split and merge."""

from __future__ import annotations

from collections.abc import Sequence


def split_block(block: int, sizes: Sequence[int]) -> list[int] | None:
    """Block sizes along `sizes` that make runs of `block` in flattened order, or `None`."""
    blocks: list[int] = []
    for n in reversed(sizes):
        if n and block % n == 0:
            blocks.append(n)
            block //= n
        elif n % block == 0:
            blocks.append(block)
            block = 1
        else:
            return None
    return blocks[::-1] if block == 1 else None


def merge_blocks(blocks: Sequence[int], sizes: Sequence[int]) -> int | None:
    """Inverse of `split_block`: the run length in flattened order, if runs are contiguous."""
    flat, full = 1, True
    for b, n in zip(reversed(blocks), reversed(sizes), strict=True):
        if n == 1:
            continue
        if full:
            flat *= b
            full = b == n
        elif b != 1:
            return None
    return flat


def factors(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cuts two shapes of equal size into the shortest runs of equal product."""
    runs, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, b, left, right = i, j, 1, 1
        while True:
            if left <= right and i < len(old) and (left < right or i == a):
                left, i = left * old[i], i + 1
            elif j < len(new) and (right < left or j == b):
                right, j = right * new[j], j + 1
            elif left == right:
                break
            else:  # the shapes differ in size
                raise AssertionError((old, new))
        runs.append((tuple(range(a, i)), tuple(range(b, j))))
    return runs
