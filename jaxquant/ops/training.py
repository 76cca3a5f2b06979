"""Contractions in training: on codes as in inference, differentiated with respect to floats."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.ops.activations import fake, on_grid, quantize_activation, shared_axes
from jaxquant.ops.contract import contract, dequantized
from jaxquant.ops.dot_codes import Call, evaluated
from jaxquant.ops.operands import Operand, integer_range
from jaxquant.qtensor import Gradients, PerTensor, QSpec, QTensor, dequantize, encode_array


def with_gradients_of(
    forward: Callable[[Any], Any], reference: Callable[..., Any], inputs: Any, floats: Any
) -> Any:
    """`forward(inputs)`, differentiated as if it were `reference(*floats)`.

    `inputs` get no gradient.

    >>> twice = with_gradients_of(jnp.round, lambda x: 2 * x, jnp.float32(1.6), (jnp.ones(()),))
    >>> float(twice)
    2.0
    """

    @jax.custom_vjp
    def call(inputs: Any, floats: Any) -> Any:
        return forward(inputs)

    def fwd(inputs: Any, floats: Any) -> tuple[Any, Any]:
        return forward(inputs), floats

    def bwd(floats: Any, g: Any) -> tuple[None, Any]:
        return None, jax.vjp(lambda *f: reference(*f), *floats)[1](g)

    call.defvjp(fwd, bwd)
    return call(inputs, floats)


def with_rounded_gradient(
    y: Array, spec: QSpec | None, key: Array | None, over: tuple[int, ...]
) -> Array:
    """The identity on `y`; its gradient is quantized by `spec` with one scale over axes `over`."""

    @jax.custom_vjp
    def call(y: Array, key: Any) -> Array:
        return y

    def bwd(key: Any, g: Array) -> tuple[Array, None]:
        if spec is None:
            return g, None
        one, _ = _keys(key, g)
        prng_key = None if one is None else jax.random.wrap_key_data(one, impl="threefry2x32")
        return fake(g, spec, over, prng_key), None

    call.defvjp(lambda y, key: (y, key), bwd)
    return call(y, key)


def dot_trained(
    forward: Callable[[Array, QTensor], Array],
    x: Array,
    rounded: Array,
    q: QTensor,
    values: Array,
    key: Array | None,
    gradients: Gradients,
    params: dict[str, Any],
    flipped: bool,
) -> Array:
    """`forward(x, q)`, whose gradients are contractions of codes too.

    For `y[m, n] = sum_k x[m, k] w[k, n]` and `g = dL/dy`:
    `dx[m, k] = sum_n Q(g s_w)[m, n] q_w[k, n]` and `dw[k, n] = sum_m q_x[m, k] Q(s_x g)[m, n]`:
    scales along the contracted axis move to `g`, which is then quantized with one scale for each
    kept index. The residuals are the codes of `x` and `w`.

    Args:
      forward: the contraction, as in inference.
      x: float array, which gets no gradient.
      rounded: `x` after rounding, which gets its gradient.
      q: codes of the parameter, in the shape that is contracted.
      values: `dequantize(q)`, which gets the parameter's gradient.
      key: PRNG key data, uint32 `[2]`; `None` rounds `g` to nearest.
      gradients: specs of `g`.
      params: parameters of the `dot_general` equation.
      flipped: whether `q` is the left operand.

    Source: stochastic rounding of gradients, Gupta et al. (2015); all three contractions in 8 bits,
    Wang et al., "Training Deep Neural Networks with 8-bit Floating Point Numbers" (2018).
    """
    numbers = params["dimension_numbers"]
    rest = params.get("precision"), params.get("preferred_element_type")
    (x_contract, w_contract), (x_batch, w_batch) = (
        (numbers[0][::-1], numbers[1][::-1]) if flipped else (numbers[0], numbers[1])
    )
    spec = q.contraction.activations

    w_side = _Side(tuple(w_contract), tuple(w_batch), q.ndim)
    x_side = _Side(tuple(x_contract), tuple(x_batch), x.ndim)

    @jax.custom_vjp
    def call(x: Array, rounded: Array, q: QTensor, values: Array, key: Any) -> Array:
        return forward(x, q)

    def fwd(x: Array, rounded: Array, q: QTensor, values: Array, key: Any) -> tuple[Array, Any]:
        residual: Any = rounded
        if gradients.weight is not None and spec is not None:
            residual = _activation_codes(x, rounded, q, spec, x_side)
        return forward(x, q), (residual, q, key)

    def bwd(residuals: Any, g: Array) -> tuple[Any, ...]:
        residual, q, key = residuals
        to_x, to_w = _keys(key, g) if gradients.stochastic else (None, None)
        dx = _product(g, q, gradients.input, to_x, w_side, x_side, flipped, rest)
        if isinstance(residual, Operand) and gradients.weight is not None:
            dw = _weight_gradient(g, residual, q, gradients.weight, to_w, w_side, flipped)
        else:
            dw = _product(g, residual, gradients.weight, to_w, x_side, w_side, not flipped, rest)
        return None, dx.astype(rounded.dtype), None, dw.astype(values.dtype), None

    call.defvjp(fwd, bwd)
    return call(lax.stop_gradient(x), rounded, q, values, key)


class _Side:
    """One operand of the forward contraction: its contracted, batch and free axes."""

    def __init__(self, contract: tuple[int, ...], batch: tuple[int, ...], ndim: int) -> None:
        self.contract, self.batch = contract, batch
        self.free = tuple(a for a in range(ndim) if a not in contract and a not in batch)

    def matrix(self, x: Array) -> tuple[Array, tuple[int, ...]]:
        """`[free, contracted]`, flattened, and the contracted axis; unchanged with batch axes."""
        if self.batch:
            return x, self.contract
        sizes = [math.prod(x.shape[a] for a in axes) for axes in (self.free, self.contract)]
        return jnp.transpose(x, (*self.free, *self.contract)).reshape(sizes), (1,)


def _product(
    g: Array,
    q: QTensor | Array,
    spec: QSpec | None,
    key: Array | None,
    inside: _Side,
    outside: _Side,
    flipped: bool,
    rest: tuple[Any, Any],
) -> Array:
    """The gradient of the operand `outside`: `g` contracted with the other operand, `q`.

    `flipped`: whether `inside` was the left operand of the forward pass.
    """
    nb = len(inside.batch)
    first, second = (inside, outside) if flipped else (outside, inside)
    lefts = tuple(range(nb, nb + len(first.free)))
    rights = tuple(range(nb + len(first.free), nb + len(first.free) + len(second.free)))
    summed = lefts if flipped else rights
    batch = tuple(range(nb))
    precision, preferred = rest
    if spec is None or not isinstance(q, QTensor):
        other = dequantize(q) if isinstance(q, QTensor) else q
        out = lax.dot_general(
            g.astype(other.dtype), other, ((summed, inside.free), (batch, inside.batch)), precision
        )
    else:
        call = Call(
            summed, inside.free, batch, inside.batch, False, precision, preferred, None, spec, False
        )
        bare = dataclasses.replace(q, calibration=None)
        if key is None:
            out = evaluated(call, g, bare)
        else:
            out = evaluated(call, g, bare, jax.random.wrap_key_data(key, impl="threefry2x32"))
    # [batch, free of g (those of outside), contracted axes of inside, ascending]
    order = sorted(range(len(inside.contract)), key=lambda i: inside.contract[i])
    place: dict[int, int] = {a: i for i, a in enumerate(outside.batch)}
    place |= {a: nb + i for i, a in enumerate(outside.free)}
    place |= {outside.contract[i]: nb + len(outside.free) + n for n, i in enumerate(order)}
    return jnp.transpose(out, [place[a] for a in range(out.ndim)])


def _activation_codes(x: Array, rounded: Array, q: QTensor, spec: QSpec, side: _Side) -> Any:
    """The codes of `x` in the contraction, for the gradient of the weight.

    An operand `[rows, contracted]` if codes are integers and all rows share the zero point; else a
    `QTensor` of a dynamically quantized activation, or floats.
    """
    grid = None if q.calibration is None else q.calibration.input
    x2, over = side.matrix(x)
    if not side.batch and spec.format.is_integer and integer_range(spec.format) is not None:
        if grid is not None:
            scale, zero = (
                None if a is None else a.reshape(1, 1) for a in (grid.scale, grid.zero_point)
            )
            return Operand(on_grid(x2, grid, spec), scale, zero, (), (0,), (), (1,))
        per_tensor = spec.granularity == PerTensor()
        if spec.symmetric or per_tensor:
            codes, scale, zero = quantize_activation(x2, spec, (0, 1) if per_tensor else (1,))
            return Operand(codes, scale, zero, (), (0,), (), (1,))
    if grid is not None or shared_axes(spec, side.contract, x.ndim) is None:
        return rounded
    return encode_array(x2, spec.at(over, x2.ndim))


# An int32 always holds the sum of this many products of int8 codes.
_ROWS = 2**16


def _weight_gradient(
    g: Array,
    x: Operand,
    q: QTensor,
    spec: QSpec,
    key: Array | None,
    w_side: _Side,
    flipped: bool,
) -> Array:
    """`dw[k, n] = sum_m (q_x - z_x)[m, k] Q(s_x g)[m, n]` on matrices, laid out like the weight."""
    sizes = [q.shape[a] for a in (*w_side.contract, *w_side.free)]
    columns = math.prod(q.shape[a] for a in w_side.free)
    rows = x.values.shape[0]
    g = g.reshape(columns, rows).T if flipped else g.reshape(rows, columns)
    scaled = g.astype(jnp.float32) * (1.0 if x.scale is None else x.scale)
    prng_key = None if key is None else jax.random.wrap_key_data(key, impl="threefry2x32")
    if not spec.format.is_integer:
        out = dequantized(dataclasses.replace(x, scale=None)).T @ fake(scaled, spec, (0,), prng_key)
        return _laid_out(out, sizes, w_side, q.ndim)
    # g keeps its axis order and the codes of x are transposed; without the barrier XLA folds this
    # into a contraction of both first axes, which is slow on a CPU
    over = (0, 1) if spec.granularity == PerTensor() else (0,)
    codes, scale, _ = quantize_activation(scaled, spec, over, prng_key)
    transposed = lax.optimization_barrier(x.values).T
    total = None
    for start in range(0, rows, _ROWS):
        left = Operand(transposed[:, start : start + _ROWS], None, x.zero, (), (0,), (), (1,))
        right = Operand(codes[start : start + _ROWS], scale, None, (), (1,), (), (0,))
        part = contract(left, right)
        total = part if total is None else total + part
    out = jnp.zeros((x.values.shape[1], columns)) if total is None else total
    return _laid_out(out, sizes, w_side, q.ndim)


def _laid_out(out: Array, sizes: list[int], w_side: _Side, ndim: int) -> Array:
    """A gradient `[contracted, free]` in the order of the weight's axes."""
    places = (*w_side.contract, *w_side.free)
    return jnp.transpose(out.reshape(sizes), [places.index(a) for a in range(ndim)])


def _keys(key: Array | None, g: Array) -> tuple[Array | None, Array | None]:
    """Keys for both uses of `g`, derived from `key` and the bits of `g`.

    Steps of a loop and sites of one parameter share a key, but their gradients differ.
    """
    if key is None:
        return None, None
    bits = lax.bitcast_convert_type(g.astype(jnp.float32), jnp.uint32)
    word = jnp.sum(bits, dtype=jnp.uint32)  # modulo 2^32: the same on any number of devices
    # by arithmetic on the words of the key: `jax.random.split` takes long to compile
    one = key + jnp.stack([word, jnp.uint32(0)])
    return one, one ^ jnp.asarray([0, 0x9E3779B9], jnp.uint32)
