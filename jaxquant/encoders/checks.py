"""Argument checks that all encoders share."""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxquant.qtensor import QSpec


def checked_weight(
    name: str, w: ArrayLike, spec: QSpec, storage_last_axes: tuple[int, ...], batch_axes: int
) -> Array:
    """The weight as a JAX array, checked against the spec.

    Raises:
      ValueError: `spec` is no `QSpec`; `w` is not a float array, lacks a named axis, or is not
        finite (unchecked under a trace).
    """
    if not isinstance(spec, QSpec):
        raise ValueError(f"{name}: expected a QSpec such as jq.QSpec('int4'), got {spec!r}")
    w = jnp.asarray(w)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"{name}: expected a float array, got {w.dtype.name}{list(w.shape)}")
    if not 0 <= batch_axes <= w.ndim:
        raise ValueError(f"{name}: batch_axes={batch_axes} of an array of rank {w.ndim}")
    spec.resolve(w.shape[batch_axes:], storage_last_axes)
    check_finite(name, "weight", w)
    return w


def check_finite(name: str, what: str, a: Array) -> None:
    """Raises `ValueError` if an array is not finite; unchecked under a trace."""
    finite = _all_finite(a)
    if not isinstance(finite, jax.core.Tracer) and not bool(finite):
        raise ValueError(f"{name}: non-finite values in the {what} {a.dtype.name}{list(a.shape)}")


@jax.jit
def _all_finite(a: Array) -> Array:
    return jnp.isfinite(a).all()


def check_number(
    name: str, value: Any, low: float, high: float = math.inf, *, above: bool = False
) -> None:
    """Raises `ValueError` unless `value` is a finite number in `[low, high]`, or `(low, high]`.

    >>> check_number("gptq: damping", "x", 0.0)
    Traceback (most recent call last):
      ...
    ValueError: gptq: damping: expected a number of 0 or more, got 'x'
    """
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if number and math.isfinite(value) and low <= value <= high and not (above and value == low):
        return
    bounds = f"above {low:g}" if above else f"of {low:g} or more"
    bounds += f" and at most {high:g}" if high < math.inf else ""
    raise ValueError(f"{name}: expected a number {bounds}, got {value!r}")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raises `ValueError` unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of {least} or more, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raises `ValueError` unless `value` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")
