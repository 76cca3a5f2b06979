"""The interpreter: evaluates a jaxpr in which parameters may be quantized.

Contractions go to a `Policy`; layout primitives move quantized values; control flow is entered
and emitted again as the same primitive; any other primitive dequantizes its `QTensor` operands,
which is reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.interpret import _compat, integers, layout, placed, primitives
from jaxquant.interpret.control_flow import RULES
from jaxquant.interpret.policy import Contraction, Policy, param_first
from jaxquant.interpret.scopes import site_scope
from jaxquant.interpret.slots import SiteValues
from jaxquant.interpret.values import Facts, Value, known_nonneg, merge, nonneg, varies
from jaxquant.ops import is_integers
from jaxquant.qtensor import dequantize, is_qtensor
from jaxquant.report import Event

_NOTHING = contextlib.nullcontext()


class Interpreter:
    """One evaluation of one traced function, with the state of that evaluation."""

    def __init__(
        self, policy: Policy, paths: Sequence[str], slots: SiteValues | None = None
    ) -> None:
        self.policy = policy
        self.paths = paths
        self.slots = SiteValues() if slots is None else slots
        self.events: dict[Event, None] = {}
        self.jits: dict[Any, Any] = {}
        self._keys: dict[tuple[int, ...], str] = {}
        self._uses: Counter[str] = Counter()
        self._path: tuple[int, ...] = ()
        self._alive: list[Any] = []
        self._contracts: dict[int, bool] = {}

    def run(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Value], scope: tuple[str, ...]
    ) -> list[Value]:
        """Evaluates a jaxpr on values."""
        env: dict[Any, Value] = {}
        signs: dict[Any, bool] = {}
        last = _last_uses(jaxpr)

        def read(var: Any) -> Value:
            return Value(var.val) if isinstance(var, _compat.Literal) else env[var]

        def write(var: Any, value: Value) -> None:
            env[var] = value
            signs[var] = value.facts.nonneg

        for var, const in zip(jaxpr.constvars, consts, strict=True):
            write(var, const if isinstance(const, Value) else Value(const))
        for var, arg in zip(jaxpr.invars, args, strict=True):
            write(var, arg)
        for n, eqn in enumerate(jaxpr.eqns):
            operands = [read(v) for v in eqn.invars]
            positive = [known_nonneg(signs, v) for v in eqn.invars]
            with _compat.context(eqn):
                results = self.equation(eqn, operands, positive, scope + _compat.name_parts(eqn))
            for var, value in zip(eqn.outvars, results, strict=True):
                write(var, value)
            for var in last.get(n, ()):
                env.pop(var, None)
        return [read(v) for v in jaxpr.outvars]

    def equation(
        self, eqn: Any, operands: list[Value], positive: list[bool], scope: tuple[str, ...]
    ) -> list[Value]:
        """Evaluates one equation."""
        name, row = eqn.primitive.name, primitives.of(eqn)
        outer, self._path = self._path, (*self._path, id(eqn))
        self._alive.append(eqn)  # an id is unique only while its object lives
        try:
            if row.kind == "contraction":
                return [self._contract(eqn, operands, positive, scope)]
            enter = self.policy.rules.get(name) or RULES.get(name)
            if any(is_integers(v.data) for v in operands) and row.kind != "call":
                with self._ahead(operands if row.integers == "affine" else ()):
                    results = integers.results(eqn, operands)
                if results is not None:
                    self.policy.kept(self, eqn, operands, results)
                    facts, signs = merge([v.facts for v in operands]), nonneg(eqn, positive)
                    return _valued(results, facts, None, signs, None)
                reason = integers.why(eqn, operands)
                operands = [self.in_float(v, scope, name, reason) for v in operands]
            if enter is not None and self._worth_entering(eqn, operands):
                return enter(self, eqn, operands, positive, scope)
            return self._plain(eqn, operands, positive, scope)
        finally:
            self._path = outer

    def _worth_entering(self, eqn: Any, operands: list[Value]) -> bool:
        return any(v.is_param or is_integers(v.data) for v in operands) or any(
            self.contracts(inner) for inner in _compat.inner_jaxprs(eqn)
        )

    @property
    def call_path(self) -> tuple[int, ...]:
        """Ids of the equations entered so far, outermost first."""
        return self._path

    def contracts(self, jaxpr: Any) -> bool:
        """Whether a jaxpr contains a contraction, at any depth."""
        known = self._contracts.get(id(jaxpr))
        if known is None:
            self._alive.append(jaxpr)
            known = any(
                primitives.of(eqn).kind == "contraction"
                or any(self.contracts(inner) for inner in _compat.inner_jaxprs(eqn))
                for eqn in jaxpr.eqns
            )
            self._contracts[id(jaxpr)] = known
        return known

    def _plain(
        self, eqn: Any, operands: list[Value], positive: list[bool], scope: tuple[str, ...]
    ) -> list[Value]:
        move = primitives.of(eqn).move
        facts = merge([v.facts for v in operands])
        signs = nonneg(eqn, positive)
        origin = layout.origin_of(eqn, operands)
        if move == "gather" and operands[0].is_param:
            self._lookup(eqn, operands[0], scope)
        elif origin is None and move != "barrier":
            for v in operands:
                if v.facts.origin is not None:
                    self.policy.meets(eqn, v)
        results = None
        if any(is_qtensor(v.data) for v in operands):
            results = layout.quantized_results(eqn, operands)
        if results is None:
            data = [self.dense(v, eqn, scope) for v in operands]
            with self._ahead(operands):
                results = _compat.bind(eqn, data)
        if move == "barrier":
            return [Value(r, v.facts) for r, v in zip(results, operands, strict=True)]
        over = None if facts.live else varies(eqn, operands)
        return _valued(results, facts, origin, signs, over)

    def _contract(
        self, eqn: Any, operands: list[Value], positive: list[bool], scope: tuple[str, ...]
    ) -> Value:
        signed = [
            Value(v.data, dataclasses.replace(v.facts, nonneg=p))
            for v, p in zip(operands, positive, strict=True)
        ]
        lhs, rhs = signed[0], signed[1]
        if lhs.is_param and rhs.is_param and not (lhs.facts.live or rhs.facts.live):
            return self._product(eqn, operands, scope)
        origins = [v.facts.origin for v in param_first(lhs, rhs) if v.facts.origin]
        params = [o.path for o in origins[0].parts] if origins else []
        bases = params or [site_scope(scope, self.paths) or _common(lhs, rhs) or eqn.primitive.name]
        keys = tuple(self.key(base, part) for part, base in enumerate(bases))
        # later sites without a parameter are named by this site's scope or its parameter's parent
        near = bases[0].rpartition("/")[0] if params else bases[0]
        site = Contraction(eqn, keys, lhs, rhs, tuple(signed[2:]), scope)
        live = lhs.facts.live or rhs.facts.live
        return Value(self.policy.contract(self, site), Facts(None, live, False, frozenset([near])))

    def _product(self, eqn: Any, operands: list[Value], scope: tuple[str, ...]) -> Value:
        """A product of two parameters is not a site: it is computed in float."""
        for v in operands[:2]:
            self.policy.meets(eqn, v)
        out = _compat.bind(eqn, [self.dense(v, eqn, scope) for v in operands])[0]
        return Value(out, merge([v.facts for v in operands]))

    def _lookup(self, eqn: Any, operand: Value, scope: tuple[str, ...]) -> None:
        origin = operand.facts.origin
        if origin is not None:
            self.policy.lookup(eqn, self.key(origin.path), operand)

    def key(self, base: str, part: int = 0) -> str:
        """The key of the site at this call path; repeats of `base` get `#k`, in order."""
        at = (*self._path, part)
        if at not in self._keys:
            count = self._uses[base]
            self._uses[base] += 1
            self._keys[at] = f"{base}#{count}" if count else base
        return self._keys[at]

    def dense(self, value: Value, eqn: Any, scope: tuple[str, ...]) -> Any:
        """The data as an ordinary array; dequantizing a `QTensor` is reported."""
        if is_integers(value.data):
            name = eqn.primitive.name
            return self.in_float(value, scope, name, integers.why(eqn, [value])).data
        if not is_qtensor(value.data):
            return value.data
        path = value.facts.origin.path if value.facts.origin else "a quantized value"
        name = eqn.primitive.name
        if value.facts.origin is not None and value.facts.origin.looked_up:
            return dequantize(value.data)  # only the rows looked up
        self.report("dequantized", path, name, f"in {self.where(scope)}")
        return dequantize(value.data)

    def _ahead(self, operands: Sequence[Value]) -> contextlib.AbstractContextManager[Any]:
        """With `policy.ahead`, the context in which results of concrete params are computed."""
        if not self.policy.ahead:
            return _NOTHING
        others = [v for v in operands if not is_integers(v.data)]
        known = not any(v.facts.live or isinstance(v.data, jax.core.Tracer) for v in others)
        if others and known and not any(is_qtensor(v.data) for v in others):
            return jax.ensure_compile_time_eval()
        return _NOTHING

    def in_float(
        self, value: Value, scope: tuple[str, ...], name: str | None, reason: str
    ) -> Value:
        """Converts an integer activation to float, and tells the policy that an edge ends here.

        `name` is the primitive that takes it; `None` for the function's result.
        """
        if not is_integers(value.data):
            return value
        where = None if name is None else f"{name} in {self.where(scope)}"
        self.policy.leaves(self, value.data, where, reason)
        return Value(value.data.floats(), value.facts)

    def where(self, scope: tuple[str, ...]) -> str:
        """The name of a scope in reports."""
        return site_scope(scope, self.paths) or "the root"

    def report(self, kind: str, where: str, primitive: str, message: str) -> None:
        """Adds an event, once."""
        self.events.setdefault(Event(kind, where, primitive, message))


def _valued(
    results: Sequence[Any],
    facts: Facts,
    origin: Any,
    signs: Sequence[bool],
    over: frozenset[int] | None,
) -> list[Value]:
    live, near = facts.live, facts.near
    return [
        Value(r, Facts(origin, live, s, near, over)) for r, s in zip(results, signs, strict=True)
    ]


def _common(lhs: Value, rhs: Value) -> str:
    """The longest common prefix of the last sites that fed either operand."""
    paths = [place.split("/") for v in (lhs, rhs) for place in v.facts.near]
    prefix = []
    for level in zip(*paths, strict=False):
        if len(set(level)) > 1:
            break
        prefix.append(level[0])
    return "/".join(prefix)


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    """For each equation, the variables that no later equation or result reads."""
    last: dict[Any, int] = {}
    for n, eqn in enumerate(jaxpr.eqns):
        for var in (*eqn.invars, *eqn.outvars):
            if not isinstance(var, _compat.Literal):
                last[var] = n
    for var in jaxpr.outvars:
        if not isinstance(var, _compat.Literal):
            last.pop(var, None)
    variables: dict[int, list[Any]] = {}
    for var, n in last.items():
        variables.setdefault(n, []).append(var)
    return variables


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    """The float stand-in that a function is traced with: shape, dtype and explicit sharding."""
    if is_qtensor(x):
        return jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype), sharding=placed.sharding_of(x))
    aval = jax.typeof(x)
    weak = bool(getattr(aval, "weak_type", False))
    sharding = _compat.explicit_sharding(x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding, weak_type=weak)
