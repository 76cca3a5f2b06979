"""What a value is in terms of parameters: `factor * base + shift`, both polynomials of leaves.

A BatchNorm can be written in many ways, and all of them are the same two polynomials. Variables
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
_MOST_TERMS = 8  # a BatchNorm has three; whatever grows beyond this is none


@dataclasses.dataclass(frozen=True)
class Form:
    """`factor * base + shift`, elementwise.

    Attributes:
      base: the value that is scaled and shifted; `None` for a value of parameters alone.
      factor: of the base.
      shift: added to it.
      axes: for each axis of the value, the base's axis that it is, `None` for another.
      places: for each leaf in the polynomials, where the value has each of the leaf's axes.
      sliced: for each leaf, which loop takes away which of its axes: pairs of loop and axis.
    """

    base: Node | None
    factor: Polynomial
    shift: Polynomial
    axes: tuple[int | None, ...]
    places: Mapping[str, tuple[int | None, ...]]
    sliced: Mapping[str, tuple[tuple[int, int], ...]]

    @property
    def leaf(self) -> str | None:
        """Path of the leaf that the value is, moved at most."""
        if self.base is None and len(self.shift) == 1:
            [(monomial, times)] = self.shift.items()
            if times == 1.0 and len(monomial) == 1:
                [((path, eps), power)] = monomial
                return path if eps is None and power == 1 else None
        return None


def opaque(node: Node) -> Form:
    """A value of which nothing is known: its own base."""
    return Form(node, {ONE: 1.0}, {}, tuple(range(len(node.shape))), {}, {})


def form_of(node: Node, forms: Mapping[Node, Form]) -> Form:
    """The form of a value, from those of its parents."""
    if node.op == "leaf" and node.dtype is not None and jnp.issubdtype(node.dtype, jnp.floating):
        places = {node.detail: tuple(range(len(node.shape)))}
        return Form(None, {}, {_variable(node.detail): 1.0}, (None,) * len(node.shape), places, {})
    if node.op == "const" and node.detail is not None:
        return Form(None, {}, {ONE: node.detail}, (None,) * len(node.shape), {}, {})
    found: Form | None = None
    if node.op in _LAYOUT:
        found = _LAYOUT[node.op](node, forms[node.parents[0]])
    elif node.op in _ARITHMETIC:
        found = _ARITHMETIC[node.op](node, *(forms[parent] for parent in node.parents))
    if found is None or max(len(found.factor), len(found.shift)) > _MOST_TERMS:
        return opaque(node)
    return found


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
    """What the result of two forms has apart from its polynomials; `None` if they do not fit."""
    if a.base is not None and b.base is not None:
        return None
    for mine, other in ((a.places, b.places), (a.sliced, b.sliced)):
        if any(other.get(path, held) != held for path, held in mine.items()):
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
    found = _power(a.shift, node.params["y"]) if a.base is None else None
    return None if found is None else dataclasses.replace(a, shift=found)


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
    """The form after its axes went to new places; axes not named are lost."""
    axes: list[int | None] = [None] * rank
    for old, new in to.items():
        axes[new] = form.axes[old]
    places = {
        path: tuple(None if at is None else to.get(at) for at in held)
        for path, held in form.places.items()
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
    """Axes that stay whole keep their place; merged or split ones are lost."""
    old, new = node.parents[0].shape, node.shape
    if node.params.get("dimensions") is not None or 0 in old:
        return None
    to: dict[int, int] = {}
    for olds, news in factors(old, new):
        kept = [a for a in olds if old[a] != 1], [a for a in news if new[a] != 1]
        if len(kept[0]) == len(kept[1]) == 1:
            to[kept[0][0]] = kept[1][0]
    return _moved(form, len(new), to)


def _squeeze(node: Node, form: Form) -> Form:
    gone = {d % len(node.parents[0].shape) for d in node.params["dimensions"]}
    left = [a for a in range(len(node.parents[0].shape)) if a not in gone]
    return _moved(form, len(left), {old: new for new, old in enumerate(left)})


def _rev(node: Node, form: Form) -> Form:
    left = [a for a in range(len(node.shape)) if a not in node.params["dimensions"]]
    return _moved(form, len(node.shape), {a: a for a in left})


def _step(node: Node, form: Form) -> Form | None:
    """One step of a scanned value, its leading axis taken away."""
    if form.base is not None:
        return None
    sliced = {
        path: form.sliced.get(path, ())
        + tuple((node.detail, i) for i, at in enumerate(held) if at == 0)
        for path, held in form.places.items()
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
