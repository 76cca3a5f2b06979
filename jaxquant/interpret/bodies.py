"""Loop bodies: how a loop's operands and results map to those of its body's jaxpr."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from jaxquant.interpret import _compat

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Body:
    """A loop's body, from constants, carries and slices to carries and results.

    Attributes:
      jaxpr: the open jaxpr.
      consts: its constants.
      n_consts: number of operands that are constant over the loop.
      n_carry: number of carries.
    """

    jaxpr: Any
    consts: list[Any]
    n_consts: int
    n_carry: int

    @property
    def kept(self) -> list[bool]:
        """For each carry, whether the body returns it unchanged."""
        carries = self.jaxpr.invars[self.n_consts : self.n_consts + self.n_carry]
        return [a is b for a, b in zip(carries, self.jaxpr.outvars[: self.n_carry], strict=True)]

    def split(self, operands: Sequence[T]) -> tuple[list[T], list[T], list[T]]:
        """Splits operands of the loop or the body into constants, carries and scanned inputs."""
        at = self.n_consts + self.n_carry
        consts, carry, xs = operands[: self.n_consts], operands[self.n_consts : at], operands[at:]
        return list(consts), list(carry), list(xs)


def scan_body(eqn: Any) -> Body:
    """The body of a `scan`."""
    return Body(*_compat.body(eqn), *_compat.scan_split(eqn.params))


def while_body(eqn: Any) -> Body:
    """The body of a `while`; its operands are those after the condition's constants."""
    p = eqn.params
    count = len(eqn.invars) - p["cond_nconsts"] - p["body_nconsts"]
    return Body(*_compat.opened(p["body_jaxpr"]), p["body_nconsts"], count)
