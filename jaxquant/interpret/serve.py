"""`quantized`: the same function with integer contractions where its params are quantized."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant import ops
from jaxquant.interpret import _compat, primitives
from jaxquant.interpret.calls import Call, trace_call
from jaxquant.interpret.evaluate import Interpreter
from jaxquant.interpret.integers import why
from jaxquant.interpret.observe import places_of
from jaxquant.interpret.policy import Contraction, Policy
from jaxquant.interpret.record import both_live
from jaxquant.interpret.slots import SiteValues, Slot
from jaxquant.interpret.values import Facts, Value
from jaxquant.numerics import get
from jaxquant.ops import is_integers
from jaxquant.qtensor import QSpec, QTensor, QuantParams, dequantize, is_qtensor
from jaxquant.recipe import Recipe, as_recipe, attention_spec
from jaxquant.report import Event


def quantized(fn: Callable[..., Any], recipe: Recipe | None = None) -> Callable[..., Any]:
    """The function that computes `fn` with params whose leaves may be `QTensor`s.

    `fn` is traced with a float stand-in for every `QTensor`. Contractions with a `QTensor` operand
    run on its codes: `(q_x . q_w) S_x S_w` with integer activations, `(x . q_w) S_w` otherwise.
    `fn` is not changed; the result has the signature of `fn` and works under `jit`, `grad`
    (reverse mode, with respect to float arguments), `vmap` and `jax.export`.

    Args:
      fn: any traceable function; params are its first argument.
      recipe: its `attention` rules replace those that the params carry.

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
    """Evaluates a traced call with its quantized leaves; returns the result and the events.

    With `audit`, for a report, each call of a jitted helper is transformed separately, and each
    contraction that is meant to run on integers is checked.
    """
    policy = policy_of(call, recipe, audit=audit)
    if policy is None:
        raise ValueError(
            "quantized: no QTensor among the arguments; quantize the params first, as in "
            "qparams, report = jaxquant.ptq(fn, params, recipe, *args)"
        )
    interpreter = Interpreter(policy, call.param_paths, attention_grids(call))
    # the gradient of a quantized leaf is an error, wherever the leaf is used
    constants = iter(ops.constant([leaf for leaf in call.leaves if is_qtensor(leaf)]))
    leaves = [next(constants) if is_qtensor(leaf) else leaf for leaf in call.leaves]
    return call.run(interpreter, leaves), tuple(interpreter.events)


def policy_of(call: Call, recipe: Recipe | None = None, *, audit: bool = False) -> Serve | None:
    """The policy that serves a call's quantized leaves; `None` if there are none."""
    tensors = [leaf for leaf in call.leaves if is_qtensor(leaf)]
    if not tensors:
        return None
    return Serve(_attention(tensors) if recipe is None else recipe.attention, audit)


def attention_grids(call: Call) -> SiteValues:
    """Calibrated grids of contractions without a parameter, in the slots of their sites."""
    grids: dict[str, tuple[QuantParams, QuantParams]] = {}
    for leaf in call.leaves:
        if is_qtensor(leaf) and leaf.calibration is not None:
            grids |= leaf.calibration.attention or {}
    values = {}
    for place in places_of(call) if grids else ():
        if not place.params and place.keys[0] in grids:
            lhs, rhs = grids[place.keys[0]]
            values[place.slot] = lhs if place.slot.name == "lhs" else rhs
    return SiteValues(values)


def _attention(tensors: list[QTensor]) -> tuple[tuple[Any, QSpec | None], ...]:
    rules = dict.fromkeys(q.contraction.attention for q in tensors if q.contraction.attention)
    if len(rules) > 1:
        raise ValueError(
            "quantized: the params carry attention rules of different recipes; "
            "pass quantized(fn, recipe) the one to use"
        )
    return next(iter(rules), ())


class Serve(Policy):
    """The policy that contracts on codes."""

    inline_rules = True

    def __init__(
        self, attention: tuple[tuple[Any, QSpec | None], ...], audit: bool = False
    ) -> None:
        self.attention = attention
        self.audit = audit
        specs = {spec for _, spec in attention}
        self.any_attention = any(spec is not None for spec in specs)
        # one rule matches all sites, so their keys make no difference
        self.uniform = not audit and (not self.any_attention or attention[0][0] == "**")

    def contract(self, ip: Interpreter, site: Contraction) -> Any:
        """Contracts on codes where an operand is quantized, else as the function did."""
        lhs, rhs, eqn = site.lhs, site.rhs, site.eqn
        name, p = eqn.primitive.name, eqn.params
        if not is_qtensor(lhs.data) and not is_qtensor(rhs.data):
            return self._float(ip, site)
        if is_qtensor(lhs.data) and is_qtensor(rhs.data):
            # dequantize the operand that depends on inputs (rows looked up), else the left one
            live = lhs.facts.live or not rhs.facts.live
            lhs = Value(dequantize(lhs.data), lhs.facts) if live else lhs
            rhs = rhs if live else Value(dequantize(rhs.data), rhs.facts)
            site = dataclasses.replace(site, lhs=lhs, rhs=rhs)
        sums = self._integers(ip, site)
        if sums is not None:
            return sums
        lhs, rhs = (self._in_float(ip, site, v) for v in (lhs, rhs))
        left, right = lhs.data, rhs.data
        if name == "conv_general_dilated" and p.get("out_sharding") is not None:
            # JAX itself cannot yet shard every convolution on an explicit mesh
            return _compat.bind(eqn, [ip.dense(v, eqn, site.scope) for v in (lhs, rhs)])[0]
        if name == "dot_general":
            op = functools.partial(ops.dot_general, **p)
        elif name == "conv_general_dilated":
            options = {k: v for k, v in p.items() if k != "out_sharding"}
            op = functools.partial(ops.conv_general_dilated, **options)
        else:
            op = functools.partial(ops.ragged_dot_general, **p)
        if name != "dot_general" or not _divides(site, left, right):
            left, right = (_undivided(d) for d in (left, right))
            if not is_qtensor(left) and not is_qtensor(right):
                return _compat.bind(eqn, [left, right, *(v.data for v in site.rest)])[0]
        operands = (left, right, *(v.data for v in site.rest))
        if self.audit:
            _without_outliers(ip, site, operands)
            _audit(ip, site, op, operands)
        return op(*operands)

    def _in_float(self, ip: Interpreter, site: Contraction, value: Value) -> Value:
        return ip.in_float(value, site.scope, site.eqn.primitive.name, why(site.eqn, []))

    def _integers(self, ip: Interpreter, site: Contraction) -> Any:
        """The contraction's int32 sums, if the parameter's rule requantizes them; else `None`."""
        flipped = is_qtensor(site.lhs.data)
        value, q = (site.rhs, site.lhs.data) if flipped else (site.lhs, site.rhs.data)
        name, p = site.eqn.primitive.name, site.eqn.params
        if not is_qtensor(q) or q.contraction.requantize is None or is_qtensor(value.data):
            return None
        calibration = q.calibration
        if (
            calibration is None
            or calibration.input is None
            or calibration.input.scale.ndim
            or calibration.divisor is not None
        ):
            return None
        grid = calibration.input
        about = {"key": site.keys[0], "dtype": site.eqn.outvars[0].aval.dtype.name}
        over: Any = ()
        if name == "dot_general":
            (lc, rc), batch = p["dimension_numbers"]
            over = (rc, lc) if flipped else (lc, rc)
            if any(batch) or p.get("out_sharding") is not None:
                return None
        elif name != "conv_general_dilated" or flipped:
            return None
        x = value.data
        x = x.activation() if isinstance(x, ops.Accumulator) else x
        activation = x if isinstance(x, ops.Activation) and self.on_grid(x, q) else None
        if activation is not None:
            codes = activation.codes
        else:
            codes, spec = self._in_float(ip, site, value).data, q.contraction.activations
            if spec is None or not jnp.issubdtype(codes.dtype, jnp.floating):
                return None
            codes = ops.on_grid(ops.inference_only(codes), grid, spec)
        if name == "dot_general":
            sums = ops.dot_integer(codes, q, over, flipped, **about)
        else:
            options = {k: v for k, v in p.items() if k != "out_sharding"}
            sums = ops.conv_integer(ops.conv_of(**options), codes, q, **about)
        if sums is not None and activation is not None:
            self.edge(ip, value.data, activation, site.keys[0])
        return sums

    def on_grid(self, x: ops.Activation, q: QTensor) -> bool:
        """Whether an activation is on the input grid of a parameter's contraction."""
        grid = None if q.calibration is None else q.calibration.input
        return grid is not None and x.grid.same(grid)

    def edge(self, ip: Interpreter, operand: Any, x: ops.Activation, target: str) -> None:
        """Called for each activation that stays integer from one site to another."""

    def _float(self, ip: Interpreter, site: Contraction) -> Any:
        lhs, rhs = (self._in_float(ip, site, v) for v in (site.lhs, site.rhs))
        data = [lhs.data, rhs.data, *(v.data for v in site.rest)]
        spec = None
        if self.any_attention and site.eqn.primitive.name == "dot_general" and both_live(lhs, rhs):
            spec = attention_spec(self.attention, site.keys[0])
        if spec is None:
            return _compat.bind(site.eqn, data)[0]
        specs = [unsigned(spec) if v.facts.nonneg else spec for v in (lhs, rhs)]
        grids = [
            _suited(ip.slots.values.get(Slot(ip.call_path, name)), s)
            for name, s in zip(("lhs", "rhs"), specs, strict=True)
        ]
        how = site.eqn.params | dict(zip(("lhs_spec", "rhs_spec"), specs, strict=True))
        return _of_activations(*data, *grids, params=tuple(how.items()))

    def jit_key(self, ip: Interpreter, facts: list[Facts], scope: tuple[str, ...]) -> tuple | None:
        """Calls differ by their operands' facts; by call path only if rules differ by site."""
        kinds = tuple((f.live, f.nonneg, f.origin is not None, f.over) for f in facts)
        return (kinds,) if self.uniform else (kinds, ip.call_path)

    def enters_rules(self, ip: Interpreter, jaxpr: Any, operands: list[Value]) -> bool:
        """Enters where a quantized operand or matched attention may be contracted inside."""
        if any(is_integers(v.data) for v in operands):
            return True
        if not ip.contracts(jaxpr):
            return False
        return self.any_attention or any(is_qtensor(v.data) for v in operands)


@functools.partial(jax.jit, static_argnames=("params",))
def _of_activations(
    lhs: Any,
    rhs: Any,
    lhs_grid: QuantParams | None,
    rhs_grid: QuantParams | None,
    *,
    params: tuple[Any, ...],
) -> Any:
    """Layers with equal shapes and specs share one trace and one lowered function."""
    how: dict[str, Any] = dict(params)
    return ops.dot_general_dynamic(lhs, rhs, lhs_grid=lhs_grid, rhs_grid=rhs_grid, **how)


def _suited(grid: QuantParams | None, spec: QSpec) -> QuantParams | None:
    """The calibrated grid, or `None` if it was made for a spec other than the recipe's."""
    return grid if grid is not None and grid.suits(spec) else None


def _divides(site: Contraction, left: Any, right: Any) -> bool:
    """Whether the other operand can be divided by a parameter's divisor."""
    q, side = (left, 0) if is_qtensor(left) else (right, 1)
    calibration = q.calibration
    if calibration is None or calibration.divisor is None:
        return True
    summed = site.eqn.params["dimension_numbers"][0][side]
    axes = {q.ndim + a for a in calibration.axis}
    return calibration.divisor.ndim == len(axes) and axes <= {*summed}


def _undivided(data: Any) -> Any:
    """Dequantizes a parameter that has a divisor; other data are unchanged."""
    calibration = data.calibration if is_qtensor(data) else None
    return data if calibration is None or calibration.divisor is None else dequantize(data)


def _without_outliers(ip: Interpreter, site: Contraction, operands: Any) -> None:
    """Reports a contraction whose outlier columns are quantized with the rest."""
    name = site.eqn.primitive.name
    has_outliers = any(is_qtensor(d) and d.contraction.outliers is not None for d in operands)
    if has_outliers and name != "dot_general":
        ip.report("without outliers", site.keys[0], name, "outlier columns are quantized too")


def _audit(ip: Interpreter, site: Contraction, op: Callable[..., Any], operands: Any) -> None:
    """Reports a contraction that is meant to run on integers, and on no platform does."""
    (q,) = (d for d in operands if is_qtensor(d))
    spec = q.contraction.activations
    if spec is None or not spec.format.is_integer:
        return
    jaxpr, _ = _compat.opened(jax.make_jaxpr(op)(*operands))
    if not _on_integers(jaxpr):
        message = f"{q.spec.format.name} weights, {spec.format.name} activations in this form"
        ip.report("contracted in float", site.keys[0], site.eqn.primitive.name, message)


def _on_integers(jaxpr: Any) -> bool:
    """Whether a jaxpr contains a contraction with integer operands, at any depth."""
    for eqn in jaxpr.eqns:
        if primitives.of(eqn).kind == "contraction":
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
