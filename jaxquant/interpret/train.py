"""The policy of training: computed as served, differentiated with respect to the float params."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxquant import ops
from jaxquant.interpret import _compat
from jaxquant.interpret.evaluate import Interpreter
from jaxquant.interpret.policy import Contraction
from jaxquant.interpret.record import dimensions
from jaxquant.interpret.serve import Serve
from jaxquant.interpret.values import Value
from jaxquant.qtensor import QTensor, Trained, dequantize, is_trained
from jaxquant.ste import straight_through


class Train(Serve):
    """The policy that contracts on codes of `Trained` leaves, and passes gradients to their floats.

    The result is what `Serve` computes with the same codes. Its gradient is that of the contraction
    of both operands as they are rounded, which then passes the rounding of each by its estimator.
    """

    inline_rules = False
    keeps_rules = True

    def contract(self, ip: Interpreter, site: Contraction) -> Any:
        """Contracts on codes where an operand is `Trained`, else as served."""
        lhs, rhs = site.lhs, site.rhs
        if is_trained(lhs.data) and is_trained(rhs.data):
            # the one that is more an activation (rows looked up) gives way
            live = lhs.facts.live or not rhs.facts.live
            lhs = Value(dequantize(lhs.data), lhs.facts) if live else lhs
            rhs = rhs if live else Value(dequantize(rhs.data), rhs.facts)
        if not is_trained(lhs.data) and not is_trained(rhs.data):
            return super().contract(ip, dataclasses.replace(site, lhs=lhs, rhs=rhs))
        flipped = is_trained(lhs.data)
        held: Trained = lhs.data if flipped else rhs.data
        x, rest = (rhs if flipped else lhs).data, [v.data for v in site.rest]
        q, values = held.constant, held.values
        assert values is not None

        def served(x: Array, q: QTensor, rest: list[Array]) -> Array:
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
                held.key,
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
            return _gradients_rounded(product, x, w, held, site.eqn, flipped)

        constants = (lax.stop_gradient(x), q, rest)
        return ops.with_gradients_of(
            lambda held: served(*held), reference, constants, (rounded, values)
        )


def _gradients_rounded(
    product: Callable[[Array, Array], Array],
    x: Array,
    w: Array,
    held: Trained,
    eqn: Any,
    flipped: bool,
) -> Array:
    """What has the gradients of a product, rounded for each operand as its spec says.

    Other contractions than `dot_general`, and those on an explicit mesh, have no form of their
    gradient on integers here: they take rounded gradients in float.
    """
    assert held.gradients is not None
    to_x, to_w = product(x, lax.stop_gradient(w)), product(lax.stop_gradient(x), w)
    kept_of_x, kept_of_w = _kept(eqn, flipped)
    over = [tuple(a for a in range(to_x.ndim) if a not in kept) for kept in (kept_of_x, kept_of_w)]
    # a sum, of which nothing but the gradient is used
    return ops.with_rounded_gradient(
        to_x, held.gradients.input, held.key, over[0]
    ) + ops.with_rounded_gradient(to_w, held.gradients.weight, held.key, over[1])


def _kept(eqn: Any, flipped: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a result whose indices have a scale each: for the input, and for the weight."""
    if eqn.primitive.name == "conv_general_dilated":
        images, channels, *_ = eqn.params["dimension_numbers"].out_spec
        pair = (images,), (channels,)
    else:  # ragged: rows and columns
        pair = (0,), (1,)
    return pair[::-1] if flipped else pair


def _rounded(x: Array, held: Trained, over: tuple[int, ...]) -> Array:
    """An activation rounded as its contraction rounds it, with the gradient of its estimator."""
    spec = held.use.activations
    if spec is None or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    grid = None if held.calibration is None else held.calibration.input
    fixed = lax.stop_gradient(x)
    estimator = held.estimator or straight_through()
    if grid is None:  # the range is that of the values: none is outside
        return straight_through(clip=False).pass_activation(
            x, ops.fake(fixed, spec, over), {}, spec
        )
    learned = held.learned
    if learned is None:
        zero = ops.own_zero_point(grid, spec)
        learned = {"scale": grid.scale, **({} if zero is None else {"zero_point": zero})}
    passed: Array = estimator.pass_activation(x, ops.fake_on_grid(fixed, grid, spec), learned, spec)
    return passed
