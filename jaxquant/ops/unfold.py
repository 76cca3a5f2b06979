"""The activation of a contraction as rows of a matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax


def unfold(
    primitive: str,
    params: Mapping[str, Any],
    side: str,
    x: Array,
    weight_shape: tuple[int, ...],
    rest: Sequence[Array] = (),
) -> Array:
    """The rows of an activation, with which the site computes `rows @ W`, `W` `[K, N]`.

    `K` runs over the weight's contracted axes, flattened in the order in which the equation names
    them (a kernel's: ascending); the leading axes are the weight's batch axes, in order, then its
    group axis. Rows of a convolution are its windows; in a ragged product, rows of other groups
    are zeros.

    Args:
      primitive: `"dot_general"`, `"conv_general_dilated"` or `"ragged_dot_general"`.
      params: the parameters of the equation.
      side: which operand `x` is, `"lhs"` or `"rhs"`.
      x: the activation, of any float dtype.
      weight_shape: shape of the other operand in the equation.
      rest: the equation's other operands: the group sizes of a ragged product.

    Returns:
      `[*batched, rows, K]` in the dtype of `x`.

    Raises:
      ValueError: the contraction is not a product of rows and one matrix: a grouped convolution,
        one whose kernel is the activation, a product with ragged contracted or batch axes.

    >>> numbers = (((1, 2), (0, 1)), ((), ()))
    >>> x = jnp.zeros((7, 2, 3))
    >>> unfold("dot_general", {"dimension_numbers": numbers}, "lhs", x, (2, 3, 5)).shape
    (7, 6)
    """
    if side not in ("lhs", "rhs"):
        raise ValueError(f"unfold: side is 'lhs' or 'rhs', got {side!r}")
    if primitive == "dot_general":
        contract, batch = params["dimension_numbers"]
        at = 0 if side == "lhs" else 1
        return _rows(x, contract[at], batch[at])
    if primitive == "conv_general_dilated":
        return _windows(params, side, x, weight_shape)
    if primitive == "ragged_dot_general":
        return _ragged(params, side, x, weight_shape, rest)
    raise ValueError(f"unfold: expected a contraction, got {primitive!r}")


def _rows(x: Array, contracted: Sequence[int], batched: Sequence[int]) -> Array:
    """`[*batched, free, contracted]` of an array, free and contracted axes flattened."""
    free = [a for a in range(x.ndim) if a not in contracted and a not in batched]
    lead = [x.shape[a] for a in batched]
    rows, k = (math.prod(x.shape[a] for a in axes) for axes in (free, contracted))
    return jnp.transpose(x, [*batched, *free, *contracted]).reshape(*lead, rows, k)


def _windows(
    params: Mapping[str, Any], side: str, x: Array, weight_shape: tuple[int, ...]
) -> Array:
    if side != "lhs":
        raise ValueError("unfold: a convolution whose kernel is the activation has no rows")
    for name in ("feature_group_count", "batch_group_count"):
        if params[name] != 1:
            raise ValueError(
                f"a convolution with {name}={params[name]} is not a product of rows and one "
                "matrix: each group of output channels has other inputs"
            )
    numbers = params["dimension_numbers"]
    kernel = tuple(numbers.rhs_spec)  # (out, in, *spatial)
    sizes = [weight_shape[a] for a in kernel[2:]]
    first = jnp.transpose(x, numbers.lhs_spec)  # [batch, features, *spatial]
    patches = lax.conv_general_dilated_patches(
        first,
        sizes,
        params["window_strides"],
        params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        precision=lax.Precision.HIGHEST,
    )
    count, places = patches.shape[0], patches.shape[2:]
    patches = patches.reshape(count, weight_shape[kernel[1]], *sizes, *places)
    inner = {axis: 1 + i for i, axis in enumerate(kernel[1:])}
    contracted = [inner[a] for a in sorted(inner)]
    return _rows(patches, contracted, ())


def _ragged(
    params: Mapping[str, Any],
    side: str,
    x: Array,
    weight_shape: tuple[int, ...],
    rest: Sequence[Array],
) -> Array:
    numbers = params["ragged_dot_dimension_numbers"]
    (contract, batch), grouped = numbers.dot_dimension_numbers, numbers.rhs_group_dimensions
    (ragged,) = numbers.lhs_ragged_dimensions
    if side != "lhs" or len(grouped) != 1 or ragged in (*contract[0], *batch[0]):
        raise ValueError(
            "unfold: expected a ragged product of rows in groups with one matrix for each group, "
            f"got {numbers} and the activation as {side}"
        )
    if len(rest) != 1 or rest[0].ndim != 1:
        raise ValueError(
            "unfold: expected the sizes of the groups as one array of rank 1, got "
            f"{[list(r.shape) for r in rest]}"
        )
    groups = weight_shape[grouped[0]]
    ends = jnp.cumsum(rest[0])
    place = jnp.arange(x.shape[ragged])[None, :]
    mask = (place >= (ends - rest[0])[:, None]) & (place < ends[:, None])  # [groups, ragged]
    shape = [groups, *(n if a == ragged else 1 for a, n in enumerate(x.shape))]
    each = jnp.where(mask.reshape(shape), x[None], jnp.zeros((), x.dtype))
    return _rows(each, [a + 1 for a in contract[0]], [*(a + 1 for a in batch[0]), 0])
