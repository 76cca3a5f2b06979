"""The policy of training: computed as served, differentiated with respect to the float params."""

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
    """The policy of a phase that does not round yet: as the function did, rules kept."""

    keeps_rules = True


class Train(Serve):
    """The policy of training: contracts on codes, and passes gradients to the floats beside them.

    The result is what `Serve` computes with the same codes. Its gradient is that of the contraction
    of both operands as they are rounded, which then passes the rounding of each by its estimator.
    """

    inline_rules = False
    keeps_rules = True

    def __init__(
        self, attention: tuple[tuple[Any, QSpec | None], ...], key: Array | None = None
    ) -> None:
        """`key`: data of the PRNG key of this step, for gradients that are rounded at random."""
        super().__init__(attention)
        self.key = key

    def contract(self, ip: Interpreter, site: Contraction) -> Any:
        """Contracts on codes where an operand is `FakeQuantTensor`, else as served."""
        lhs, rhs = site.lhs, site.rhs
        if is_fake_quant(lhs.data) and is_fake_quant(rhs.data):
            # the one that is more an activation (rows looked up) gives way
            live = lhs.facts.live or not rhs.facts.live
            lhs = Value(dequantize(lhs.data), lhs.facts) if live else lhs
            rhs = rhs if live else Value(dequantize(rhs.data), rhs.facts)
        if not is_fake_quant(lhs.data) and not is_fake_quant(rhs.data):
            return super().contract(ip, dataclasses.replace(site, lhs=lhs, rhs=rhs))
        flipped = is_fake_quant(lhs.data)
        held: FakeQuantTensor = lhs.data if flipped else rhs.data
        x, rest = (rhs if flipped else lhs).data, [v.data for v in site.rest]
        q, values = held.constant, held.values
        assert values is not None

        def served(x: Array, q: QTensor, rest: list[Array]) -> Array:
            y = codes_contracted(x, q, rest)
            if q.calibration is None or q.calibration.input is None:
                return y
            # a grid has no NaN: in training it must be seen
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
        if held.gradients is not None and held.gradients.stochastic and self.key is not None:
            key = self.key ^ jnp.asarray([zlib.crc32(site.keys[0].encode()), 0], jnp.uint32)
        over, _ = dimensions(site.eqn, "rhs" if flipped else "lhs")
        rounded = _rounded(x, held, tuple(over))
        explicit = _compat.explicit_sharding(x) is not None or site.eqn.params.get("out_sharding")
        if (
            held.gradients is not None
            and site.eqn.primitive.name == "dot_general"
            and not explicit  # where JAX itself must say how each gradient is laid out
        ):
            return ops.dot_trained(
                lambda x, q: served(x, q, []),
                x,
                rounded,
                q,
                values,
                key,
                held.gradients,
                site.eqn.params,
                flipped,
            )

        def reference(x: Array, w: Array) -> Any:
            def product(x: Array, w: Array) -> Array:
                left, right = (w, x) if flipped else (x, w)
                return _compat.bind(site.eqn, [left, right, *rest])[0]

            if held.gradients is None:
                return product(x, w)
            return _gradients_rounded(product, x, w, held.gradients, key, site.eqn, flipped)

        constants = (lax.stop_gradient(x), q, rest)
        return ops.with_gradients_of(
            lambda held: served(*held), reference, constants, (rounded, values)
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
    """What has the gradients of a product, rounded for each operand as its spec says.

    Other contractions than `dot_general`, and those on an explicit mesh, have no form of their
    gradient on integers here: they take rounded gradients in float.
    """
    to_x, to_w = product(x, lax.stop_gradient(w)), product(lax.stop_gradient(x), w)
    kept_of_x, kept_of_w = _kept(eqn, flipped)
    over = [tuple(a for a in range(to_x.ndim) if a not in kept) for kept in (kept_of_x, kept_of_w)]
    # a sum, of which nothing but the gradient is used
    return ops.with_rounded_gradient(
        to_x, gradients.input, key, over[0]
    ) + ops.with_rounded_gradient(to_w, gradients.weight, key, over[1])


def _kept(eqn: Any, flipped: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a result whose indices have a scale each: for the input, and for the weight."""
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


def _rounded(x: Array, held: FakeQuantTensor, over: tuple[int, ...]) -> Array:
    """An activation rounded as its contraction rounds it, with the gradient of its estimator."""
    spec = held.contraction.activations
    if spec is None or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    grid = None if held.calibration is None else held.calibration.input
    fixed = lax.stop_gradient(x)
    estimator = held.estimator or straight_through()
    if grid is None:
        dynamic = straight_through() if estimator.learns else estimator
        return dynamic.pass_activation(x, ops.fake(fixed, spec, over), {}, spec)
    learned = held.learned
    if learned is None:
        zero = ops.own_zero_point(grid, spec)
        learned = {"scale": grid.scale, **({} if zero is None else {"zero_point": zero})}
    # features that share a step, however many rows there are
    count = math.prod(x.shape[a] for a in over)
    rounded = ops.fake_on_grid(fixed, grid, spec)
    return estimator.pass_activation(x, rounded, learned, spec, count=count)
