"""The policy of training: computes as served, differentiates with respect to float params."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxquant import ops
from jaxquant.interpret import _compat
from jaxquant.interpret.evaluate import Interpreter
from jaxquant.interpret.policy import Contraction, Policy
from jaxquant.interpret.record import dimensions
from jaxquant.interpret.serve import Serve
from jaxquant.interpret.values import Value
from jaxquant.qtensor import FakeQuantTensor, Gradients, QSpec, QTensor, dequantize, is_fake_quant
from jaxquant.ste import straight_through


class InFloat(Policy):
    """The policy of a phase in float: computes as the function did, keeps custom rules."""

    keeps_rules = True


class Train(Serve):
    """The policy of training: contracts on codes, and passes gradients to the float values.

    The result is what `Serve` computes with the same codes. Its gradient is that of the contraction
    of both rounded operands; each operand's estimator passes it through the rounding.
    """

    inline_rules = False
    keeps_rules = True

    def __init__(
        self, attention: tuple[tuple[Any, QSpec | None], ...], key: Array | None = None
    ) -> None:
        """`key`: data of this step's PRNG key, for stochastic rounding of gradients."""
        super().__init__(attention)
        self.key = key

    def contract(self, ip: Interpreter, site: Contraction) -> Any:
        """Contracts on codes where an operand is a `FakeQuantTensor`, else as served."""
        lhs, rhs = site.lhs, site.rhs
        if is_fake_quant(lhs.data) and is_fake_quant(rhs.data):
            # dequantize the operand that depends on inputs (rows looked up), else the left one
            live = lhs.facts.live or not rhs.facts.live
            lhs = Value(dequantize(lhs.data), lhs.facts) if live else lhs
            rhs = rhs if live else Value(dequantize(rhs.data), rhs.facts)
        if not is_fake_quant(lhs.data) and not is_fake_quant(rhs.data):
            return super().contract(ip, dataclasses.replace(site, lhs=lhs, rhs=rhs))
        flipped = is_fake_quant(lhs.data)
        weight: FakeQuantTensor = lhs.data if flipped else rhs.data
        x, rest = (rhs if flipped else lhs).data, [v.data for v in site.rest]
        q, values = weight.constant, weight.values
        assert values is not None

        def served(x: Array, q: QTensor, rest: list[Array]) -> Array:
            y = codes_contracted(x, q, rest)
            if q.calibration is None or q.calibration.input is None:
                return y
            # codes on a grid cannot hold NaN, which training must show
            return jnp.where(jnp.isnan(x).any(), jnp.asarray(jnp.nan, y.dtype), y)

        def codes_contracted(x: Array, q: QTensor, rest: list[Array]) -> Any:
            left, right = (q, x) if flipped else (x, q)
            extra = [Value(r, v.facts) for r, v in zip(rest, site.rest, strict=True)]
            return super(Train, self).contract(
                ip,
                dataclasses.replace(
                    site,
                    lhs=Value(left, lhs.facts),
                    rhs=Value(right, rhs.facts),
                    rest=tuple(extra),
                ),
            )

        key = None
        if weight.gradients is not None and weight.gradients.stochastic and self.key is not None:
            key = self.key ^ jnp.asarray([zlib.crc32(site.keys[0].encode()), 0], jnp.uint32)
        over, _ = dimensions(site.eqn, "rhs" if flipped else "lhs")
        rounded = _rounded(x, weight, tuple(over))
        explicit = _compat.explicit_sharding(x) is not None or site.eqn.params.get("out_sharding")
        if (
            weight.gradients is not None
            and site.eqn.primitive.name == "dot_general"
            and not explicit  # there JAX itself must choose each gradient's sharding
        ):
            return ops.dot_trained(
                lambda x, q: served(x, q, []),
                x,
                rounded,
                q,
                values,
                key,
                weight.gradients,
                site.eqn.params,
                flipped,
            )

        def reference(x: Array, w: Array) -> Any:
            def product(x: Array, w: Array) -> Array:
                left, right = (w, x) if flipped else (x, w)
                return _compat.bind(site.eqn, [left, right, *rest])[0]

            if weight.gradients is None:
                return product(x, w)
            return _gradients_rounded(product, x, w, weight.gradients, key, site.eqn, flipped)

        constants = (lax.stop_gradient(x), q, rest)
        return ops.with_gradients_of(
            lambda inputs: served(*inputs), reference, constants, (rounded, values)
        )


def _gradients_rounded(
    product: Callable[[Array, Array], Array],
    x: Array,
    w: Array,
    gradients: Gradients,
    key: Array | None,
    eqn: Any,
    flipped: bool,
) -> Array:
    """A value whose gradients are those of a product, rounded for each operand by its spec.

    Only `dot_general` outside of explicit meshes has gradients on integers (`ops.dot_trained`); all
    other contractions take rounded gradients in float.
    """
    to_x, to_w = product(x, lax.stop_gradient(w)), product(lax.stop_gradient(x), w)
    kept_of_x, kept_of_w = _kept(eqn, flipped)
    over = [tuple(a for a in range(to_x.ndim) if a not in kept) for kept in (kept_of_x, kept_of_w)]
    # only the gradient of this sum is used
    return ops.with_rounded_gradient(
        to_x, gradients.input, key, over[0]
    ) + ops.with_rounded_gradient(to_w, gradients.weight, key, over[1])


def _kept(eqn: Any, flipped: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The result's axes with one scale per index: for the gradients of input and weight."""
    pair: tuple[tuple[int, ...], tuple[int, ...]]
    if eqn.primitive.name == "conv_general_dilated":
        images, channels, *_ = eqn.params["dimension_numbers"].out_spec
        pair = (images,), (channels,)
    elif eqn.primitive.name == "dot_general":
        (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
        free = eqn.invars[0].aval.ndim - len(contracted)  # batch axes and those of the left operand
        right = range(free, eqn.outvars[0].aval.ndim)
        pair = tuple(range(free)), (*range(len(batch)), *right)
    else:  # ragged: rows and columns
        pair = (0,), (1,)
    return pair[::-1] if flipped else pair


def _rounded(x: Array, weight: FakeQuantTensor, over: tuple[int, ...]) -> Array:
    """An activation rounded as its contraction rounds it, with the gradient of its estimator."""
    spec = weight.contraction.activations
    if spec is None or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    grid = None if weight.calibration is None else weight.calibration.input
    fixed = lax.stop_gradient(x)
    estimator = weight.estimator or straight_through()
    if grid is None:
        dynamic = straight_through() if estimator.learns else estimator
        return dynamic.pass_activation(x, ops.fake(fixed, spec, over), {}, spec)
    learned = weight.learned
    if learned is None:
        zero = ops.own_zero_point(grid, spec)
        learned = {"scale": grid.scale, **({} if zero is None else {"zero_point": zero})}
    # the number of features that share a step size; rows do not count
    count = math.prod(x.shape[a] for a in over)
    rounded = ops.fake_on_grid(fixed, grid, spec)
    return estimator.pass_activation(x, rounded, learned, spec, count=count)
