"""Outlier columns of activations, which contractions keep in float (LLM.int8())."""

from __future__ import annotations

import dataclasses
import numbers


@dataclasses.dataclass(frozen=True)
class Outliers:
    """Which columns of an activation a contraction on integers keeps in float.

    Columns of `x` `[rows, K]` with any `|x| >= threshold` go through a float product with the
    dequantized rows of the weight, and the rest through integers, with scales that the outliers
    do not widen. There is place for `capacity` columns: where more are outliers, those of the
    largest magnitudes are kept in float, and the others are quantized with their rows.

    Attributes:
      threshold: the magnitude from which a value is an outlier.
      capacity: how many columns at most, an integer, or a fraction of all as a float.
      calibrated: the columns are those of the largest magnitudes in calibration samples, and are
        not looked for at run time.

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
        given = self.capacity
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not given > 0:
            raise ValueError(f"Outliers: capacity: expected above 0, got {given!r}")
        if isinstance(given, float) and given > 1:
            raise ValueError(f"Outliers: capacity: expected a fraction up to 1, got {given!r}")

    def columns(self, size: int) -> int:
        """For how many of `size` columns there is place."""
        most = -(-size * self.capacity // 1) if isinstance(self.capacity, float) else self.capacity
        return min(int(most), size)
