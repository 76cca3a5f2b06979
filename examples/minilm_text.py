"""Sentences to padded batches of token ids, in few lengths so that little is compiled."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

# Tokens a sentence is padded to. Two lengths keep compilation short; of the 1,000 snippets (5 to
# 66 tokens, median 26) 694 fit the first and one is cut to the second.
BUCKETS = (32, 64)
BATCH = 32


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sentences padded to one length: where they came from, and ids and mask [batch, length]."""

    indices: np.ndarray
    ids: np.ndarray
    mask: np.ndarray


def make_batches(
    tokenizer_file: pathlib.Path,
    sentences: Sequence[str],
    buckets: Sequence[int],
    size: int,
) -> list[Batch]:
    """Batches of `size` sentences, each padded to the smallest bucket that holds it.

    Sentences longer than the last bucket are truncated to it. A batch that is not full is filled
    up with copies of its first sentence, so that every bucket compiles once; `indices` names the
    real ones only.
    """
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max(buckets))
    tokens = [encoding.ids for encoding in tokenizer.encode_batch(list(sentences))]
    batches, shorter = [], 0
    for bucket in sorted(buckets):
        members = [i for i, t in enumerate(tokens) if shorter < len(t) <= bucket]
        shorter = bucket
        for start in range(0, len(members), size):
            real = members[start : start + size]
            filled = real + [real[0]] * (size - len(real))
            ids = np.zeros((size, bucket), np.int32)
            mask = np.zeros((size, bucket), bool)
            for row, i in enumerate(filled):
                ids[row, : len(tokens[i])] = tokens[i]
                mask[row, : len(tokens[i])] = True
            batches.append(Batch(np.asarray(real), ids, mask))
    return batches
