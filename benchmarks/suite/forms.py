"""Ways to compute one contraction: what `jaxquant/ops/lowering.py` chooses between, each by itself.

`forms_of(case)[name](x, q)` computes the same by every form that a row of
`lowering_table.py` compares: what `jaxquant.ops` makes of the call, and what it might
have made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

import jaxquant as jq
from benchmarks.suite.cases import normal
from benchmarks.suite.lowering_table import Case
from jaxquant.ops import contract as products
from jaxquant.ops import conv_general_dilated, dot_general
from jaxquant.ops.activations import quantize_activation
from jaxquant.ops.convolve import Conv
from jaxquant.ops.cpu.nibbles import unpacked
from jaxquant.ops.dot_codes import int8_operand
from jaxquant.ops.limbs import contract_limbs
from jaxquant.ops.operands import Operand, arranged, place, weight
from jaxquant.qtensor import storage_codes, storage_values
from jaxquant.qtensor.storage import from_storage

Form = Callable[[Array, Any], Array]

OVER = (((1,), (0,)), ((), ()))
INT8 = jq.QSpec("int8")
NHWC = ("NHWC", "HWIO", "NHWC")


def arguments(case: Case) -> tuple[Array, Any, Array]:
    """An activation, a quantized weight, and the float weight: of a case's shapes."""
    if case.window:
        size, channels, outs = case.rows, case.inputs, case.outputs
        groups = channels if case.depthwise else 1
        w = normal(0, case.window, case.window, channels // groups, outs)
        spec = jq.QSpec(case.format, jq.PerChannel(3))
        return normal(1, 8, size, size, channels), jq.quantize(w, spec), w
    w, x = normal(0, case.inputs, case.outputs), normal(1, case.rows, case.inputs)
    if case.format.startswith("palette"):
        bits = int(case.format[len("palette") :])
        spec = jq.palette(bits).at((0,), 2)
        return x, jq.kmeans()(w, spec, storage_last_axes=(0,))[0], w
    by = jq.PerGroup(case.group, 0) if case.group else jq.PerChannel(1)
    return x, jq.quantize(w, jq.QSpec(case.format, by), storage_last_axes=(0,)), w


def plain(case: Case) -> Form:
    """The float contraction."""
    if not case.window:
        return lambda x, w: x @ w
    groups = case.inputs if case.depthwise else 1
    return lambda x, w: lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=groups
    )


def served(activations: jq.QSpec | None) -> Form:
    """What the library makes of it."""
    return lambda x, q: dot_general(x, q, OVER, activations=activations)


def _floats(x: Array, q: Any, values: bool = False) -> tuple[Operand, Operand]:
    at = place(q, (0,), ())
    assert at is not None
    moved = arranged(x, (1,), (), at, (0,))
    if not values:
        return moved, int8_operand(q, at, x)
    return moved, dataclasses.replace(weight(q, at, storage_values(q)), zero=None)


def _codes(x: Array, q: Any) -> tuple[Operand, Operand]:
    moved, w = _floats(x, q)
    codes, scale, zero = quantize_activation(moved.values, INT8, (*moved.groups, *moved.inner))
    return dataclasses.replace(moved, values=codes, scale=scale, zero=zero), w


def integer(form: Callable[[Operand, Operand], Array]) -> Form:
    """A form of operands that are both int8."""
    return lambda x, q: form(*_codes(x, q))


def floating(form: Callable[[Operand, Operand], Array]) -> Form:
    """A form of a float activation with dequantized codes."""
    return lambda x, q: form(*_floats(x, q, values=True))


def first_axis(x: Array, q: Any) -> Array:
    """The weight stored with the contracted axis first."""
    a, w = _codes(x, q)
    w = dataclasses.replace(w, values=lax.optimization_barrier(w.values.T), free=(1,), inner=(0,))
    total = products.product(a, w)
    scale = w.scale
    assert a.scale is not None and scale is not None
    return total * a.scale * scale.reshape(1, -1)


def two_rows(x: Array, q: Any) -> Array:
    """A row of zeros added, so that the product is one of matrices."""
    a, w = _codes(jnp.pad(x, ((0, 1), (0, 0))), q)
    return products.batched(a, w)[:1]


def two_limbs(x: Array, q: Any) -> Array:
    """Each row as two rows of int8, which keep 15 bits of it."""
    a, w = _floats(x, q)
    if len(x) > 1:
        return contract_limbs(a, w, narrow=w.packed is not None)
    both = contract_limbs(*_floats(jnp.pad(x, ((0, 2), (0, 0))), q), narrow=w.packed is not None)
    return both[:1]


def scaled_each(x: Array, q: Any) -> Array:
    """Groups in a loop, every partial sum times both scales."""
    a, w = _codes(x, q)
    w = unpacked(w)
    assert a.scale is not None and w.scale is not None
    row = a.scale[:, 0]

    def step(total: Array, group: tuple[Array, Array, Array]) -> tuple[Array, None]:
        codes, values, scale = group
        part = lax.dot_general(
            codes, values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        )
        return total + part * row * scale.reshape(1, -1), None

    groups = tuple(jnp.moveaxis(v, 1, 0) for v in (a.values, w.values, w.scale))
    return lax.scan(step, jnp.zeros((len(x), w.values.shape[0])), groups)[0]


def apart(x: Array, q: Any) -> Array:
    """What makes an activation kept apart from what quantizes it."""
    return dot_general(lax.optimization_barrier(jnp.tanh(x)), q, OVER, activations=INT8)


def by_centroids(x: Array, q: Any) -> Array:
    """One product for each value of a codebook: `sum_c v_c sum_{k: q = c} x_k`."""
    codes = storage_codes(q)  # [n, k]
    total = jnp.zeros((len(x), codes.shape[0]))
    for c in range(q.codebook.shape[-1]):
        member = (codes == c).astype(jnp.float32)
        total += q.codebook[..., c] * lax.dot_general(x, member, (((1,), (1,)), ((), ())))
    return total * q.scale.reshape(1, -1)


def convolved(case: Case) -> Form:
    """What the library makes of a convolution."""
    groups = case.inputs if case.depthwise else 1
    return lambda x, q: conv_general_dilated(
        x, q, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=groups,
        activations=INT8,
    )  # fmt: skip


def _image_codes(x: Array) -> tuple[Array, Array]:
    codes, scale, _ = quantize_activation(x, INT8, (1, 2, 3))
    return codes, scale


def _direct(case: Case) -> Conv:
    numbers = lax.conv_dimension_numbers((0, 0, 0, 0), (0, 0, 0, 0), NHWC)
    groups = case.inputs if case.depthwise else 1
    return Conv((1, 1), "SAME", None, None, numbers, groups, 1, None, jnp.dtype("int32"), None)


def direct(case: Case) -> Form:
    """XLA's own integer convolution."""

    def form(x: Array, q: Any) -> Array:
        codes, scale = _image_codes(x)
        kernel = from_storage(q, storage_codes(q)).astype(jnp.int8)
        return _direct(case)(codes, kernel) * scale * q.scale.reshape(1, 1, 1, -1)

    return form


def as_dots(case: Case) -> Form:
    """A convolution as one product of its windows (im2col)."""

    def form(x: Array, q: Any) -> Array:
        codes, scale = _image_codes(x)
        reach, size = case.window // 2, x.shape[1]
        pads = ((0, 0), (reach, reach), (reach, reach), (0, 0))
        padded = jnp.pad(codes, pads)
        taps = [(i, j) for i in range(case.window) for j in range(case.window)]
        windows = [padded[:, i : i + size, j : j + size] for i, j in taps]
        rows = lax.optimization_barrier(jnp.concatenate(windows, axis=-1))
        kernel = q.codes.reshape(-1, q.codes.shape[-1])
        total = lax.dot_general(
            rows, kernel, (((3,), (0,)), ((), ())), preferred_element_type=jnp.int32
        )
        return total * scale * q.scale.reshape(1, 1, 1, -1)

    return form


def forms_of(case: Case) -> dict[str, Form]:
    """Every form by its name; a row of the table compares some of them."""
    whole = products.in_float if case.group else products.batched
    return {
        "one loop": served(INT8),
        "one loop, 15 bits": served(None),
        "two rows": two_rows,
        "one row": integer(products.batched),
        "contracted axis last": served(INT8),
        "contracted axis first": first_axis,
        "limbs": two_limbs,
        "converted": floating(whole),
        "loop": integer(products.loop),
        "batch": integer(lambda x, w: products.batched(x, unpacked(w))),
        "dequantized": integer(lambda x, w: products.in_float(x, unpacked(w))),
        "scales once": integer(products.loop),
        "scales each": scaled_each,
        "whole": served(None),
        "centroids": by_centroids,
        "in one program": lambda x, q: dot_general(jnp.tanh(x), q, OVER, activations=INT8),
        "apart": apart,
        "direct": direct(case),
        "dots": as_dots(case),
        "shifted products": convolved(case),
    }
