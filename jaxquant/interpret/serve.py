"""`quantized`: the same function with integer contractions where its params are quantized."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant import ops
from jaxquant.interpret import _compat
from jaxquant.interpret.calls import Call, trace_call
from jaxquant.interpret.evaluate import CONTRACTIONS, Contraction, Interpreter
from jaxquant.interpret.record import both_live
from jaxquant.interpret.values import Facts, Value
from jaxquant.numerics import get
from jaxquant.qtensor import QTensor, dequantize, is_qtensor
from jaxquant.recipe import Recipe, as_recipe, attention_spec
from jaxquant.report import Event
from jaxquant.spec import QSpec


def quantized(fn: Callable[..., Any], recipe: Recipe | None = None) -> Callable[..., Any]:
    """The function that computes `fn` with params whose leaves may be `QTensor`s.

    `fn` is traced with a float stand-in for every `QTensor` and evaluated so that contractions
    whose operand is one run on its codes: `(q_x . q_w) S_x S_w` with integer activations,
    `(x . q_w) S_w` otherwise. Nothing of `fn` is changed; the result has `fn`'s own signature and
    works under `jit`, `grad` (reverse mode, with respect to float arguments), `vmap` and
    `jax.export`.

    Args:
      fn: any traceable function; params are its first argument.
      recipe: whose `attention` rules to use instead of those the params carry.

    Raises:
      ValueError: at the call, if there is no `QTensor` among the arguments.

    >>> import jax, jax.numpy as jnp, jaxquant as jq
    >>> fn = lambda p, x: x @ p["w"]
    >>> params, x = {"w": jnp.eye(4)}, jnp.arange(4.0)[None]
    >>> qparams, report = jq.ptq(fn, params, jq.w8a8(), x)
    >>> jax.jit(jq.quantized(fn))(qparams, x).round(1)
    Array([[0., 1., 2., 3.]], dtype=float32)
    """
    if recipe is not None:
        recipe = as_recipe(recipe, "quantized")

    @functools.wraps(fn)
    def wrapped(params: Any, /, *args: Any, **kwargs: Any) -> Any:
        call = trace_call(fn, params, args, kwargs)
        return serve(call, recipe)[0]

    return wrapped


def serve(
    call: Call, recipe: Recipe | None = None, *, audit: bool = False
) -> tuple[Any, tuple[Event, ...]]:
    """Evaluates a traced call with its quantized leaves; the result, and what was reported.

    With `audit`, for a report: each call of a jitted helper is looked at by itself, and so is
    each contraction that was to run on integers.
    """
    found = [leaf for leaf in call.leaves if is_qtensor(leaf)]
    if not found:
        raise ValueError(
            "quantized: no QTensor among the arguments; quantize the params first, as in "
            "qparams, report = jaxquant.ptq(fn, params, recipe, *args)"
        )
    rules = _attention(found) if recipe is None else recipe.attention
    interpreter = Interpreter(Serve(rules, audit), call.param_paths)
    # whatever a quantized leaf meets, asking for its gradient is a mistake that must be heard
    leaves = [ops.constant(leaf) if is_qtensor(leaf) else leaf for leaf in call.leaves]
    return call.run(interpreter, leaves), tuple(interpreter.events)


def _attention(found: list[QTensor]) -> tuple[tuple[Any, QSpec | None], ...]:
    given = dict.fromkeys(q.use.attention for q in found if q.use.attention)
    if len(given) > 1:
        raise ValueError(
            "quantized: the params carry attention rules of different recipes; "
            "pass quantized(fn, recipe) the one to use"
        )
    return next(iter(given), ())


class Serve:
    """The policy that contracts on codes."""

    inline_rules = True

    def __init__(
        self, attention: tuple[tuple[Any, QSpec | None], ...], audit: bool = False
    ) -> None:
        self.attention = attention
        self.audit = audit
        specs = {spec for _, spec in attention}
        self.any_attention = any(spec is not None for spec in specs)
        # one rule for everything: the key of a site makes no difference
        self.uniform = not audit and (not self.any_attention or attention[0][0] == "**")

    def contract(self, ip: Interpreter, site: Contraction) -> Any:
        """Contracts on codes where an operand is quantized, else as the function did."""
        lhs, rhs, eqn = site.lhs, site.rhs, site.eqn
        name, p = eqn.primitive.name, eqn.params
        if not is_qtensor(lhs.data) and not is_qtensor(rhs.data):
            return self._float(site)
        left, right = lhs.data, rhs.data
        if is_qtensor(left) and is_qtensor(right):  # the one that is more an activation gives way
            if lhs.facts.live or not rhs.facts.live:
                left = dequantize(left)
            else:
                right = dequantize(right)
        if name == "conv_general_dilated" and p.get("out_sharding") is not None:
            # JAX itself cannot yet place a convolution on an explicit mesh for certain
            return _compat.bind(eqn, [ip.dense(v, eqn, site.scope) for v in (lhs, rhs)])[0]
        if name == "dot_general":
            op = functools.partial(ops.dot_general, **p)
        elif name == "conv_general_dilated":
            known = {k: v for k, v in p.items() if k != "out_sharding"}
            op = functools.partial(ops.conv_general_dilated, **known)
        else:
            op = functools.partial(ops.ragged_dot_general, **p)
        operands = (left, right, *(v.data for v in site.rest))
        if self.audit:
            _audit(ip, site, op, operands)
        return op(*operands)

    def _float(self, site: Contraction) -> Any:
        lhs, rhs = site.lhs, site.rhs
        data = [lhs.data, rhs.data, *(v.data for v in site.rest)]
        spec = None
        if self.any_attention and site.eqn.primitive.name == "dot_general" and both_live(lhs, rhs):
            spec = attention_spec(self.attention, site.keys[0])
        if spec is None:
            return _compat.bind(site.eqn, data)[0]
        lhs_spec, rhs_spec = (unsigned(spec) if v.facts.nonneg else spec for v in (lhs, rhs))
        return ops.dot_general_dynamic(
            *data, **site.eqn.params, lhs_spec=lhs_spec, rhs_spec=rhs_spec
        )

    def lookup(self, eqn: Any, key: str, operand: Value) -> None:
        """Lookups need no policy: rows stay quantized until something computes with them."""

    def meets(self, eqn: Any, operand: Value) -> None:
        """Reported by the interpreter, where it dequantizes."""

    def jit_key(self, ip: Interpreter, facts: list[Facts], scope: tuple[str, ...]) -> tuple:
        """Calls differ by what is quantized (structure), live or a parameter; seldom by key."""
        kinds = tuple((f.live, f.nonneg, f.origin is not None) for f in facts)
        return (kinds,) if self.uniform else (kinds, ip.call_path)

    def enters_rules(self, ip: Interpreter, jaxpr: Any, operands: list[Value]) -> bool:
        """Enters where a quantized operand or a matched attention may contract inside."""
        if not ip.contracts(jaxpr):
            return False
        return self.any_attention or any(is_qtensor(v.data) for v in operands)


def _audit(ip: Interpreter, site: Contraction, op: Callable[..., Any], operands: Any) -> None:
    """Reports a contraction that was to run on integers and on no platform does."""
    (q,) = (d for d in operands if is_qtensor(d))
    spec = q.use.activations
    if spec is None or not spec.format.is_integer:
        return
    jaxpr, _ = _compat.opened(jax.make_jaxpr(op)(*operands))
    if not _on_integers(jaxpr):
        message = f"{q.spec.format.name} weights, {spec.format.name} activations in this form"
        ip.report("contracted in float", site.keys[0], site.eqn.primitive.name, message)


def _on_integers(jaxpr: Any) -> bool:
    """Whether a jaxpr holds a contraction with integer operands, at any depth."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in CONTRACTIONS:
            dtypes = [v.aval.dtype for v in eqn.invars[:2]]
            if all(jnp.issubdtype(d, jnp.integer) for d in dtypes):
                return True
        if any(_on_integers(inner) for inner in _compat.inner_jaxprs(eqn)):
            return True
    return False


def unsigned(spec: QSpec) -> QSpec:
    """The unsigned twin of a signed integer spec, for values that cannot be negative."""
    fmt = spec.format
    if not (fmt.is_integer and fmt.signed):
        return spec
    twin = get(f"uint{fmt.bits}")
    return QSpec(twin, spec.granularity, True, "qmax", spec.scale_dtype, spec.global_scale)
