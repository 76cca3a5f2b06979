"""Replacement dtypes for computation on platforms that lack the requested one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

# bfloat16 replaces float16 because it has float32's exponent: no finite float16 value overflows,
# and subnormals become normal.
_INSTEAD: Mapping[tuple[str, str], tuple[str, str]] = MappingProxyType(
    {
        ("tpu", "float16"): (
            "bfloat16",
            "the matrix units of a TPU have no float16; bfloat16 has the exponent of float32",
        ),
    }
)


def compute_dtype(dtype: DTypeLike, platform: str) -> tuple[np.dtype, str | None]:
    """The dtype that contractions of `dtype` are computed in on `platform`, and why if it differs.

    `platform` is a name as in `jax.export` and `lax.platform_dependent` (`cpu`, `cuda`, `rocm`,
    `tpu`). Returns `(dtype, None)` where the platform computes in `dtype`, else
    `(replacement, reason)`, the reason for a report. Accepts any dtype and platform.

    Source: Google Cloud, "The bfloat16 numerical format" (TPU documentation).

    >>> dtype, reason = compute_dtype("float16", "tpu")
    >>> dtype.name, reason is None
    ('bfloat16', False)
    >>> compute_dtype("float16", "cuda")
    (dtype('float16'), None)
    """
    requested = jnp.dtype(dtype)
    replacement = _INSTEAD.get((platform, requested.name))
    if replacement is None:
        return requested, None
    return jnp.dtype(replacement[0]), replacement[1]
