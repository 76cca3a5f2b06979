"""Optimizer state split by leaf, and a check that a transformation may run leaf by leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxquant.interpret.expressions import Expressions
from jaxquant.optim.blocks import is_blocks


@dataclasses.dataclass(frozen=True)
class Parts:
    """A state split into subtrees with the structure of the params, and other leaves.

    Attributes:
      entries: in order, the list of leaves of each subtree that has the structure and shapes of the
        params, and each other leaf.
      paths: path of each entry in the state.
      outer: pytree structure whose leaves are the entries.
      inner: structure of the params.
    """

    entries: list[Any]
    paths: list[tuple[Any, ...]]
    outer: Any
    inner: Any

    def groups(self, is_large: Callable[[Any], bool]) -> list[list[int]]:
        """Indices of leaves to update together: all without a large entry, then each other leaf."""
        lists = [e for e in self.entries if isinstance(e, list)]
        large = [k for k in range(self.inner.num_leaves) if any(is_large(e[k]) for e in lists)]
        small = [k for k in range(self.inner.num_leaves) if k not in large]
        return ([small] if small else []) + [[k] for k in large]

    def of(self, group: list[int]) -> list[Any]:
        """State entries of a transformation whose params are the list of this group's leaves."""
        return [[e[k] for k in group] if isinstance(e, list) else e for e in self.entries]

    def joined(self, groups: list[list[int]], entries: Sequence[list[Any]]) -> Any:
        """The state from the entries of all groups; entries of no leaf come from the first."""
        state = list(entries[0])
        for position, e in enumerate(self.entries):
            if isinstance(e, list):
                leaves = in_order(groups, [one[position] for one in entries])
                state[position] = self.inner.unflatten(leaves)
        return self.outer.unflatten(state)


def in_order(groups: list[list[int]], values: Sequence[Sequence[Any]]) -> list[Any]:
    """Values of the leaves of each group, in the order of leaves.

    >>> in_order([[0, 2], [1]], ["ac", "b"])
    ['a', 'b', 'c']
    """
    by_leaf = {
        leaf: value
        for group, of_group in zip(groups, values, strict=True)
        for leaf, value in zip(group, of_group, strict=True)
    }
    return [by_leaf[leaf] for leaf in sorted(by_leaf)]


def take_apart(state: Any, params: Any) -> Parts:
    """Splits a state at the subtrees that have the structure and shapes of `params`."""
    leaves: list[Any]
    inner: Any
    leaves, inner = jax.tree.flatten(params)
    shapes = [_shape(leaf) for leaf in leaves]

    def like_params(x: Any) -> bool:
        parts: list[Any]
        structure: Any
        parts, structure = jax.tree.flatten(x, is_leaf=is_blocks)
        return bool(shapes) and structure == inner and [_shape(leaf) for leaf in parts] == shapes

    flat, outer = jax.tree.flatten_with_path(
        state, is_leaf=lambda x: is_blocks(x) or like_params(x)
    )
    entries = [jax.tree.leaves(x, is_leaf=is_blocks) if like_params(x) else x for _, x in flat]
    return Parts(entries, [path for path, _ in flat], outer, inner)


def _shape(x: Any) -> tuple[int, ...] | None:
    shape = getattr(x, "shape", None)
    return None if shape is None else tuple(shape)


def agree(whole: Callable[..., Any], by_leaf: Callable[..., Any], *args: Any) -> bool:
    """Whether two functions apply the same operations to the same arguments.

    Both are traced, and their results compared as expressions of the arguments; equal expressions
    have equal values. May be `False` for equal functions, but never `True` for different ones.
    `args` may be `jax.ShapeDtypeStruct`s.

    >>> import jax.numpy as jnp
    >>> tree = [jnp.ones(2), jnp.ones(3)]
    >>> agree(lambda t: [2 * x for x in t], lambda t: [t[0] * 1 * 2, 2 * t[1]], tree)
    False
    >>> agree(lambda t: [2 * x for x in t], lambda t: [2 * t[0], 2 * t[1]], tree)
    True
    """
    try:
        traced = [jax.make_jaxpr(f, return_shape=True)(*args) for f in (whole, by_leaf)]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        # e.g. a mask or a label for each leaf: the transformation rejects a part of the tree
        return False
    (one, out), (other, other_out) = traced
    structure: Any = jax.tree.structure(out)
    if structure != jax.tree.structure(other_out):
        return False
    known = Expressions()
    arguments = [known.argument(n) for n in range(len(one.jaxpr.invars))]
    return known.results(one.jaxpr, one.consts, arguments) == known.results(
        other.jaxpr, other.consts, arguments
    )
