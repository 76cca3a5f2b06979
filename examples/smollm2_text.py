"""Texts as windows of tokens: six novels to calibrate and measure on, ten plays to measure on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import _data
import numpy as np
from tokenizers import Tokenizer

LENGTH = 256  # tokens of a window; all but the first are predicted
HELD_OUT = 5  # the last one in so many tokens of each novel or play is measured on


@dataclasses.dataclass(frozen=True)
class Texts:
    """Windows of tokens, int32 `[n, length]`."""

    calibration: np.ndarray
    austen: np.ndarray
    shakespeare: np.ndarray

    @property
    def measured(self) -> dict[str, np.ndarray]:
        """The windows that perplexity is measured on, by the name of their text."""
        return {"Austen": self.austen, "Shakespeare": self.shakespeare}


def texts(tokenizer: Tokenizer, windows: int = 64, calibration: int = 128) -> Texts:
    """Windows evenly spaced over the texts, none of which overlap.

    Of each of six novels and ten plays the last fifth is measured on. What calibrates is from the
    first four fifths of the novels.

    Raises:
      RuntimeError: the texts are neither in the cache nor can be downloaded; the message says more.
      ValueError: more windows than fit.
    """
    novels = [encode(tokenizer, text) for text in _data.novels()]
    plays = [encode(tokenizer, text) for text in _data.plays()]
    return Texts(
        spread([part[: _end(part)] for part in novels], calibration, LENGTH),
        spread([part[_end(part) :] for part in novels], windows, LENGTH),
        spread([part[_end(part) :] for part in plays], windows, LENGTH),
    )


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The tokens of a text, int32."""
    return np.array(tokenizer.encode(text).ids, np.int32)


def spread(parts: Sequence[np.ndarray], count: int, length: int) -> np.ndarray:
    """`count` windows `[count, length]`, evenly spaced over all places where one can stand.

    A place is a multiple of `length` within a part, so that windows neither overlap nor straddle
    two parts.

    Raises:
      ValueError: there are fewer places.
    """
    places = [
        part[i : i + length] for part in parts for i in range(0, len(part) - length + 1, length)
    ]
    if not 0 < count <= len(places):
        raise ValueError(f"windows of {length} tokens: expected 1 to {len(places)}, got {count}")
    return np.stack([places[(2 * i + 1) * len(places) // (2 * count)] for i in range(count)])


def _end(part: np.ndarray) -> int:
    return len(part) * (HELD_OUT - 1) // HELD_OUT
