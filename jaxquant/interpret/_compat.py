"""The one file that knows how jaxprs differ between JAX versions (0.10 to 0.12)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import source_info_util
from jax.extend import core

Literal = core.Literal


def opened(jaxpr: Any) -> tuple[Any, list[Any]]:
    """`(jaxpr, consts)` of a closed jaxpr (0.10), an open one, or the merged kind (0.12)."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def body(eqn: Any) -> tuple[Any, list[Any]]:
    """`(jaxpr, consts)` of a call's body, which is its parameter `jaxpr` or `call_jaxpr`."""
    return opened(eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"])


def inner_jaxprs(eqn: Any) -> list[Any]:
    """The jaxprs among an equation's parameters, opened."""
    jaxprs = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                jaxprs.append(opened(item)[0])
    return jaxprs


def scan_split(params: dict[str, Any]) -> tuple[int, int]:
    """Number of constants and of carries of a `scan`."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(list(consts)), len(list(carry))


def bind(eqn: Any, values: list[Any]) -> list[Any]:
    """Binds an equation to values; returns a list even of a single result."""
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


@contextlib.contextmanager
def context(eqn: Any) -> Iterator[None]:
    """Enters the equation's context: mesh, compute type, name stack and source line."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with (
        source_info_util.user_context(eqn.source_info.traceback, name_stack=stack),
        eqn.ctx.manager,
    ):
        yield


def name_parts(eqn: Any) -> tuple[str, ...]:
    """The equation's name scopes, outermost first, without transform wrappers."""
    parts = []
    for entry in eqn.source_info.name_stack.stack:
        name = getattr(entry, "name", "")
        if type(entry).__name__ == "Scope" and name:
            parts += str(name).split("/")
    return tuple(parts)


def jit_options(params: dict[str, Any]) -> dict[str, Any]:
    """The options of an inner `jit` to pass on when it is emitted again."""
    options: dict[str, Any] = {"inline": params["inline"]} if "inline" in params else {}
    compiler = dict(params.get("compiler_options_kvs", ()))
    return options | ({"compiler_options": compiler} if compiler else {})


def given_sharding(sharding: Any) -> Any | None:
    """A sharding of an inner `jit`'s argument or result; `None` if unspecified."""
    return sharding if isinstance(sharding, jax.sharding.Sharding) else None


def explicit_sharding(array: Any) -> Any | None:
    """The array's sharding where its mesh has explicit axes, else `None`."""
    try:
        sharding = jax.typeof(array).sharding
    except (AttributeError, TypeError):
        return None
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or not mesh.explicit_axes:
        return None
    return sharding
