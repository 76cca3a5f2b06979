"""`Gradients`: how the backward pass of a contraction quantizes gradients."""

from __future__ import annotations

import dataclasses

from jaxquant.qtensor.granularity import PerChannel, PerTensor
from jaxquant.qtensor.qspec import QSpec


@dataclasses.dataclass(frozen=True)
class Gradients:
    """How the gradient of a contraction's result is quantized for the backward contractions.

    For `y = x w` and `g = dL/dy`: `dx = Q_i(g) w'^T`, `dw = x'^T Q_w(g)`, with `x'` and `w'` the
    quantized operands of the forward pass. Scales of `x'` or `w'` along a contracted axis multiply
    `g` before it is quantized, with one scale for each index of the other axes.

    Attributes:
      input: spec of `g` for the gradient of the input; `None` contracts in float.
      weight: spec of `g` for the gradient of the weight; `None` contracts in float.
      stochastic: round `g` stochastically, so that gradients stay unbiased. Integers then take
        `range="qmax"`: by the other rules an extreme may be out of range of the codes.

    Raises:
      ValueError: neither spec, a granularity other than `PerTensor()` or `PerChannel()`, or a
        format other than signed integers or 8-bit floats.

    Source: stochastic rounding of gradients alone, Gupta et al., "Deep Learning with Limited
    Numerical Precision" (2015); scales for each contraction, AQT (2022).

    >>> Gradients(input=QSpec("int8"), weight=None).weight is None
    True
    """

    input: QSpec | None = QSpec("int8")
    weight: QSpec | None = QSpec("int8")
    stochastic: bool = True

    def __post_init__(self) -> None:
        if self.input is None and self.weight is None:
            raise ValueError("Gradients: expected a spec for input or weight, got neither")
        for name in ("input", "weight"):
            spec = getattr(self, name)
            if spec is None:
                continue
            if not isinstance(spec, QSpec):
                raise ValueError(f"Gradients: {name} takes a QSpec, got {spec!r}")
            fmt = spec.format
            if not fmt.signed or not (fmt.is_integer or (fmt.is_float and fmt.bits == 8)):
                raise ValueError(
                    f"Gradients: {name}: expected a signed integer or 8-bit float format, "
                    f"got {fmt.name}"
                )
            if self.stochastic and fmt.is_integer and spec.range != "qmax":
                spec = dataclasses.replace(spec, range="qmax")
                object.__setattr__(self, name, spec)
            if spec.granularity not in (PerTensor(), PerChannel()):
                raise ValueError(
                    f"Gradients: {name}: expected PerTensor() or PerChannel() (a scale for each "
                    f"index that is not contracted), got {spec.granularity!r}"
                )
