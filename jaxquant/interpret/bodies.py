"""Bodies of loops: how a loop's operands and results map to those of the jaxpr that it repeats."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from jaxquant.interpret import _compat

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Body:
    """The jaxpr that a loop repeats: constants, carries and slices in, carries and results out.

    Attributes:
      jaxpr: the open jaxpr.
      consts: its constants.
      n_consts: how many operands are constant over the loop.
      n_carry: how many are carries.
    """

    jaxpr: Any
    consts: list[Any]
    n_consts: int
    n_carry: int

    @property
    def kept(self) -> list[bool]:
        """Which carries leave the body as the variable that came in."""
        came = self.jaxpr.invars[self.n_consts : self.n_consts + self.n_carry]
        return [a is b for a, b in zip(came, self.jaxpr.outvars[: self.n_carry], strict=True)]

    def split(self, operands: Sequence[T]) -> tuple[list[T], list[T], list[T]]:
        """Operands of the loop, or of the body, as constants, carries and what is scanned."""
        at = self.n_consts + self.n_carry
        consts, carry, xs = operands[: self.n_consts], operands[self.n_consts : at], operands[at:]
        return list(consts), list(carry), list(xs)


def scan_body(eqn: Any) -> Body:
    """The body of a `scan`."""
    return Body(*_compat.body(eqn), *_compat.scan_split(eqn.params))


def while_body(eqn: Any) -> Body:
    """The body of a `while`; its operands are those after the condition's own constants."""
    p = eqn.params
    count = len(eqn.invars) - p["cond_nconsts"] - p["body_nconsts"]
    return Body(*_compat.opened(p["body_jaxpr"]), p["body_nconsts"], count)
