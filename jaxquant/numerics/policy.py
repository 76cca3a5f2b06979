"""Which dtype to compute in where a platform lacks the one that was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

# bfloat16 takes float16's place because it has float32's exponent: nothing that was finite in
# float16 overflows, and its subnormals become normal.
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

    `platform` is a name as `jax.export` and `lax.platform_dependent` use it (`cpu`, `cuda`, `rocm`,
    `tpu`). Returns `(dtype, None)` where the platform computes in `dtype` itself, else
    `(replacement, reason)`, for a report to say. Any dtype and platform is taken.

    Source: Google Cloud, "The bfloat16 numerical format" (TPU documentation).

    >>> dtype, reason = compute_dtype("float16", "tpu")
    >>> dtype.name, reason is None
    ('bfloat16', False)
    >>> compute_dtype("float16", "cuda")
    (dtype('float16'), None)
    """
    wanted = jnp.dtype(dtype)
    instead = _INSTEAD.get((platform, wanted.name))
    if instead is None:
        return wanted, None
    return jnp.dtype(instead[0]), instead[1]
