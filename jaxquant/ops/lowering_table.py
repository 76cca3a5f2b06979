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
    Row("a row of int8 alone", Case(1), "one loop", ("two rows", "one row"), "two rows", {}),
    Row("side of the weight", Case(4), "weight left", ("weight right",), "", {}),
    Row(
        "order of the weight", Case(16), "contracted axis last", ("contracted axis first",), "", {}
    ),
    Row(
        "float rows, int8 weight", Case(1), "one loop, 15 bits", ("limbs", "converted"), "limbs", {}
    ),
    Row("float rows, int8 weight", Case(64), "limbs", ("converted",), "", {}),
    Row(
        "int8 rows, 4 bits in groups",
        Case(1, group=128, format="int4"),
        "one loop",
        ("halves", "loop", "batch", "dequantized"),
        "loop",
        {},
    ),
    Row(
        "int8 rows, 4 bits in groups",
        Case(16, group=128, format="int4"),
        "halves",
        ("loop", "batch", "dequantized"),
        "loop",
        {},
    ),
    Row(
        "int8 rows, 4 bits in groups",
        Case(256, group=128, format="int4"),
        "loop",
        ("dequantized",),
        "",
        {},
    ),
    Row(
        "scales of a sum over groups",
        Case(64, group=128, format="int4"),
        "scales once",
        ("scales each",),
        "",
        {},
    ),
    Row(
        "float rows, 4 bits in groups",
        Case(1, group=128, format="int4"),
        "one loop, 15 bits",
        ("whole", "limbs"),
        "limbs",
        {},
    ),
    Row(
        "float rows, 4 bits in groups",
        Case(64, group=128, format="int4"),
        "tiles",
        ("whole", "limbs"),
        "",
        {},
    ),
    Row(
        "float rows, 3 bits in groups",
        Case(16, group=128, format="int3"),
        "tiles",
        ("whole",),
        "",
        {},
    ),
    Row(
        "float rows, 2 bits in groups",
        Case(16, group=128, format="int2"),
        "tiles",
        ("whole",),
        "",
        {},
    ),
    Row("codebook of a format", Case(1, group=64, format="nf4"), "tiles", ("whole",), "", {}),
    Row("codebook of a format", Case(16, group=64, format="nf4"), "tiles", ("whole",), "", {}),
    Row("learned codebook", Case(16, format="palette4"), "tiles", ("whole", "centroids"), "", {}),
    Row("codes of an activation", Case(256), "in one program", ("apart",), "", {}),
    Row("int8 convolution", Case(14, 256, 256, window=3), "direct", ("dots",), "", {}),
    Row(
        "depthwise convolution",
        Case(28, 128, 128, window=3, depthwise=True),
        "shifted products",
        ("direct",),
        "",
        {},
    ),
    Row(
        "convolution, packed kernel",
        Case(14, 128, 128, format="int4", window=3),
        "float",
        ("direct",),
        "",
        {},
    ),
)
"""One row for each choice, or several where it depends on the number of rows."""
