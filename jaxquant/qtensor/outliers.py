"""Outlier columns of activations, which contractions keep in float (LLM.int8())."""

from __future__ import annotations

import dataclasses
import numbers


@dataclasses.dataclass(frozen=True)
class Outliers:
    """Which columns of an activation an integer contraction keeps in float.

    Columns of `x` `[rows, K]` with any `|x| >= threshold` go through a float product with the
    dequantized rows of the weight, and the others through integers, with scales that the outliers
    do not enlarge. At most `capacity` columns stay in float: of more outliers, those with the
    largest magnitudes; the others are quantized with their rows.

    Attributes:
      threshold: the smallest magnitude of an outlier.
      capacity: the maximum number of columns, an integer, or a fraction of all as a float.
      calibrated: take the columns with the largest magnitudes in calibration samples, instead of
        finding them at run time.

    Raises:
      ValueError: a threshold or a capacity that is not positive, or a fraction above 1.

    Source: Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale"
    (2022), section 3.

    >>> Outliers(capacity=0.01).columns(4096), Outliers(capacity=64).columns(48)
    (41, 48)
    """

    threshold: float = 6.0
    capacity: int | float = 64
    calibrated: bool = False

    def __post_init__(self) -> None:
        threshold: object = self.threshold
        real = isinstance(threshold, numbers.Real) and not isinstance(threshold, bool)
        if not real or not self.threshold > 0:
            raise ValueError(f"Outliers: threshold: expected above 0, got {self.threshold!r}")
        most = self.capacity
        if isinstance(most, bool) or not isinstance(most, (int, float)) or not most > 0:
            raise ValueError(f"Outliers: capacity: expected above 0, got {most!r}")
        if isinstance(most, float) and most > 1:
            raise ValueError(f"Outliers: capacity: expected a fraction up to 1, got {most!r}")

    def columns(self, size: int) -> int:
        """The capacity in columns, for `size` columns in all."""
        most = -(-size * self.capacity // 1) if isinstance(self.capacity, float) else self.capacity
        return min(int(most), size)
