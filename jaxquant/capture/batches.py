"""Batches as arguments of a function, and checks that each is like the first."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax

from jaxquant.interpret.calls import is_traced
from jaxquant.interpret.sites import path_str


def arguments(batch: Any) -> tuple[Any, ...]:
    """Returns a batch as positional arguments: a tuple has several, anything else is one."""
    return batch if type(batch) is tuple else (batch,)


def keywords_bound(
    fn: Callable[..., Any], kwargs: Mapping[str, Any] | None, where: str, *, bind: bool = True
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Returns `fn` and the keywords to trace it with; with `bind`, `fn` has them bound instead.

    Raises:
      ValueError: `kwargs` is not a mapping with string keys.
    """
    if kwargs is None:
        return fn, {}
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise ValueError(
            f"{where}: kwargs: expected the function's keyword arguments by name, such as "
            f"{{'train': False}}, got {kwargs!r}"
        )
    return (functools.partial(fn, **kwargs), {}) if bind and kwargs else (fn, dict(kwargs))


@contextlib.contextmanager
def lists_told(args: tuple[Any, ...]) -> Iterator[None]:
    """If an argument is a list, adds to a `ValueError` that a list is a single argument."""
    try:
        yield
    except ValueError as error:
        inner = [x for a in args for x in (a if type(a) is tuple else (a,))]
        if not any(type(x) is list for x in inner):
            raise
        raise ValueError(
            f"{error}. The batch is or contains a list, which is one argument; only a tuple is "
            "several: expected (x, y), not [x, y]"
        ) from error


class Alike:
    """Compares each batch with the first."""

    def __init__(self) -> None:
        self._first: dict[str, Any] | None = None

    def difference(self, args: tuple[Any, ...]) -> str | None:
        """Describes how a batch's arguments differ from the first batch's; `None` if equal."""
        kinds = _kinds(args)
        if self._first is None:
            self._first = kinds
        return None if kinds == self._first else _difference(self._first, kinds)


def require_iterable(batches: Any, where: str) -> None:
    """Raises unless these are batches; an array would be iterated by rows, which is a mistake."""
    if not isinstance(batches, Iterable) or hasattr(batches, "dtype") or isinstance(batches, dict):
        raise ValueError(
            f"{where}: expected an iterable of batches, such as a list of tuples of arguments, "
            f"got {type(batches).__name__}"
        )


def _kinds(args: tuple[Any, ...]) -> dict[str, Any]:
    """The properties that all batches share: structure, shapes, dtypes and static values."""
    # None counts as a leaf, so that it is compared too
    flat, tree = jax.tree.flatten_with_path(args, is_leaf=lambda x: x is None)
    kinds = {f"argument {path_str(path)}": _kind(leaf) for path, leaf in flat}
    return kinds | {"structure": tree}


def _kind(leaf: Any) -> Any:
    if not is_traced(leaf):
        return repr(leaf)
    aval = jax.typeof(leaf)
    return f"{aval.dtype}{list(aval.shape)}"


def _difference(first: dict[str, Any], got: dict[str, Any]) -> str:
    for name in (*first, *got):
        if name == "structure" or first.get(name) == got.get(name):
            continue
        return (
            f"{name}: expected {first.get(name, 'nothing')} as in batch 0, "
            f"got {got.get(name, 'nothing')}"
        )
    return f"expected the structure {first['structure']} as in batch 0, got {got['structure']}"
