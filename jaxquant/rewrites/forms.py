"""Values as `factor * base + shift`, with factor and shift polynomials of leaves.

A BatchNorm can be written in many ways, all of which have the same two polynomials. Variables
are leaves `p` and the inverse roots `r = 1 / sqrt(p + eps)`; exponents are integers, so that a
square root is `r^-1`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from jaxquant.interpret import primitives
from jaxquant.interpret.shape_factors import factors
from jaxquant.rewrites.graph import Node

# a variable is (path, None), the leaf itself, or (path, eps), its inverse root
Variable = tuple[str, float | None]
Monomial = frozenset[tuple[Variable, int]]
Polynomial = Mapping[Monomial, float]

ONE: Monomial = frozenset()
_MOST_TERMS = 8  # a BatchNorm has three; a value with more than this is none


@dataclasses.dataclass(frozen=True)
class Form:
    """`factor * base + shift`, elementwise.

    Attributes:
      base: the value that is scaled and shifted; `None` for a value of parameters alone.
      factor: what the base is multiplied by.
      shift: what is added.
      axes: for each axis of the value, the same axis of the base, or `None`.
      places: for each leaf in the polynomials, the value's axis for each axis of the leaf.
      sliced: for each leaf, pairs of a loop and the leaf's axis that it slices.
    """

    base: Node | None
    factor: Polynomial
    shift: Polynomial
    axes: tuple[int | None, ...]
    places: Mapping[str, tuple[int | None, ...]]
    sliced: Mapping[str, tuple[tuple[int, int], ...]]

    @property
    def leaf(self) -> str | None:
        """Path of the leaf, if the value is one, possibly moved."""
        if self.base is None and len(self.shift) == 1:
            [(monomial, times)] = self.shift.items()
            if times == 1.0 and len(monomial) == 1:
                [((path, eps), power)] = monomial
                return path if eps is None and power == 1 else None
        return None


def opaque(node: Node) -> Form:
    """The form of an unknown value, which is its own base."""
    return Form(node, {ONE: 1.0}, {}, tuple(range(len(node.shape))), {}, {})


def form_of(node: Node, forms: Mapping[Node, Form]) -> Form:
    """The form of a value, from those of its parents."""
    if node.op == "leaf" and node.dtype is not None and jnp.issubdtype(node.dtype, jnp.floating):
        places = {node.detail: tuple(range(len(node.shape)))}
        return Form(None, {}, {_variable(node.detail): 1.0}, (None,) * len(node.shape), places, {})
    if node.op == "const" and node.detail is not None:
        return Form(None, {}, {ONE: node.detail}, (None,) * len(node.shape), {}, {})
    form: Form | None = None
    if node.op in _LAYOUT:
        form = _LAYOUT[node.op](node, forms[node.parents[0]])
    elif node.op in _ARITHMETIC:
        form = _ARITHMETIC[node.op](node, *(forms[parent] for parent in node.parents))
    if form is None or max(len(form.factor), len(form.shift)) > _MOST_TERMS:
        return opaque(node)
    return form


def _variable(path: str, eps: float | None = None, power: int = 1) -> Monomial:
    return frozenset({((path, eps), power)})


# Polynomials


def product(a: Polynomial, b: Polynomial) -> Polynomial:
    """The product of two polynomials."""
    out: dict[Monomial, float] = {}
    for x, n in a.items():
        for y, m in b.items():
            powers = dict(x)
            for variable, power in y:
                powers[variable] = powers.get(variable, 0) + power
            monomial = frozenset((v, p) for v, p in powers.items() if p)
            out[monomial] = out.get(monomial, 0.0) + n * m
    return {monomial: times for monomial, times in out.items() if times}


def _sum(a: Polynomial, b: Polynomial, sign: float = 1.0) -> Polynomial:
    out = dict(a)
    for monomial, times in b.items():
        out[monomial] = out.get(monomial, 0.0) + sign * times
    return {monomial: times for monomial, times in out.items() if times}


def _power(a: Polynomial, n: int) -> Polynomial | None:
    if len(a) != 1:
        return None
    [(monomial, times)] = a.items()
    return {frozenset((v, p * n) for v, p in monomial): times**n}


# Arithmetic


def _together(node: Node, a: Form, b: Form) -> dict[str, Any] | None:
    """The fields of a result besides its polynomials; `None` if the forms do not fit."""
    if a.base is not None and b.base is not None:
        return None
    for mine, other in ((a.places, b.places), (a.sliced, b.sliced)):
        if any(other.get(path, axes) != axes for path, axes in mine.items()):
            return None
    based = a if a.base is not None else b
    axes = based.axes if len(based.axes) == len(node.shape) else (None,) * len(node.shape)
    places, sliced = {**a.places, **b.places}, {**a.sliced, **b.sliced}
    return {"base": based.base, "axes": axes, "places": places, "sliced": sliced}


def _add(node: Node, a: Form, b: Form, sign: float = 1.0) -> Form | None:
    rest = _together(node, a, b)
    if rest is None:
        return None
    return Form(factor=_sum(a.factor, b.factor, sign), shift=_sum(a.shift, b.shift, sign), **rest)


def _mul(node: Node, a: Form, b: Form) -> Form | None:
    rest = _together(node, a, b)
    if rest is None:
        return None
    based, by = (a, b.shift) if a.base is not None else (b, a.shift)
    return Form(factor=product(based.factor, by), shift=product(based.shift, by), **rest)


def _div(node: Node, a: Form, b: Form) -> Form | None:
    inverse = _power(b.shift, -1) if b.base is None else None
    return None if inverse is None else _mul(node, a, dataclasses.replace(b, shift=inverse))


def _neg(node: Node, a: Form) -> Form:
    nothing: Polynomial = {}
    return dataclasses.replace(
        a, factor=_sum(nothing, a.factor, -1.0), shift=_sum(nothing, a.shift, -1.0)
    )


def _root(node: Node, a: Form, power: int) -> Form | None:
    """`(p + eps)^(-power / 2)` for a leaf `p`."""
    eps = a.shift.get(ONE, 0.0)
    rest = [(monomial, times) for monomial, times in a.shift.items() if monomial != ONE]
    if a.base is not None or len(rest) != 1 or rest[0][1] != 1.0 or len(rest[0][0]) != 1:
        return None
    [((path, root), exponent)] = rest[0][0]
    if root is not None or exponent != 1:
        return None
    return dataclasses.replace(a, shift={_variable(path, eps, power): 1.0})


def _integer_pow(node: Node, a: Form) -> Form | None:
    shift = _power(a.shift, node.params["y"]) if a.base is None else None
    return None if shift is None else dataclasses.replace(a, shift=shift)


def _pow(node: Node, a: Form, b: Form) -> Form | None:
    if b.base is not None or set(b.shift) != {ONE}:
        return None
    power = -2.0 * b.shift[ONE]
    return _root(node, a, int(power)) if power in (1.0, -1.0) else None


_ARITHMETIC: dict[str, Callable[..., Form | None]] = {
    "add": _add,
    "add_any": _add,
    "sub": lambda node, a, b: _add(node, a, b, -1.0),
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "rsqrt": lambda node, a: _root(node, a, 1),
    "sqrt": lambda node, a: _root(node, a, -1),
    "integer_pow": _integer_pow,
    "pow": _pow,
}


# Layout


def _moved(form: Form, rank: int, to: Mapping[int, int]) -> Form:
    """The form after its axes move by `to` (old -> new); other axes are dropped."""
    axes: list[int | None] = [None] * rank
    for old, new in to.items():
        axes[new] = form.axes[old]
    places = {
        path: tuple(None if at is None else to.get(at) for at in ats)
        for path, ats in form.places.items()
    }
    return dataclasses.replace(form, axes=tuple(axes), places=places)


def _same(node: Node, form: Form) -> Form | None:
    return form if jnp.issubdtype(node.dtype, jnp.floating) else None


def _transpose(node: Node, form: Form) -> Form:
    order = node.params["permutation"]
    return _moved(form, len(order), {old: new for new, old in enumerate(order)})


def _broadcast(node: Node, form: Form) -> Form:
    to = dict(enumerate(node.params["broadcast_dimensions"]))
    return _moved(form, len(node.shape), to)


def _reshape(node: Node, form: Form) -> Form | None:
    """Axes keep their place, but for merged and split ones, which are dropped."""
    old, new = node.parents[0].shape, node.shape
    if node.params.get("dimensions") is not None or 0 in old:
        return None
    to: dict[int, int] = {}
    for olds, news in factors(old, new):
        wide = [a for a in olds if old[a] != 1], [a for a in news if new[a] != 1]
        if len(wide[0]) == len(wide[1]) == 1:
            to[wide[0][0]] = wide[1][0]
    return _moved(form, len(new), to)


def _squeeze(node: Node, form: Form) -> Form:
    dims = {d % len(node.parents[0].shape) for d in node.params["dimensions"]}
    axes = [a for a in range(len(node.parents[0].shape)) if a not in dims]
    return _moved(form, len(axes), {old: new for new, old in enumerate(axes)})


def _rev(node: Node, form: Form) -> Form:
    axes = [a for a in range(len(node.shape)) if a not in node.params["dimensions"]]
    return _moved(form, len(node.shape), {a: a for a in axes})


def _step(node: Node, form: Form) -> Form | None:
    """One step of a scanned value, without its leading axis."""
    if form.base is not None:
        return None
    sliced = {
        path: form.sliced.get(path, ())
        + tuple((node.detail, i) for i, at in enumerate(ats) if at == 0)
        for path, ats in form.places.items()
    }
    shifted = _moved(form, len(node.shape), {a + 1: a for a in range(len(node.shape))})
    return dataclasses.replace(shifted, sliced=sliced)


_MOVES: dict[primitives.Move, Callable[[Node, Form], Form | None]] = {
    **dict.fromkeys(("none", "place", "convert"), _same),
    "transpose": _transpose,
    "broadcast": _broadcast,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "rev": _rev,
}
_LAYOUT = {**primitives.by_move(_MOVES), "step": _step}
