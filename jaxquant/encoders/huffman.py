"""The size that codes would have if frequent ones were written in fewer bits."""

from __future__ import annotations

import heapq
import itertools

import numpy as np
from numpy.typing import ArrayLike


def huffman_bits(counts: ArrayLike) -> float:
    """Mean bits per value of an optimal prefix code: `sum_k n_k l_k / sum_k n_k`.

    The lengths `l_k` are those of Huffman's code for each histogram; a code that never occurs gets
    none, and one alone takes no bits. The table itself is not counted.

    Args:
      counts: how often each code occurs, `[levels]`, or `[..., levels]` of several codebooks, which
        have a prefix code each.

    Raises:
      ValueError: no counts, negative ones, or ones that are not finite.

    Source: Han et al., "Deep Compression", arXiv 1510.00149, section 4; Huffman, "A method for the
    construction of minimum-redundancy codes" (1952).

    >>> huffman_bits([4, 2, 1, 1]), huffman_bits([5, 0])
    (1.75, 0.0)
    """
    given = np.asarray(counts, np.float64)
    if given.ndim < 1 or not given.size or not given.sum() > 0:
        raise ValueError(f"huffman_bits: expected counts, got {given.tolist()}")
    if not np.all(np.isfinite(given) & (given >= 0)):
        raise ValueError("huffman_bits: expected counts that are finite and not negative")
    rows = given.reshape(-1, given.shape[-1])
    return float(sum(_coded(row) for row in rows) / given.sum())


def _coded(counts: np.ndarray) -> float:
    """Bits that all values take: each merge of two subtrees is one more bit for what is in them."""
    order = itertools.count()
    heap = [(n, next(order)) for n in counts.tolist() if n > 0]
    heapq.heapify(heap)
    total = 0.0
    while len(heap) > 1:
        both = heapq.heappop(heap)[0] + heapq.heappop(heap)[0]
        total += both
        heapq.heappush(heap, (both, next(order)))
    return total
