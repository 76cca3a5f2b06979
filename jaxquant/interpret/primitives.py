"""What each JAX primitive means to jaxquant: one row each, read by every walk over a jaxpr.

For a primitive without a row, quantized operands are dequantized and nothing is known of the
results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax.numpy as jnp

T = TypeVar("T")
Kind = Literal["contraction", "call", "control", "layout", "reduction", "elementwise", "other"]
# fmt: off
Move = Literal[
    "none", "place", "barrier", "convert", "round",
    "transpose", "reshape", "squeeze", "broadcast", "slice", "dynamic_slice", "split", "rev",
    "gather", "concatenate", "stack", "pad", "reduce", "window",
]
# fmt: on
Integers = Literal["same", "convert", "move", "affine", "clip"]
Sign = Callable[[Any, Sequence[bool]], bool]


# Sign rules: whether results cannot be negative, from which operands cannot


def _unknown(eqn: Any, operands: Sequence[bool]) -> bool:
    return False


def _always(eqn: Any, operands: Sequence[bool]) -> bool:
    return True


def _first(eqn: Any, operands: Sequence[bool]) -> bool:
    return bool(operands) and operands[0]


def _all(eqn: Any, operands: Sequence[bool]) -> bool:
    return all(operands)


def _any(eqn: Any, operands: Sequence[bool]) -> bool:
    return any(operands)


def _cases(eqn: Any, operands: Sequence[bool]) -> bool:
    return all(operands[1:])


def _even_power(eqn: Any, operands: Sequence[bool]) -> bool:
    return eqn.params["y"] % 2 == 0 or operands[0]


def _to_float(eqn: Any, operands: Sequence[bool]) -> bool:
    """A narrower integer may wrap around."""
    return operands[0] and bool(jnp.issubdtype(eqn.params["new_dtype"], jnp.floating))


@dataclasses.dataclass(frozen=True)
class Primitive:
    """The row of one primitive.

    Attributes:
      kind: contractions go to the policy; calls (which run their body once) and control flow are
        entered; layout primitives move values and compute nothing.
      move: how results are taken from the operands. A walk has one rule for each move it follows.
      sign: whether results cannot be negative; `None` if each result has the sign of the operand
        at its position, as in `sort`.
      integers: how an integer activation is handled; `None` makes it float.
    """

    kind: Kind = "other"
    move: Move | None = None
    sign: Sign | None = _unknown
    integers: Integers | None = None


def _rows(names: str, *row: Any, **fields: Any) -> dict[str, Primitive]:
    return dict.fromkeys(names.split(), Primitive(*row, **fields))


TABLE: Mapping[str, Primitive] = {
    **_rows("dot_general conv_general_dilated ragged_dot_general", "contraction"),
    #
    **_rows("jit closed_call eval_jaxpr remat2 custom_jvp_call custom_vjp_call", "call"),
    **_rows("scan while cond shard_map", "control"),
    # Layout: values stay where they are
    **_rows("copy stop_gradient name pvary", "layout", "none", _first, "same"),
    **_rows("sharding_constraint reshard", "layout", "place", _first, "move"),
    **_rows("optimization_barrier", "layout", "barrier", None, "same"),
    **_rows("convert_element_type", "layout", "convert", _to_float, "convert"),
    **_rows("reduce_precision", "layout", "round", _first, "same"),
    # Layout: values move
    **_rows("transpose", "layout", "transpose", _first, "move"),
    **_rows("reshape", "layout", "reshape", _first, "move"),
    **_rows("squeeze", "layout", "squeeze", _first, "move"),
    **_rows("broadcast_in_dim", "layout", "broadcast", _first, "move"),
    **_rows("slice", "layout", "slice", _first, "move"),
    **_rows("dynamic_slice", "layout", "dynamic_slice", _first, "move"),
    **_rows("split", "layout", "split", _first, "move"),
    **_rows("rev", "layout", "rev", _first, "move"),
    **_rows("gather", "layout", "gather", _first, "move"),
    **_rows("concatenate", "layout", "concatenate", _all, "move"),
    **_rows("stack", "layout", "stack", _all),
    **_rows("pad", "layout", "pad", _all, "move"),
    **_rows("dynamic_update_slice", sign=_all),
    **_rows("sort", sign=None),
    #
    **_rows("reduce_max", "reduction", "reduce", _first, "move"),
    **_rows("reduce_sum reduce_min", "reduction", "reduce", _first),
    **_rows("reduce_window_max", "reduction", "window", _first, "move"),
    **_rows("reduce_window_sum reduce_window_min", "reduction", "window", _first),
    **_rows("reduce_prod cumsum cumprod cummax cummin", "reduction", sign=_first),
    **_rows("argmax argmin", "reduction", sign=_always),
    **_rows("iota", sign=_always),
    # Elementwise: sums and products with vectors over channels keep integers integer
    **_rows("add add_any mul div", "elementwise", sign=_all, integers="affine"),
    **_rows("sub neg", "elementwise", integers="affine"),
    **_rows("max", "elementwise", sign=_any, integers="clip"),
    **_rows("min", "elementwise", sign=_all, integers="clip"),
    **_rows("clamp", "elementwise", integers="clip"),
    **_rows("exp exp2 abs logistic square erfc is_finite", "elementwise", sign=_always),
    **_rows("rem", "elementwise", sign=_all),
    **_rows("sqrt real pow", "elementwise", sign=_first),
    **_rows("select_n", "elementwise", sign=_cases),
    **_rows("integer_pow", "elementwise", sign=_even_power),
    **_rows("acos acosh asin asinh atan atan2 atanh cos cosh sin sinh tan tanh", "elementwise"),
    **_rows("expm1 log log1p log2 cbrt rsqrt one_minus_square", "elementwise"),
    **_rows("ceil floor round sign nextafter", "elementwise"),
    **_rows("erf erf_inv lgamma digamma igamma igamma_grad_a igammac zeta", "elementwise"),
    **_rows("polygamma bessel_i0e bessel_i1e regularized_incomplete_beta", "elementwise"),
    **_rows("complex conj imag", "elementwise"),
    **_rows("eq ne lt le gt ge eq_to lt_to le_to", "elementwise"),
    **_rows("and or xor not clz population_count", "elementwise"),
    **_rows("shift_left shift_right_arithmetic shift_right_logical", "elementwise"),
}

_NO_ROW = Primitive()


def of(eqn: Any) -> Primitive:
    """The row of an equation's primitive."""
    return TABLE.get(eqn.primitive.name, _NO_ROW)


def by_move(rules: Mapping[Move, T]) -> dict[str, T]:
    """Rules by move -> rules by the name of each primitive with that move.

    >>> sorted(by_move({"place": 1, "rev": 2}).items())
    [('reshard', 1), ('rev', 2), ('sharding_constraint', 1)]
    """
    return {name: rules[row.move] for name, row in TABLE.items() if row.move and row.move in rules}
