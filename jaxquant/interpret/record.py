"""`trace`: the sites of a function, found by abstract evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.interpret import layout
from jaxquant.interpret.calls import Call, trace_call
from jaxquant.interpret.evaluate import Interpreter, abstract
from jaxquant.interpret.policy import Contraction, Policy, param_first
from jaxquant.interpret.scopes import site_scope
from jaxquant.interpret.sites import Site, Sites
from jaxquant.interpret.values import Facts, Origin, Value


def trace(
    fn: Callable[..., Any], params: Any, *args: Any, kwargs: Mapping[str, Any] | None = None
) -> Sites:
    """Finds the contractions in `fn(params, *args, **kwargs)`; no FLOPs are spent.

    Args:
      fn: any traceable function whose first argument is a params pytree.
      params: its parameters, arrays or `jax.ShapeDtypeStruct`s.
      *args: its other arguments, likewise; Python scalars and strings stay static.
      kwargs: keyword arguments of `fn`, likewise.

    Raises:
      ValueError: `fn` cannot be traced with `params`, for example a key is missing.

    >>> import jax, jax.numpy as jnp, jaxquant as jq
    >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    >>> shape = jax.ShapeDtypeStruct
    >>> params = {"up": shape((8, 32), jnp.float32), "down": shape((32, 8), jnp.float32)}
    >>> print(jq.trace(fn, params, shape((4, 8), jnp.float32)))
    site  primitive    operands            axes
    up    dot_general  [4, 8] x [8, 32]    sum 0, keep 1
    down  dot_general  [4, 32] x [32, 8]   sum 0, keep 1
    """
    return sites_of(trace_call(fn, params, args, kwargs))


def sites_of(call: Call) -> Sites:
    """The sites of a traced call."""
    recorder = Recorder()
    interpreter = Interpreter(recorder, call.param_paths)
    avals = [abstract(leaf) for leaf in call.leaves]

    def run(*leaves: Any) -> None:
        call.run(interpreter, list(leaves))

    jax.eval_shape(run, *avals)
    leaves = {
        path: (tuple(aval.shape), str(aval.dtype))
        for path, aval in zip(call.paths, avals, strict=True)
        if path is not None
    }
    return Sites(tuple(recorder.sites.values()), leaves, recorder.met)


class Recorder(Policy):
    """The policy that computes in float and records each site."""

    def __init__(self) -> None:
        self.sites: dict[str, Site] = {}
        self.met: dict[str, str] = {}

    def contract(self, ip: Interpreter, site: Contraction) -> Any:
        """Records the site; contracts as the function did."""
        lhs, rhs, eqn = site.lhs, site.rhs, site.eqn
        scope = site_scope(site.scope, ip.paths)
        operands = (tuple(jnp.shape(lhs.data)), tuple(jnp.shape(rhs.data)))
        name = eqn.primitive.name
        params = param_first(lhs, rhs)
        if params and params[0].facts.origin is not None:
            side, other = ("lhs", "rhs") if params[0] is lhs else ("rhs", "lhs")
            summed, batched = dimensions(eqn, side)
            for key, origin in zip(site.keys, params[0].facts.origin.parts, strict=True):
                contracted = _named(origin, summed)
                self.sites[key] = Site(
                    key=key,
                    primitive=name,
                    param=origin.path,
                    shape=origin.shape,
                    dtype=origin.dtype,
                    contracted=contracted,
                    scanned=tuple(sorted(origin.scanned)),
                    batched=tuple(a for a in _named(origin, batched) if a not in contracted),
                    operands=operands,
                    scope=scope,
                    over=tuple(dimensions(eqn, other)[0]),
                )
        elif name == "dot_general" and both_live(lhs, rhs):
            dtype = str(eqn.outvars[0].aval.dtype)
            self.sites[site.keys[0]] = Site(
                site.keys[0],
                name,
                None,
                (),
                dtype,
                (),
                (),
                (),
                operands,
                scope,
                (lhs.facts.nonneg, rhs.facts.nonneg),
            )
        return super().contract(ip, site)

    def lookup(self, eqn: Any, key: str, operand: Value) -> None:
        """Records a lookup of rows."""
        origin = operand.facts.origin
        assert origin is not None
        shape = tuple(jnp.shape(operand.data))
        axis = layout.gathered_axis(eqn.params, shape)
        if axis is None:
            self.met.setdefault(origin.path, "gather")
            return
        others = [a for a in range(len(shape)) if a != axis]
        self.sites[key] = Site(
            key=key,
            primitive="gather",
            param=origin.path,
            shape=origin.shape,
            dtype=origin.dtype,
            contracted=_named(origin, others),
            scanned=tuple(sorted(origin.scanned)),
            batched=(),
            operands=(shape, tuple(eqn.invars[1].aval.shape)),
            scope="",
        )

    def meets(self, eqn: Any, operand: Value) -> None:
        """Records the first other primitive that uses a parameter."""
        if operand.facts.origin is not None:
            self.met.setdefault(operand.facts.origin.path, eqn.primitive.name)

    def jit_key(self, ip: Interpreter, facts: list[Facts], scope: tuple[str, ...]) -> tuple:
        """Every call of a helper has its own call path, so no two share a transform."""
        return (ip.call_path,)

    def enters_rules(self, ip: Interpreter, jaxpr: Any, operands: list[Value]) -> bool:
        """Custom rules are entered to find the sites inside."""
        return True


def both_live(lhs: Value, rhs: Value) -> bool:
    """Whether both operands are float activations."""
    float_like = all(jnp.issubdtype(jnp.result_type(v.data), jnp.floating) for v in (lhs, rhs))
    return float_like and all(v.facts.live and not v.is_param for v in (lhs, rhs))


def _named(origin: Origin, axes: list[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(p for a in axes for p in origin.axes[a]))


def dimensions(eqn: Any, side: str) -> tuple[list[int], list[int]]:
    """The axes of one operand (`lhs` or `rhs`) that are contracted, and its batch axes."""
    at = 0 if side == "lhs" else 1
    p = eqn.params
    if eqn.primitive.name == "conv_general_dilated":
        spec = (p["dimension_numbers"].lhs_spec, p["dimension_numbers"].rhs_spec)[at]
        # a kernel's spec is (out, in, *spatial), an input's (batch, feature, *spatial)
        return [a for a in range(len(spec)) if a != spec[0]], []
    if eqn.primitive.name == "ragged_dot_general":
        dims = p["ragged_dot_dimension_numbers"]
        contract, batch = dims.dot_dimension_numbers
        groups = dims.rhs_group_dimensions if at else ()
        return list(contract[at]), [*batch[at], *groups]
    contract, batch = p["dimension_numbers"]
    return list(contract[at]), list(batch[at])
