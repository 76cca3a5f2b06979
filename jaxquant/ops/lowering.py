"""Chooses how a contraction is computed, from the platform and static shapes.

Each function below is one rule. `benchmarks/suite/lowering_table.py` has a row for each choice,
with the measurements. Numbers in docstrings are times relative to float32 on two CPU cores,
medians of one process, with AVX512-VNNI unless they say AVX2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array, lax

from jaxquant.numerics import compute_dtype

# JAX 0.12 compiles a product and its sum to one vectorised loop, 0.10 does not.
FUSES_SUMS = jax.__version_info__ >= (0, 12)

MANY = 1 << 30
"""Stands for a symbolic number of rows."""


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


def by_platform(cpu: Callable[[], Array], default: Callable[[], Array]) -> Array:
    """The value of `cpu()` where the program runs on a CPU, elsewhere of `default()`."""
    return lax.platform_dependent(cpu=cpu, default=default)


def by_compute_dtype(dtype: Any, make: Callable[[Any], Array]) -> Array:
    """`make` of the dtype that the platform computes `dtype` in (on a TPU not float16)."""
    dtypes = {p: compute_dtype(dtype, p)[0] for p in ("cpu", "cuda", "rocm", "tpu")}
    changed = {p: functools.partial(make, d) for p, d in dtypes.items() if d != dtype}
    if not changed:
        return make(dtype)
    return lax.platform_dependent(default=functools.partial(make, dtype), **changed)


def undivided(*arrays: Array) -> bool:
    """Whether none of `arrays` is sharded, so that slicing an axis needs no communication.

    Read from the meshes of the arrays' types and from the context mesh: a manual mesh axis shards
    nothing further, an auto axis may shard any array, and an explicit axis shards what the type
    says. Without a mesh, tracing cannot tell an array on one device from one that the
    `in_shardings` of `jax.jit` will shard: then the process must have one device.
    """
    types = [jax.typeof(a).sharding for a in arrays]
    meshes = [jax.sharding.get_abstract_mesh(), *(t.mesh for t in types)]
    if all(mesh.empty for mesh in meshes):
        return jax.device_count() == 1
    if any(mesh.shape[name] > 1 for mesh in meshes for name in mesh.auto_axes):
        return False
    names = [(t.mesh, name) for t in types for axis in t.spec for name in _names(axis)]
    return all(mesh.shape[name] == 1 for mesh, name in names)


def _names(axis: Any) -> tuple[str, ...]:
    """The mesh axes that an entry of a `PartitionSpec` names."""
    return () if axis is None else axis if isinstance(axis, tuple) else (axis,)


def fits_int32(terms: Any, x_zero: bool, w_zero: bool, spare: int = 0) -> bool:
    """Whether an int32 holds the sum of `terms` products of int8 values less their zero points.

    `spare` is the largest magnitude that is added later. A symbolic number of terms is assumed to
    fit.

    >>> fits_int32(2**17, False, False), fits_int32(2**17 - 1, False, False)
    (False, True)
    """
    largest = (255 if x_zero else 128) * (255 if w_zero else 128)
    return not isinstance(terms, int) or terms * largest + spare < 2**31


def limbs_win(rows: int, group: int | None = None, packed: bool = False) -> bool:
    """Whether a CPU contracts float rows faster as two int8 limbs than with converted codes.

    At 2048 x 2048, limbs / converted: 1 row 0.6 / 1.9 (JAX 0.10), 0.4 / 1.5 (0.12); 64 rows
    0.8 / 1.3, 0.3 / 1.3; 512 rows 1.0 / 0.9, 0.5 / 1.3. In groups of 128 partial sums cost more
    than limbs save, except for 4-bit codes that need no unpacking: 1 row 1.1 / 2.3, 8 rows 2.6 /
    2.3 (0.10), 16 rows 0.6 / 0.9, 32 rows 0.7 / 0.9, 64 rows 1.5 / 1.3 (0.12, AVX2); int8 1 row
    1.6 / 1.3, 1.5 / 1.0. In a loop that unpacks the codes, groups of 64 gain too: 1 row 0.5 / 1.6;
    groups of 32 do not: 1.6 / 1.6.
    """
    if group is None:
        return rows <= 512
    if packed and FUSES_SUMS and rows <= 2:
        return group >= 64
    return packed and rows <= (32 if FUSES_SUMS else 4) and group >= 128


def group_form(rows: int, group: int, packed: bool = False, whole: bool = True) -> str:
    """The form in which a CPU sums int8 products in groups, by its name in `ops/contract.py`.

    At 2048 x 2048, groups of 128, loop / batch / dequantized float: 2 rows 1.0 / 3.2 / 4.0,
    16 rows 0.6 / 1.1 / 1.5, 256 rows 0.6 / - / 0.9 (JAX 0.12), 1.5 / - / 1.1 (0.10). Groups of 64,
    4 bits, loop / dequantized: 1 row 2.6 / 4.8, 32 rows 1.3 / 1.7, 128 rows 1.3 / 1.3 (0.12).
    The loop reads the result once per group, so groups of 32 are slow: 128 rows 3.5 / 1.2 (0.10),
    0.8 / 1.4; with 4-bit codes, which also need unpacking (`packed`), 1 row 5.4 / 2.8.

    A loop slices the codes. If they are sharded along the groups, XLA gathers them, so groups are
    batch dimensions unless the codes are `whole` (see `undivided`).
    """
    if not whole:
        return "batch"
    return "float" if group < 64 and (packed or rows > 64) else "loop"


def fused_wins(rows: int, in_groups: bool, packed: bool) -> bool:
    """Whether a CPU multiplies and sums few rows faster in one loop than by a product.

    A product of one row leaves most lanes idle. 2048 x 2048, loop / product: int8 1 row 0.4 / 0.7,
    4 bits 1 row 0.6 / 1.1, 2 rows 0.9 / 0.45; 4 bits in groups of 128 1 row 0.3 / 1.1, 2 rows
    0.35 / 0.7 (JAX 0.12, AVX2). Each further row costs the loop as much as the first.
    """
    most = 2 if in_groups and packed else 1
    return FUSES_SUMS and rows <= most


def batch_grows(rows: int, group: int) -> bool:
    """Whether the partial sums of all groups take more memory than the dequantized weight.

    They have `rows / group` times as many values as the weight, in float32. A CPU dequantizes
    first in any case: at 1536 x 1536, groups of 64 and 128, batch / dequantized: 1 row
    2.1 / 1.2, 64 rows 1.7 to 2.6 / 1.1, 512 rows 2.0 to 5.4 / 1.2 (JAX 0.12); 1.8 to 6.2 /
    1.0 to 3.0 (0.10).
    """
    return 2 * rows > group


def taps_win(groups: int, inputs: int, taps: int) -> bool:
    """Whether a CPU convolves faster by one shifted product for each window position.

    True for depthwise convolutions, whose integer sums a float32 holds. 28 x 28 x 128,
    window 3 x 3, against XLA's float32 one: int8 1.1 (JAX 0.10), 4.9 (0.12); shifted products
    0.06, 0.04. Convolutions in larger groups are faster in int8: 0.6 to 0.8.
    """
    return groups > 1 and inputs == 1 and taps <= 64
