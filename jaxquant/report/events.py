"""Events of the interpreter, and edges between integer layers."""

from __future__ import annotations

import dataclasses

from jaxquant.report.text import shown


@dataclasses.dataclass(frozen=True)
class Event:
    """An action of the interpreter that costs memory, time or accuracy.

    Attributes:
      kind: `"dequantized"`, `"policy"`, ...
      where: key path or scope.
      primitive: name of the JAX primitive that caused it.
      message: one sentence for the reader.

    >>> print(Event("dequantized", "encoder/x", "add", "the weight met an elementwise op"))
    dequantized by add at encoder/x: the weight met an elementwise op
    """

    kind: str
    where: str
    primitive: str = ""
    message: str = ""

    def __str__(self) -> str:
        text = self.kind
        text += f" by {self.primitive}" if self.primitive else ""
        text += f" at {self.where}" if self.where else ""
        return text + (f": {self.message}" if self.message else "")


@dataclasses.dataclass(frozen=True)
class Edge:
    """Where the result of an integer contraction goes.

    Attributes:
      source: key of the site.
      target: key of the site that uses the result, or an operation and its scope.
      integer: whether the result stays integer up to the target.
      reason: why it does not.

    >>> print(Edge("conv1/kernel", "add in block", False, "add of two activations"))
    conv1/kernel -> add in block: float, add of two activations
    """

    source: str
    target: str
    integer: bool
    reason: str = ""

    def __str__(self) -> str:
        how = "int8" if self.integer else f"float, {self.reason}"
        return f"{shown(self.source)} -> {shown(self.target)}: {how}"
