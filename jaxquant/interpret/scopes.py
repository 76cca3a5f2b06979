"""Name scopes as keys of sites that have no parameter."""

from __future__ import annotations

import functools
from collections.abc import Sequence


def site_scope(parts: Sequence[str], paths: Sequence[str]) -> str:
    """The scope as a path among the parameters' paths.

    Einsum strings and transform wrappers are left out, methods (`Dense.attend`) cut to their
    module, and leading names dropped that no parameter's path has (the root module's class).

    >>> site_scope(
    ...     ["Net", "layers_0", "attn", "bqhd,bkhd->bhqk"], ["params/layers_0/attn/q/kernel"]
    ... )
    'layers_0/attn'
    """
    kept = []
    for part in parts:
        if (
            not part
            or "->" in part
            or "(" in part
            or part in ("checkpoint", "rematted_computation")
        ):
            continue
        kept.append(part.split(".")[0])
    known = _modules(tuple(paths))
    for start in range(len(kept)):
        candidate = "/".join(kept[start:])
        if candidate in known:
            return candidate
    return "/".join(kept)


@functools.lru_cache(maxsize=16)
def _modules(paths: tuple[str, ...]) -> frozenset[str]:
    """All that paths begin with, cut between names: a site is looked up among hundreds of them."""
    parts = (p.removeprefix("params/").split("/") for p in paths)
    return frozenset("/".join(own[:n]) for own in parts for n in range(1, len(own) + 1))
