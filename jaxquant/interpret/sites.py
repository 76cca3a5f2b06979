"""Sites: the contractions and lookups of a traced function, each named by a key."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax


def path_str(path: tuple[Any, ...]) -> str:
    """A tree path as the key that rules and reports use, parts joined by `/`.

    A trailing `value` attribute, as NNX variables have, is left out; a key `"value"` is not.

    >>> import jax
    >>> [path_str(p) for p, _ in jax.tree.leaves_with_path({"a": [1, {"value": 2}]})]
    ['a/0', 'a/1/value']
    """
    parts = []
    for entry in path:
        for field in ("key", "name", "idx"):
            if hasattr(entry, field):
                parts.append(str(getattr(entry, field)))
                break
        else:
            parts.append(str(entry))
    if len(parts) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        parts.pop()
    return "/".join(parts)


@dataclasses.dataclass(frozen=True)
class Site:
    """One contraction, or one lookup of rows, at one call path.

    Attributes:
      key: unique name: the parameter's path or else the scope; `#k` marks the k-th repeat.
      primitive: `dot_general`, `conv_general_dilated`, `ragged_dot_general` or `gather`.
      param: path of the parameter; `None` for a contraction of two activations.
      shape: the parameter's whole shape; `()` without one.
      dtype: name of the parameter's (or the result's) dtype.
      contracted: axes of the parameter that are summed over; for `gather`, those not indexed.
      scanned: axes of the parameter that loops around it slice (layers of a `scan`).
      batched: axes of the parameter that are batch dimensions of the contraction.
      operands: shapes of both operands as the contraction sees them.
      scope: the enclosing name scopes.
      nonneg: for two activations, which of them cannot be negative.
      over: axes of the other operand that are summed over.
    """

    key: str
    primitive: str
    param: str | None
    shape: tuple[int, ...]
    dtype: str
    contracted: tuple[int, ...]
    scanned: tuple[int, ...]
    batched: tuple[int, ...]
    operands: tuple[tuple[int, ...], tuple[int, ...]]
    scope: str
    nonneg: tuple[bool, bool] = (False, False)
    over: tuple[int, ...] = ()

    @property
    def axes(self) -> str:
        """The parameter's axes in words, as reports print them: `sum 0, keep 1`."""
        free = [a for a in range(len(self.shape)) if a not in self.contracted + self.scanned]
        named = (("scan", self.scanned), ("sum", self.contracted), ("keep", free))
        return ", ".join(f"{name} {' '.join(map(str, axes))}" for name, axes in named if axes)


@dataclasses.dataclass(frozen=True)
class Sites(Mapping[str, Site]):
    """All sites of a traced function in execution order, by key.

    Attributes:
      sites: the sites.
      leaves: for every parameter leaf, its path -> (shape, dtype name).
      met: path of a leaf -> name of the first primitive that uses it, other than a site's.

    >>> import jax, jax.numpy as jnp, jaxquant as jq
    >>> sites = jq.trace(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, jnp.ones((4, 3)))
    >>> sites["w"].contracted
    (0,)
    """

    sites: tuple[Site, ...]
    leaves: Mapping[str, tuple[tuple[int, ...], str]]
    met: Mapping[str, str]

    def __getitem__(self, key: str) -> Site:
        for site in self.sites:
            if site.key == key:
                return site
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return (site.key for site in self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def of(self, path: str) -> tuple[Site, ...]:
        """The sites of one parameter, in execution order."""
        return tuple(site for site in self.sites if site.param == path)

    def __str__(self) -> str:
        rows = [("site", "primitive", "operands", "axes")]
        for s in self.sites:
            shapes = " x ".join(str(list(shape)) for shape in s.operands)
            rows.append((s.key, s.primitive, shapes, s.axes))
        width = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(r, width, strict=True)).rstrip() for r in rows
        )
