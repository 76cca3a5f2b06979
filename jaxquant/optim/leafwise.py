"""Optimizer state seen leaf by leaf, and whether a transformation may be run so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxquant.interpret.expressions import Expressions
from jaxquant.optim.blocks import is_blocks


@dataclasses.dataclass(frozen=True)
class Parts:
    """A state taken apart: subtrees that look like the params, and everything else.

    Attributes:
      entries: in order, the leaves of a subtree that has the structure and shapes of the params,
        as a list, or any other leaf as it is.
      paths: where each entry lies in the state.
      outer: the structure that the entries are leaves of.
      inner: structure of the params.
    """

    entries: list[Any]
    paths: list[tuple[Any, ...]]
    outer: Any
    inner: Any

    def groups(self, held: Callable[[Any], bool]) -> list[list[int]]:
        """Numbers of leaves to update together: all that hold nothing, then each other alone."""
        lists = [e for e in self.entries if isinstance(e, list)]
        large = [k for k in range(self.inner.num_leaves) if any(held(e[k]) for e in lists)]
        small = [k for k in range(self.inner.num_leaves) if k not in large]
        return ([small] if small else []) + [[k] for k in large]

    def of(self, group: list[int]) -> list[Any]:
        """The entries of a group: of a transformation whose params are the list of these leaves."""
        return [[e[k] for k in group] if isinstance(e, list) else e for e in self.entries]

    def joined(self, groups: list[list[int]], entries: Sequence[list[Any]]) -> Any:
        """The whole state from the entries of all groups; what belongs to no leaf, from one."""
        whole = list(entries[0])
        for position, e in enumerate(self.entries):
            if isinstance(e, list):
                leaves = in_order(groups, [one[position] for one in entries])
                whole[position] = self.inner.unflatten(leaves)
        return self.outer.unflatten(whole)


def in_order(groups: list[list[int]], values: Sequence[Sequence[Any]]) -> list[Any]:
    """Values of the leaves of each group, in the order of leaves.

    >>> in_order([[0, 2], [1]], ["ac", "b"])
    ['a', 'b', 'c']
    """
    found = {
        leaf: value
        for group, own in zip(groups, values, strict=True)
        for leaf, value in zip(group, own, strict=True)
    }
    return [found[leaf] for leaf in sorted(found)]


def take_apart(state: Any, params: Any) -> Parts:
    """Finds the subtrees of `state` that have the structure and the shapes of `params`."""
    leaves: list[Any]
    inner: Any
    leaves, inner = jax.tree.flatten(params)
    shapes = [_shape(leaf) for leaf in leaves]

    def like_params(x: Any) -> bool:
        found: list[Any]
        structure: Any
        found, structure = jax.tree.flatten(x, is_leaf=is_blocks)
        return bool(shapes) and structure == inner and [_shape(leaf) for leaf in found] == shapes

    flat, outer = jax.tree.flatten_with_path(
        state, is_leaf=lambda x: is_blocks(x) or like_params(x)
    )
    entries = [jax.tree.leaves(x, is_leaf=is_blocks) if like_params(x) else x for _, x in flat]
    return Parts(entries, [path for path, _ in flat], outer, inner)


def _shape(x: Any) -> tuple[int, ...] | None:
    shape = getattr(x, "shape", None)
    return None if shape is None else tuple(shape)


def agree(whole: Callable[..., Any], by_leaf: Callable[..., Any], *args: Any) -> bool:
    """Whether two functions compute the same from the same arguments, operation by operation.

    Both are traced, and each result is written as an expression of the arguments; equal
    expressions have equal values. Says no where that cannot be seen, never a wrong yes.
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
        # a mask or a label for each leaf, say: the transformation does not take some leaves alone
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
