"""How long contractions take relative to float: what was measured, as a table, and its look-up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

import jax

from jaxquant.qtensor import Outliers, PerChannel, PerGroup, PerTensor, QSpec

Op = Literal["dense", "conv", "depthwise"]

SIZE = 2048
"""Dense layers were measured with weights of this size by itself."""

MEASURABLE = 1 << 24
"""Contractions of less than this `Load.time` are bound by the cost of a call, and not judged."""

DEPTHWISE_COST = 150.0
"""Float time of one product of a depthwise convolution, over that of a dense layer, on a CPU."""

COLUMNS: Mapping[Op, tuple[int, ...]] = MappingProxyType(
    {"dense": (1, 2, 16, 64, 256, 1024), "conv": (27, 128, 576, 2304), "depthwise": (9,)}
)
"""What the columns of a table are: rows of a dense layer, products summed by a convolution."""


class Kind(NamedTuple):
    """What the time of a contraction depends on, besides its shape.

    Attributes:
      family: of the weights' format: `integer`, `float` or `codebook`.
      bits: of one code.
      group: how many contracted values share a scale; `None` where all do.
      activations: `integer`, `float8`, `float` where they are not quantized, or `outliers` where
        they are integers but for some columns.
    """

    family: str
    bits: int
    group: int | None
    activations: str


class Timing(NamedTuple):
    """One row of a table.

    Attributes:
      kind: of which weights and activations; `group` is the least that the row holds for.
      ratios: time over float32's, by op one for each of `COLUMNS[op]`; `None` where not measured.
    """

    kind: Kind
    ratios: Mapping[Op, tuple[float | None, ...]]


def read(text: str) -> tuple[Timing, ...]:
    """The rows of a table as `python benchmarks/speed.py` prints them.

    >>> read("integer 4 64 float | 1 2 3 4 5 6 | 7 8 9 - | 0.5")[0].ratios["conv"]
    (7.0, 8.0, 9.0, None)
    """
    rows = []
    for line in text.strip().splitlines():
        head, *parts = line.split("|")
        family, bits, group, activations = head.split()
        kind = Kind(family, int(bits), None if group == "-" else int(group), activations)
        ratios = {
            op: tuple(None if figure == "-" else float(figure) for figure in part.split())
            for op, part in zip(COLUMNS, parts, strict=True)
        }
        rows.append(Timing(kind, ratios))
    return tuple(rows)


# weights: family, bits, group; activations | dense at 1, 2, 16, 64, 256, 1024 rows
# | convolutions of 27, 128, 576, 2304 products | depthwise ones. Medians of 9 rounds on 2 cores of
# an AMD EPYC (VNNI: of 15, from docs/results.md), JAX 0.12.0.1 and 0.10.2; where jaxquant
# computes otherwise now than when it was measured there is a `-`. The AVX2 machine was busy with
# other work: read one digit, and put there what `python benchmarks/speed.py` prints on a quiet one.
_AVX2_12 = """
integer  8   - integer  | 0.64 0.25 0.18 0.57 0.66 0.66 | 1.47 1.50 1.00 0.71 | 0.06
integer  8   - float    | 0.63 0.31 0.41 0.96 1.32 0.93 | 1.25 1.16 1.20 1.03 | 0.04
integer  8   - outliers | 1.09 0.57 0.32 0.57 0.75 0.77 | 1.31 1.40 0.95 0.73 | 0.05
integer  4 128 integer  | 0.37 0.37 0.40 1.23 1.43 1.44 | 0.92 1.46 1.48 1.07 | 0.08
integer  4 128 float    | 0.31 0.27 0.65 1.34 1.20 0.98 | 1.23 1.13 0.94 1.03 | 0.06
integer  4  32 integer  | 4.37 2.02 1.43 1.71 1.27 1.03 | 1.44 1.41 1.24 1.02 | 0.08
integer  4  32 float    | 3.60 2.59 1.15 1.80 1.25 0.97 | 1.21 1.07 1.08 1.00 | 0.06
integer  4   - integer  | 1.20 0.40 0.31 0.71 0.76 0.66 | 0.92 1.50 1.17 1.03 | 0.06
integer  4   - float    | 1.05 0.47 0.47 1.14 1.38 0.97 | 1.25 1.14 1.19 1.01 | 0.04
float    8   - float8   | 1.81 2.04 1.03 1.40 1.11 1.19 | 2.29 1.77 1.55 1.08 | 0.19
float    8   - float    | 2.21 2.05 1.02 1.24 1.11 1.16 | 1.16 1.10 0.96 1.01 | 0.12
float    4  32 float    | 2.67 2.29 1.15 1.97 1.21 1.06 | 1.28 0.97 1.03 1.09 | 0.09
codebook 4  64 float    | 3.31 2.28 1.22 1.85 1.21 1.03 | 1.41 1.01 1.16 1.10 | 0.15
codebook 4   - float    | 2.59 2.03 1.06 1.22 1.18 1.00 | 1.08 1.14 1.16 1.06 | 0.13
"""
_VNNI_12 = """
integer  8   - integer  |    - 0.44 0.42 0.33 0.30 0.29 |    - 0.70 0.42 0.30 | 0.07
integer  8   - float    |    - 0.44 0.53 0.51 0.53 1.04 |    - 1.02 1.03 1.03 | 0.05
integer  4 128 integer  |    -    -    -    -    -    - |    - 1.35 1.12 1.09 | 0.13
integer  4 128 float    |    -    -    -    -    - 1.06 |    - 1.07 1.01 1.06 | 0.12
float    8   - float8   | 1.66 1.73 1.42 1.14 1.10 1.09 |    - 1.54 1.15 1.05 | 0.19
float    4  32 float    |    -    -    -    -    - 1.06 |    - 1.03 1.02 1.07 | 0.15
codebook 4  64 float    |    -    -    -    -    - 1.07 |    - 1.09 1.01 1.06 | 0.18
"""
_AVX2_10 = """
integer  8   - integer  | 0.46 0.37 0.17 0.62 0.77 0.70 | 3.79 1.12 0.86 0.80 | 0.03
integer  8   - float    | 0.44 0.34 0.40 1.39 1.38 1.01 | 1.24 1.12 1.12 1.10 | 0.02
integer  8   - outliers | 0.99 0.61 0.33 0.95 0.83 0.83 | 2.73 1.15 1.04 0.84 | 0.03
integer  4 128 integer  | 0.48 0.40 0.40 1.39 1.33 1.48 | 1.29 1.49 1.07 1.13 | 0.06
integer  4 128 float    | 0.59 0.47 0.69 1.63 1.12 1.05 | 1.00 1.18 1.61 0.78 | 0.04
integer  4  32 integer  | 3.57 2.59 1.09 2.49 1.17 1.14 | 1.22 1.46 1.02 0.91 | 0.06
integer  4  32 float    | 3.12 2.66 1.18 2.49 1.24 1.07 | 1.08 0.99 0.85 1.03 | 0.03
integer  4   - integer  | 0.71 0.56 0.24 0.87 0.80 0.84 | 1.21 1.48 1.24 0.77 | 0.03
integer  4   - float    | 0.97 0.53 0.39 1.59 1.68 1.08 | 1.01 1.18 1.19 0.88 | 0.02
float    8   - float8   | 1.70 2.25 0.75 1.93 1.17 1.09 | 1.12 1.64 1.29 1.07 | 0.13
float    8   - float    | 1.69 1.88 0.93 1.71 1.08 1.06 | 1.09 1.03 1.02 0.80 | 0.08
float    4  32 float    | 1.81 1.66 0.96 1.68 1.25 1.07 | 1.10 1.00 1.07 1.04 | 0.04
codebook 4  64 float    | 2.54 2.99 1.40 2.47 1.10 1.04 | 1.04 1.03 1.13 1.08 | 0.11
codebook 4   - float    | 1.62 1.80 0.97 1.29 1.15 1.08 | 1.19 1.14 0.88 1.05 | 0.11
"""
_VNNI_10 = """
integer  8   - integer  | 0.81 0.46 0.64 0.65 0.68 0.70 |    - 0.94 0.78 0.80 | 0.06
integer  8   - float    | 0.68 0.76 0.94 1.14 1.30 1.06 |    - 1.04 1.00 1.02 | 0.07
integer  4 128 integer  |    -    -    -    -    -    - |    - 1.31 1.06 1.08 | 0.09
integer  4 128 float    |    -    - 2.15 1.46 1.21 1.06 |    - 1.04 1.00 1.05 | 0.08
float    8   - float8   | 1.57 3.45 1.95 1.23 1.17 1.11 |    - 1.48 1.13 1.10 | 0.14
float    4  32 float    | 1.26 3.19 1.30 1.21 1.15 1.06 |    - 1.02 1.02 1.06 | 0.09
codebook 4  64 float    | 2.43 3.34 2.41 1.34 1.15 1.04 |    - 1.01 1.01 1.06 | 0.11
"""

TIMES: Mapping[str, Mapping[tuple[int, int], Mapping[str, tuple[Timing, ...]]]] = MappingProxyType(
    {
        "cpu": {
            (0, 10): {"EPYC, AVX2": read(_AVX2_10), "EPYC, AVX512-VNNI": read(_VNNI_10)},
            (0, 12): {"EPYC, AVX2": read(_AVX2_12), "EPYC, AVX512-VNNI": read(_VNNI_12)},
        }
    }
)
"""What was measured, by platform, by the JAX since which it holds, and by machine."""


def kind_of(
    spec: QSpec,
    activations: QSpec | None = None,
    outliers: Outliers | None = None,
    summed: int | None = None,
) -> Kind | None:
    """The kind of contractions with weights in `spec`, or `None` for those in tiles.

    One group for all of the `summed` values is none.

    >>> import jaxquant as jq
    >>> kind_of(jq.int4(group=64), jq.int8())
    Kind(family='integer', bits=4, group=64, activations='integer')
    """
    fmt, granularity = spec.format, spec.granularity
    if not isinstance(granularity, (PerTensor, PerChannel, PerGroup)):
        return None
    group = granularity.size if isinstance(granularity, PerGroup) else None
    if group is not None and summed is not None and group >= summed:
        group = None
    family = "integer" if fmt.is_integer else "codebook" if fmt.is_codebook else "float"
    other = "float"
    if activations is not None:
        other = "integer" if activations.format.is_integer else f"float{activations.format.bits}"
        other = "outliers" if outliers is not None else other
    return Kind(family, fmt.bits, group, other)


class Load(NamedTuple):
    """How much one contraction with a parameter computes.

    Attributes:
      op: which of those that were measured it is; `None` for any other.
      rows: how many rows, or positions of a convolution, meet the weight.
      summed: how many products are summed for one result.
      weights: how many values the weight has.
      calls: how often it is computed in one call of the function.
    """

    op: Op | None
    rows: int
    summed: int
    weights: int
    calls: int = 1

    @property
    def time(self) -> float:
        """The float time of all calls, in products of a dense layer: `weights (rows + 16) calls`.

        What does not depend on rows is reading the weight, which on a CPU takes as long as 16 rows.

        >>> Load("dense", 1, 10, 100).time
        1700.0
        """
        cost = DEPTHWISE_COST if self.op == "depthwise" else 1.0
        return cost * self.weights * (self.rows + 16) * self.calls


def ratio(
    platform: str, load: Load, kind: Kind | None, version: tuple[int, int] | None = None
) -> tuple[float, float] | None:
    """Time of a contraction over its time in float32, of the fastest and of the slowest machine.

    Of the columns the nearest is taken, as ratios of sizes go, and of rows for smaller groups
    than these the one for the largest.

    Args:
      platform: one of JAX's.
      load: the contraction.
      kind: of its operands.
      version: of JAX, by default that of the one that runs.

    Returns:
      Both, or `None` where nothing is known.

    >>> ratio("tpu", Load("dense", 1, 2048, 2048 * 2048), Kind("integer", 8, None, "float"))
    """
    if kind is None or load.op is None or load.time < MEASURABLE * load.calls:
        return None
    version = jax.__version_info__[:2] if version is None else version
    since = [v for v in TIMES.get(platform, ()) if v <= version]
    machines = TIMES[platform][max(since)] if since else {}
    found = [_on_machine(rows, load.op, load, kind) for rows in machines.values()]
    known = [figure for figure in found if figure is not None]
    return (min(known), max(known)) if known else None


def _on_machine(rows: Sequence[Timing], op: Op, load: Load, kind: Kind) -> float | None:
    held = [
        row
        for row in rows
        if row.kind._replace(group=None) == kind._replace(group=None)
        and _least(row.kind) <= _least(kind)
    ]
    if not held:
        return None
    size = max(load.rows if op == "dense" else load.summed, 1)
    columns = COLUMNS[op]
    nearest = min(range(len(columns)), key=lambda n: abs(math.log(columns[n] / size)))
    return max(held, key=lambda row: _least(row.kind)).ratios[op][nearest]


def _least(kind: Kind) -> float:
    return math.inf if kind.group is None else kind.group
