"""Text as characters: ten plays of Shakespeare, or the few lines here, split and cut into rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import _data
import numpy as np


class Text(NamedTuple):
    """Characters as indices into `alphabet`, int32 `[n]`, in two parts; and the text's name."""

    name: str
    alphabet: str
    train: np.ndarray
    valid: np.ndarray

    def read(self, codes: np.ndarray) -> str:
        """The characters of indices."""
        return "".join(self.alphabet[i] for i in codes)

    def codes(self, characters: str) -> np.ndarray:
        """The indices of characters."""
        return np.array([self.alphabet.index(c) for c in characters], np.int32)


def shakespeare() -> Text:
    """Ten plays, the last tenth of each for validation.

    Raises:
      RuntimeError: they are neither in the cache nor can be downloaded; the message says more.
    """
    return split("ten plays of Shakespeare", _data.plays())


def few_lines() -> Text:
    """Three sonnets, where nothing can be downloaded; too few to learn from."""
    return split("three sonnets of Shakespeare", [SONNETS])


def split(name: str, texts: list[str]) -> Text:
    """Characters of all texts, the last tenth of each for validation."""
    alphabet = "".join(sorted(set("".join(texts))))
    index = np.zeros(128, np.int32)
    index[[ord(c) for c in alphabet]] = np.arange(len(alphabet))
    codes = [index[np.frombuffer(text.encode("ascii"), np.uint8)] for text in texts]
    ends = [len(c) * 9 // 10 for c in codes]
    train = np.concatenate([c[:end] for c, end in zip(codes, ends, strict=True)])
    valid = np.concatenate([c[end:] for c, end in zip(codes, ends, strict=True)])
    return Text(name, alphabet, train, valid)


def batches(
    codes: np.ndarray, steps: int, rows: int, length: int, seed: int = 0
) -> Iterator[tuple[np.ndarray]]:
    """Rows of `length + 1` characters `[rows, length + 1]` from places chosen at random."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        start = rng.integers(0, len(codes) - length, rows)
        yield (codes[start[:, None] + np.arange(length + 1)],)


def in_order(codes: np.ndarray, rows: int, length: int) -> np.ndarray:
    """All of a text in order, `[batches, rows, length + 1]`; what is left over is dropped.

    Neighbours share one character, which is the last to be predicted and the first to be read.
    """
    count = (len(codes) - 1) // (rows * length)
    if count < 1:
        raise ValueError(f"expected at least {rows * length + 1} characters, got {len(codes)}")
    start = np.arange(count * rows) * length
    found = codes[start[:, None] + np.arange(length + 1)]
    return found.reshape(count, rows, length + 1)


# In the public domain since long (1609).
SONNETS = """\
Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date:
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
And every fair from fair sometime declines,
By chance, or nature's changing course untrimm'd:
But thy eternal summer shall not fade,
Nor lose possession of that fair thou ow'st,
Nor shall death brag thou wander'st in his shade,
When in eternal lines to time thou grow'st,
  So long as men can breathe, or eyes can see,
  So long lives this, and this gives life to thee.

When, in disgrace with fortune and men's eyes,
I all alone beweep my outcast state,
And trouble deaf heaven with my bootless cries,
And look upon myself, and curse my fate,
Wishing me like to one more rich in hope,
Featur'd like him, like him with friends possess'd,
Desiring this man's art, and that man's scope,
With what I most enjoy contented least;
Yet in these thoughts myself almost despising,
Haply I think on thee, and then my state,
Like to the lark at break of day arising
From sullen earth, sings hymns at heaven's gate;
  For thy sweet love remember'd such wealth brings
  That then I scorn to change my state with kings.

Let me not to the marriage of true minds
Admit impediments. Love is not love
Which alters when it alteration finds,
Or bends with the remover to remove:
O, no! it is an ever-fixed mark,
That looks on tempests and is never shaken;
It is the star to every wandering bark,
Whose worth's unknown, although his height be taken.
Love's not Time's fool, though rosy lips and cheeks
Within his bending sickle's compass come;
Love alters not with his brief hours and weeks,
But bears it out even to the edge of doom.
  If this be error and upon me prov'd,
  I never writ, nor no man ever lov'd.
"""
