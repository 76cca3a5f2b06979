"""Observers that choose a range from a histogram: percentile, mean squared error, entropy.

A search takes a few milliseconds on the host per histogram, so the time grows with the number of
channels of `axis=`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from jaxquant.observers.base import Range, State, as_range, require_seen
from jaxquant.observers.histogram import Histogram, default_bins
from jaxquant.observers.noise import Bars, Floats, bars, noise
from jaxquant.qtensor import QSpec

Ends = tuple[float, float]


@dataclasses.dataclass(frozen=True, repr=False)
class Search(Histogram):
    """A histogram observer that chooses the range of each channel separately."""

    def choose(self, seen: Bars, spec: QSpec) -> Ends:
        """The range for one histogram."""
        return seen.low, seen.high

    def finish(self, state: State, spec: QSpec) -> Range:
        """The range from `choose` for each channel."""
        require_seen(state)
        host = {name: np.asarray(value) for name, value in state.items()}
        shape = host["exponent"].shape
        ranges = np.zeros((2, *shape), np.float32)
        for index in np.ndindex(*shape):
            ranges[(slice(None), *index)] = self.choose(bars(host, index), spec)
        return as_range(ranges[0], ranges[1])


@dataclasses.dataclass(frozen=True, repr=False)
class Percentile(Search):
    """The observer that `percentile` makes.

    Attributes:
      q: percentage of the values within the range.
    """

    name: ClassVar[str] = "percentile"

    q: float = 99.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.q <= 100:
            raise ValueError(f"percentile: expected 0 < q <= 100, got {self.q}")
        if self.q < 1:
            raise ValueError(
                f"percentile: q is in percent, such as 99.9, and {self.q} would clip nearly all; "
                f"did you mean {100 * self.q:g}?"
            )

    def choose(self, seen: Bars, spec: QSpec) -> Ends:
        """See `percentile`."""
        return percentile_range(seen, self.q, spec)


@dataclasses.dataclass(frozen=True, repr=False)
class MeanSquaredError(Search):
    """The observer that `mse` makes."""

    name: ClassVar[str] = "mse"

    def choose(self, seen: Bars, spec: QSpec) -> Ends:
        """See `mse`."""
        return mse_range(seen, spec)


@dataclasses.dataclass(frozen=True, repr=False)
class Entropy(Search):
    """The observer that `entropy` makes."""

    name: ClassVar[str] = "entropy"

    bins: int = 4096

    def choose(self, seen: Bars, spec: QSpec) -> Ends:
        """See `entropy`."""
        return entropy_range(seen, spec)


def percentile(
    q: float = 99.99, bins: int | None = None, axis: int | tuple[int, ...] | None = None
) -> Percentile:
    """The range that holds `q` percent of the values.

    For a symmetric spec `[-t, t]`, with `t` the `q`-th percentile of `|x|`; for an asymmetric one
    each tail loses half of the rest, `(100 - q) / 2` percent. An end is the outer edge of the bin
    that contains the percentile. So at most `100 - q` percent of the values are outside, and the
    end exceeds the exact percentile (an observed value) by at most one bin, `4 max|x| / bins`.

    Args:
      q: in percent, from 1 to 100; 100 gives the range of `minmax`.
      bins: a power of two; see `histogram`.
      axis: axes with separate ranges; `None`: one range per tensor.

    Raises:
      ValueError: `q` or `bins` outside their range.

    >>> import jax.numpy as jnp
    >>> x = jnp.arange(1000.0).at[0].set(1e4)
    >>> observer = percentile(99.9, bins=4096)
    >>> observer.finish(observer.update(observer.init(x), x), QSpec("int8")).high.tolist()
    1000.0
    """
    return Percentile(axis, default_bins(axis) if bins is None else bins, q)


def mse(bins: int | None = None, axis: int | tuple[int, ...] | None = None) -> MeanSquaredError:
    """The range with the least mean squared error from rounding inside and clipping outside.

    `argmin E (x - S (q(x) - Z))^2` over ranges shrunk from `[min, max]` by factors down to 1/128
    and then refined, with one factor for a symmetric spec, one per end for an asymmetric one.
    The expectation is over the histogram, with values spread evenly within a bin. Every format
    with a scale is supported.

    Args:
      bins: a power of two; see `histogram`.
      axis: axes with separate ranges; `None`: one range per tensor.

    >>> import jax
    >>> x = jax.random.normal(jax.random.key(0), (10000,))
    >>> state = mse().update(mse().init(x), x)
    >>> [round(float(mse().finish(state, QSpec(f)).high), 1) for f in ("int8", "int4")]
    [3.5, 2.4]
    """
    return MeanSquaredError(axis, default_bins(axis) if bins is None else bins)


def entropy(bins: int | None = None, axis: int | tuple[int, ...] | None = None) -> Entropy:
    """The range whose quantized distribution diverges least from the observed one.

    For each candidate `t = i w` the reference `P` is the histogram of `|x|` up to `t`, with the
    values beyond added to its last bin; `Q` merges the bins up to `t` into the spec's levels for
    magnitudes (128 for int8) and spreads each level evenly over its non-empty bins. The least
    `sum P log(P / Q)` wins; the widest range wins a tie. A candidate whose last bin is empty but
    receives outliers has infinite divergence. Exact zeros are left out: every spec has them.

    `P` and `Q` are both divided by the number of all values. TensorRT divides `Q` by its own sum,
    so outliers cost nothing: for data far from zero a range that ends in the first non-empty bin
    would win, as there `P` and `Q` are both one bin. A candidate with `M` of `N` values inside
    therefore costs `log(N / M)` more here: about the clipped fraction, as long as that is small.

    For an asymmetric spec the sides of zero are searched separately: with all `2^b` levels if
    the data lie on one side, with half of the levels each otherwise. Formats with at least as many
    levels as there are bins keep the full range.

    Args:
      bins: a power of two, half of it for either sign: by default 4096, for the usual 2048 of
        `|x|`, and 512 per channel.
      axis: axes with separate ranges; `None`: one range per tensor.

    Source: Migacz, "8-bit Inference with TensorRT" (GTC 2017).

    >>> import jax
    >>> x = jax.random.laplace(jax.random.key(0), (100000,))
    >>> state = entropy().update(entropy().init(x), x)
    >>> found = entropy().finish(state, QSpec("int8"))
    >>> bool(found.high < 0.9 * state["max"])
    True
    """
    return Entropy(axis, default_bins(axis, 4096) if bins is None else bins)


# --------------------------------------------------------------------------------------------------
# Searches on one histogram


def percentile_range(seen: Bars, q: float, spec: QSpec) -> Ends:
    """The range that holds `q` percent of the values; see `percentile`."""
    half = seen.counts.size // 2
    # decimal q: 99.9 percent of 1000 values are 999 values, not 999.0000000000001
    slack = min(1e-12 * seen.total, 0.5)
    if spec.symmetric:
        amax = max(-seen.low, seen.high)
        inside = seen.zeros + np.cumsum(_magnitudes(seen))
        t = min(_first(inside, q / 100 * seen.total - slack) * seen.width, amax)
        return -t, t
    outside = (100 - q) / 200 * seen.total
    below = np.cumsum(seen.counts) + np.where(np.arange(2 * half) < half, 0, seen.zeros)
    above = np.cumsum(seen.counts[::-1]) + np.where(np.arange(2 * half) < half, 0, seen.zeros)
    low = (half - _first(below, outside + slack, strict=True) + 1) * seen.width
    high = (half - _first(above, outside + slack, strict=True) + 1) * seen.width
    return -min(max(low, 0.0), -seen.low), min(max(high, 0.0), seen.high)


def _first(ascending: Floats, at_least: float, strict: bool = False) -> int:
    """The number of entries up to the first that reaches `at_least` (`strict`: exceeds it)."""
    index = np.searchsorted(ascending, at_least, "right" if strict else "left")
    return int(index) + 1


def _magnitudes(seen: Bars) -> Floats:
    """The histogram of `|x|` without zeros, `[bins / 2]`."""
    half = seen.counts.size // 2
    return seen.counts[half:] + seen.counts[:half][::-1]


# Factors on a range: coarse ones over seven octaves, finer ones around the best.
_COARSE_1 = 2.0 ** -(np.arange(8 * 7 + 1) / 8)
_FINE_1 = 2.0 ** -(np.arange(-8, 9) / 64)
_COARSE_2 = 2.0 ** -(np.arange(3 * 7 + 1) / 3)
_FINE_2 = 2.0 ** -(np.arange(-6, 7) / 18)


def mse_range(seen: Bars, spec: QSpec) -> Ends:
    """The range with the least expected squared error; see `mse`."""
    low, high = seen.low, seen.high
    if spec.symmetric:
        # the signed rule depends on which end is larger, so both shrink by one factor
        for grid in (_COARSE_1, _FINE_1):
            low, high = _best(seen, grid * low, grid * high, spec)
        return low, high
    for grid in (_COARSE_2, _FINE_2):
        # an end of 0 is one candidate; the widest range comes first, which wins a tie
        lows, highs = np.unique(grid * low), np.unique(grid * high)[::-1]
        pairs = np.meshgrid(lows, highs, indexing="ij")
        low, high = _best(seen, pairs[0].ravel(), pairs[1].ravel(), spec)
    return low, high


def _best(seen: Bars, low: Floats, high: Floats, spec: QSpec) -> Ends:
    low, high = np.maximum(low, seen.low), np.minimum(high, seen.high)
    best = int(np.argmin(noise(seen, low, high, spec)))
    return float(low[best]), float(high[best])


def entropy_range(seen: Bars, spec: QSpec) -> Ends:
    """The range whose quantized distribution diverges least; see `entropy`."""
    bits, half = spec.format.bits, seen.counts.size // 2
    if spec.symmetric:
        # signed formats have one level fewer above zero than below; 128 of 256 is usual
        levels = 2 ** (bits - 1) if spec.format.signed else 2**bits
        amax = max(-seen.low, seen.high)
        t = min(_least_divergent(_magnitudes(seen), levels) * seen.width, amax)
        return -t, t
    sides = seen.counts[:half][::-1], seen.counts[half:]
    levels = 2**bits if min(-seen.low, seen.high) == 0 else 2 ** (bits - 1)
    low, high = (_least_divergent(side, levels) * seen.width for side in sides)
    return -min(low, -seen.low), min(high, seen.high)


def _least_divergent(counts: Floats, levels: int) -> int:
    """The number of bins (of `[bins]`, from zero outwards) in the best range.

    With `P`, `Q` as in `entropy`, times the number `N` of values, and `q_g` the value of `Q` on the
    non-empty bins of level `g`, `N` times the divergence is `sum P log P - sum_g P_g log q_g`.
    Sums over bins are differences of running sums, so a candidate costs `O(levels)`.
    """
    occupied = np.flatnonzero(counts)
    last = int(occupied[-1]) + 1 if occupied.size else 0
    if last <= levels:
        return last
    counts = counts[:last]
    running = np.concatenate([[0.0], np.cumsum(counts)])
    filled = np.concatenate([[0], np.cumsum(counts > 0)])
    logs = np.concatenate([[0.0], np.cumsum(_xlogx(counts))])
    sizes = np.arange(levels, last + 1)
    # bin b of i belongs to level floor(b levels / i), so level g starts at ceil(g i / levels)
    starts = -(-np.arange(levels + 1) * sizes[:, None] // levels)
    masses, occupied_bins = np.diff(running[starts]), np.diff(filled[starts])
    outside, final = running[-1] - running[sizes], counts[sizes - 1]
    self_term = logs[sizes] - _xlogx(final) + _xlogx(final + outside)
    log_q = np.log(np.where(masses > 0, masses / np.maximum(occupied_bins, 1), 1.0))
    cross_term = np.sum(masses * log_q, axis=1) + outside * log_q[:, -1]
    divergence = np.where((final == 0) & (outside > 0), np.inf, self_term - cross_term)
    best = divergence <= np.min(divergence) + 1e-12 * running[-1]
    return int(sizes[np.flatnonzero(best)[-1]])


def _xlogx(p: Floats) -> Floats:
    return p * np.log(np.where(p > 0, p, 1.0))
