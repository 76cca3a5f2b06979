"""The size of codes after Huffman coding."""

from __future__ import annotations

import heapq
import itertools

import numpy as np
from numpy.typing import ArrayLike


def huffman_bits(counts: ArrayLike) -> float:
    """Mean bits per value of an optimal prefix code: `sum_k n_k l_k / sum_k n_k`.

    `l_k` are the lengths of Huffman's code for each histogram. Codes that never occur have no
    length; if only one code occurs, it takes no bits. The table is not counted.

    Args:
      counts: occurrences of each code, `[levels]`, or `[..., levels]` for several codebooks, each
        with its own prefix code.

    Raises:
      ValueError: no counts, negative ones, or ones that are not finite.

    Source: Han et al., "Deep Compression", arXiv 1510.00149, section 4; Huffman, "A method for the
    construction of minimum-redundancy codes" (1952).

    >>> huffman_bits([4, 2, 1, 1]), huffman_bits([5, 0])
    (1.75, 0.0)
    """
    array = np.asarray(counts, np.float64)
    if array.ndim < 1 or not array.size or not array.sum() > 0:
        raise ValueError(f"huffman_bits: expected counts, got {array.tolist()}")
    if not np.all(np.isfinite(array) & (array >= 0)):
        raise ValueError("huffman_bits: expected counts that are finite and not negative")
    rows = array.reshape(-1, array.shape[-1])
    return float(sum(_coded(row) for row in rows) / array.sum())


def _coded(counts: np.ndarray) -> float:
    """Total bits: each merge of two subtrees adds one bit to every value in them."""
    order = itertools.count()
    heap = [(n, next(order)) for n in counts.tolist() if n > 0]
    heapq.heapify(heap)
    total = 0.0
    while len(heap) > 1:
        merged = heapq.heappop(heap)[0] + heapq.heappop(heap)[0]
        total += merged
        heapq.heappush(heap, (merged, next(order)))
    return total
