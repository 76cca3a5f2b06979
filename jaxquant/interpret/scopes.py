"""Name scopes as keys of sites that have no parameter."""

from __future__ import annotations

import functools
from collections.abc import Sequence


def site_scope(parts: Sequence[str], paths: Sequence[str]) -> str:
    """The scope in the form of the parameters' paths.

    Drops einsum strings, transform wrappers and leading names that are in no parameter's path (the
    root module's class), and cuts methods (`Dense.attend`) to their module.

    >>> site_scope(
    ...     ["Net", "layers_0", "attn", "bqhd,bkhd->bhqk"], ["params/layers_0/attn/q/kernel"]
    ... )
    'layers_0/attn'
    """
    names = []
    for part in parts:
        if (
            not part
            or "->" in part
            or "(" in part
            or part in ("checkpoint", "rematted_computation")
        ):
            continue
        names.append(part.split(".")[0])
    known = _modules(tuple(paths))
    for start in range(len(names)):
        candidate = "/".join(names[start:])
        if candidate in known:
            return candidate
    return "/".join(names)


@functools.lru_cache(maxsize=16)
def _modules(paths: tuple[str, ...]) -> frozenset[str]:
    """All prefixes of the paths, in whole names; cached, since each site looks them up."""
    parts = (p.removeprefix("params/").split("/") for p in paths)
    return frozenset("/".join(names[:n]) for names in parts for n in range(1, len(names) + 1))
