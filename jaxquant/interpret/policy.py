"""`Policy`: the interpreter's decisions and callbacks while it walks a jaxpr."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from jaxquant.interpret import _compat
from jaxquant.interpret.values import Facts, Value

if TYPE_CHECKING:
    from jaxquant.interpret.evaluate import Interpreter


@dataclasses.dataclass(frozen=True)
class Contraction:
    """One contraction as the interpreter meets it.

    Attributes:
      eqn: the equation.
      keys: the site's key; several where parameters were concatenated.
      lhs: left operand.
      rhs: right operand.
      rest: further operands (group sizes of a ragged dot).
      scope: the name scopes around it.
    """

    eqn: Any
    keys: tuple[str, ...]
    lhs: Value
    rhs: Value
    rest: tuple[Value, ...]
    scope: tuple[str, ...]


class Policy:
    """What to do at a site; the base class computes as the function did.

    Policies return data; the interpreter tracks the facts.

    Attributes:
      inline_rules: whether a custom derivative rule is lost where its body is entered.
      keeps_rules: whether the rule still gives the gradient where its body is entered.
      ahead: whether results of concrete params alone are computed while tracing.
      rules: rules for control flow, by primitive, that override `control_flow.RULES`.
    """

    inline_rules = False
    keeps_rules = False
    ahead = False
    rules: ClassVar[Mapping[str, Callable[..., list[Value]]]] = {}

    def contract(self, ip: Interpreter, site: Contraction) -> Any:
        """The contraction's result."""
        data = [site.lhs.data, site.rhs.data, *(v.data for v in site.rest)]
        return _compat.bind(site.eqn, data)[0]

    def lookup(self, eqn: Any, key: str, operand: Value) -> None:
        """Called for each `gather` of rows of a parameter."""

    def meets(self, eqn: Any, operand: Value) -> None:
        """Called for each parameter that is used other than by contraction, lookup or layout."""

    def kept(self, ip: Interpreter, eqn: Any, operands: list[Value], results: list[Any]) -> None:
        """Called for each equation between contractions that is computed on integers."""

    def leaves(self, ip: Interpreter, data: Any, where: str | None, reason: str) -> None:
        """Called for each integer activation that becomes float, with the reason.

        `where` is `None` for a result of the function.
        """

    def jit_key(self, ip: Interpreter, facts: list[Facts], scope: tuple[str, ...]) -> tuple | None:
        """What else two calls of one jitted helper must share to be transformed once.

        `None`: the helper is evaluated in place, as if it were not jitted.
        """
        return (tuple((f.live, f.nonneg, f.origin is not None) for f in facts),)

    def enters_rules(self, ip: Interpreter, jaxpr: Any, operands: list[Value]) -> bool:
        """Whether a `custom_jvp` or `custom_vjp` body must be entered."""
        return False


def param_first(lhs: Value, rhs: Value) -> list[Value]:
    """The operands that are parameters; one that depends on inputs (looked-up rows) is last."""
    return sorted((v for v in (rhs, lhs) if v.is_param), key=lambda v: v.facts.live)
