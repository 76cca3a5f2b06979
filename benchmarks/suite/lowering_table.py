"""The choices that a CPU's program is made by, each with what was measured of its forms.

`lowering.py` has the rules. Every row says which form the rules take for some shapes, and how long
that and the others took. `python benchmarks/lowering.py` measures the rows again, on any machine,
and says where it disagrees.
"""

from __future__ import annotations

import dataclasses

from jaxquant.ops.lowering import FUSES_SUMS


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of a contraction that a choice was measured at.

    Attributes:
      rows: of the activation; of a convolution, height and width of each of 8 images.
      inputs: contracted indices; input channels of a convolution.
      outputs: kept indices of the weight.
      group: how many contracted indices share a scale; 0 is all.
      format: of the weight.
      window: height and width of a convolution's window; 0 is a plain contraction.
      depthwise: whether each channel is convolved by itself.
    """

    rows: int
    inputs: int = 2048
    outputs: int = 2048
    group: int = 0
    format: str = "int8"
    window: int = 0
    depthwise: bool = False

    def __str__(self) -> str:
        """As a table shows it.

        >>> str(Case(1, group=128, format="int4")), str(Case(14, 256, 256, window=3))
        ('int4 g128, 2048 x 2048, 1 row', 'int8, 3 x 3, 8 x 14 x 14 x 256 to 256')
        """
        kind = self.format + (f" g{self.group}" if self.group else "")
        if self.window:
            image = f"8 x {self.rows} x {self.rows} x {self.inputs} to {self.outputs}"
            return f"{kind}, {self.window} x {self.window}, {image}" + ", dw" * self.depthwise
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        return f"{kind}, {self.inputs} x {self.outputs}, {rows}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One choice that a CPU's program is made by.

    Attributes:
      what: the question.
      case: shapes it was measured at.
      form: the answer there; `benchmarks/suite/forms.py` has the code of each form by itself.
      others: what else it might have been.
      before: the answer where JAX is older than 0.12, if it is one of `others`.
      times: by machine and JAX version, time relative to float32's of the form and the others.
    """

    what: str
    case: Case
    form: str
    others: tuple[str, ...]
    before: str
    times: dict[str, dict[str, float]]

    @property
    def chosen(self) -> str:
        """The answer by the JAX that is installed."""
        return self.form if FUSES_SUMS or not self.before else self.before


TABLE: tuple[Row, ...] = (
    Row(
        "a row of int8 alone",
        Case(1),
        "one loop",
        (
            "two rows",
            "one row",
        ),
        "two rows",
        {
            "JAX 0.12, AVX2": {"one loop": 0.51, "two rows": 0.87, "one row": 2.18},
            "JAX 0.10, AVX2": {"two rows": 0.85, "one row": 1.79},
        },
    ),
    Row(
        "order of the weight",
        Case(16),
        "contracted axis last",
        ("contracted axis first",),
        "",
        {
            "JAX 0.12, AVX2": {"contracted axis last": 0.24, "contracted axis first": 1.72},
            "JAX 0.10, AVX2": {"contracted axis last": 0.22, "contracted axis first": 1.53},
        },
    ),
    Row(
        "float rows, int8 weight",
        Case(1),
        "one loop, 15 bits",
        (
            "limbs",
            "converted",
        ),
        "limbs",
        {
            "JAX 0.12, AVX2": {"one loop, 15 bits": 0.51, "limbs": 0.88, "converted": 1.9},
            "JAX 0.10, AVX2": {"limbs": 0.93, "converted": 1.84},
        },
    ),
    Row(
        "float rows, int8 weight",
        Case(64),
        "limbs",
        ("converted",),
        "",
        {
            "JAX 0.12, AVX2": {"limbs": 1.08, "converted": 1.3},
            "JAX 0.10, AVX2": {"limbs": 1.31, "converted": 0.99},
        },
    ),
    Row(
        "int8 rows, 4 bits in groups",
        Case(1, group=128, format="int4"),
        "one loop",
        (
            "loop",
            "batch",
            "dequantized",
        ),
        "loop",
        {
            "JAX 0.12, AVX2": {
                "one loop": 0.52,
                "loop": 1.21,
                "batch": 4.57,
                "dequantized": 3.46,
            },
            "JAX 0.10, AVX2": {"loop": 1.39, "batch": 6.89, "dequantized": 2.5},
        },
    ),
    Row(
        "int8 rows, 4 bits in groups",
        Case(256, group=128, format="int4"),
        "loop",
        ("dequantized",),
        "",
        {
            "JAX 0.12, AVX2": {"loop": 1.05, "dequantized": 1.18},
            "JAX 0.10, AVX2": {"loop": 1.08, "dequantized": 1.04},
        },
    ),
    Row(
        "scales of a sum over groups",
        Case(64, group=128, format="int4"),
        "scales once",
        ("scales each",),
        "",
        {
            "JAX 0.12, AVX2": {"scales once": 0.84, "scales each": 1.59},
            "JAX 0.10, AVX2": {"scales once": 0.93, "scales each": 1.36},
        },
    ),
    Row(
        "float rows, 4 bits in groups",
        Case(1, group=128, format="int4"),
        "one loop, 15 bits",
        (
            "whole",
            "limbs",
        ),
        "limbs",
        {
            "JAX 0.12, AVX2": {"one loop, 15 bits": 0.55, "whole": 3.44, "limbs": 2.34},
            "JAX 0.10, AVX2": {"whole": 2.67, "limbs": 1.81},
        },
    ),
    Row(
        "float rows, 4 bits in groups",
        Case(64, group=128, format="int4"),
        "whole",
        ("limbs",),
        "",
        {
            "JAX 0.12, AVX2": {"whole": 1.44, "limbs": 1.54},
            "JAX 0.10, AVX2": {"whole": 1.16, "limbs": 1.67},
        },
    ),
    Row(
        "learned codebook",
        Case(16, format="palette4"),
        "whole",
        ("centroids",),
        "",
        {
            "JAX 0.12, AVX2": {"whole": 1.0, "centroids": 23.88},
            "JAX 0.10, AVX2": {"whole": 0.62, "centroids": 14.23},
        },
    ),
    Row(
        "codes of an activation",
        Case(256),
        "in one program",
        ("apart",),
        "",
        {
            "JAX 0.12, AVX2": {"in one program": 0.77, "apart": 0.75},
            "JAX 0.10, AVX2": {"in one program": 0.86, "apart": 0.85},
        },
    ),
    Row(
        "int8 convolution",
        Case(14, 256, 256, window=3),
        "direct",
        ("dots",),
        "",
        {
            "JAX 0.12, AVX2": {"direct": 0.69, "dots": 0.82},
            "JAX 0.10, AVX2": {"direct": 0.78, "dots": 0.91},
        },
    ),
    Row(
        "depthwise convolution",
        Case(28, 128, 128, window=3, depthwise=True),
        "shifted products",
        ("direct",),
        "",
        {
            "JAX 0.12, AVX2": {"shifted products": 0.06, "direct": 1.09},
            "JAX 0.10, AVX2": {"shifted products": 0.04, "direct": 1.22},
        },
    ),
)
"""One row for each choice, or several where it depends on the number of rows."""
