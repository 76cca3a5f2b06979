"""How a contraction is computed: from the platform and static shapes to a form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax import lax

# Beyond this many products of 2^14 an int32 sum could overflow.
MAX_TERMS = 2**17 - 1

# A size for sums whose number of terms is symbolic or rows that are: "many".
MANY = 1 << 30


def static_size(shape: Sequence[Any], axes: Sequence[int]) -> int:
    """Number of values along `axes`; `MANY` if any size is symbolic.

    >>> static_size((2, 3, 4), (0, 2))
    8
    """
    total = 1
    for a in axes:
        if not isinstance(shape[a], int):
            return MANY
        total *= shape[a]
    return total


def by_platform(cpu: Callable[[], Any], default: Callable[[], Any]) -> Any:
    """The value of `cpu()` where the program runs on a CPU, elsewhere of `default()`."""
    return default() if cpu is default else lax.platform_dependent(cpu=cpu, default=default)


def limbs_win(rows: int) -> bool:
    """Whether a CPU contracts float rows faster as two int8 limbs than with converted codes."""
    return rows <= 64


def loop_over_groups(rows: int) -> bool:
    """Whether a CPU sums groups faster one after the other than as a batch."""
    return rows >= 16
