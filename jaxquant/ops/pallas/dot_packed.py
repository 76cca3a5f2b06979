"""`lax.dot_general` of floats and packed 4-bit codes by an opt-in Pallas kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType
from jax.typing import DTypeLike

from jaxquant.ops import lowering
from jaxquant.ops.backward import straight_through
from jaxquant.ops.dot_codes import Call, evaluated, finish
from jaxquant.ops.dot_general import dot_general
from jaxquant.ops.operands import Placement, arranged, place, result_dtype
from jaxquant.ops.pallas.packed_kernel import PLATFORMS, Blocks, Layout, blocks_for, packed_product
from jaxquant.qtensor import QTensor, storage_scale


def dot_general_packed(
    lhs: Array | QTensor,
    rhs: Array | QTensor,
    dimension_numbers: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    interpret: str | None = None,
) -> Array:
    """`lax.dot_general` of a float array and a 4-bit QTensor, by a Pallas kernel on accelerators.

    `y[m, n] = sum_g s[g, n] sum_{k in g} x[m, k] (v(q[k, n]) - z[g, n])`, `x` `[m, k]`, `q`
    `[k, n]`, groups `g` along `k`, `v` the values of codes, the sum in float32. Packed bytes and
    scales are read block by block, and no dequantized copy of the weight is written.

    The kernel has run in Pallas' interpret mode, and has been compiled for TPUs v4, v5e, v5p and
    v6e and for CUDA compute capabilities 8.0 and 9.0. It has never run on an accelerator, so
    nothing calls it by default: compare it with `dot_general` on yours first. On CUDA it uses
    Pallas' Triton backend, and JAX warns from 0.11 on that this will be removed.

    The kernel takes float32 and bfloat16 activations; 4-bit formats with fixed values; one kept
    and one contracted storage axis, with codes packed along the latter; groups that are multiples
    of a tile (64 codes, if the axis is a multiple of 64) or divide half a tile. On CUDA a group
    must be a multiple of 32, or of 16 if it divides half a tile, and the kept axis a multiple of
    16. All other operands and platforms use `dot_general` with `activations=None`. Values of
    codebook formats are rounded to the dtype of `x`.

    XLA cannot partition a kernel: on several devices call it inside `jax.shard_map`, with
    `check_vma=False`. Arrays sharded over an explicit mesh use `dot_general`. Export the kernel
    for one platform only: JAX lowers it for all platforms of an export, and cannot for a CPU.

    Args:
      lhs: float array or QTensor.
      rhs: float array or QTensor, one of them.
      dimension_numbers: as for `lax.dot_general`.
      precision: for `dot_general`; the kernel multiplies in full precision.
      preferred_element_type: dtype of the result.
      interpret: `"tpu"` or `"cuda"` runs that platform's kernel as ordinary JAX operations, on any
        platform.

    Returns:
      `[batch, free of lhs, free of rhs]`. Its gradient is that of the contraction with
      `dequantize(q)`.

    Raises:
      ValueError: `interpret` is something else, or not exactly one operand is a QTensor.
      TypeError: the QTensor is differentiated.

    >>> import jax, jax.numpy as jnp, jaxquant as jq
    >>> w = jax.random.normal(jax.random.key(0), (256, 32))
    >>> q = jq.quantize(w, jq.QSpec("int4", jq.PerGroup(64, axis=0)))
    >>> x = jnp.ones((3, 256))
    >>> y = dot_general_packed(x, q, (((1,), (0,)), ((), ())), interpret="tpu")
    >>> bool(jnp.allclose(y, x @ jq.dequantize(q), atol=1e-4))
    True
    """
    if interpret is not None and interpret not in PLATFORMS:
        raise ValueError(
            f"dot_general_packed: interpret is one of {PLATFORMS} or None, got {interpret!r}"
        )
    if isinstance(lhs, QTensor) == isinstance(rhs, QTensor):
        raise ValueError(
            "dot_general_packed: one operand is a QTensor, and the other a float array"
        )
    (lc, rc), (lb, rb) = ((tuple(a), tuple(b)) for a, b in dimension_numbers)
    preferred = None if preferred_element_type is None else jnp.dtype(preferred_element_type)
    rest = (precision, preferred, None, None)
    if isinstance(lhs, QTensor):
        q, x, call = lhs, jnp.asarray(rhs), Call(rc, lc, rb, lb, True, *rest)
    else:
        assert isinstance(rhs, QTensor)
        q, x, call = rhs, jnp.asarray(lhs), Call(lc, rc, lb, rb, False, *rest)
    chosen = tuple(_blocks(call, x, q))
    if not chosen or (q.calibration is not None and q.calibration.divisor is not None):
        return dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type, activations=None
        )
    return _dot(call, chosen, interpret, x, q)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _dot(
    call: Call, chosen: tuple[Blocks, ...], interpret: str | None, x: Array, q: QTensor
) -> Array:
    return straight_through(functools.partial(_forward, call, chosen, interpret), call.reference)(
        x, q
    )


def _forward(
    call: Call, chosen: tuple[Blocks, ...], interpret: str | None, x: Array, q: QTensor
) -> Array:
    def by(blocks: Blocks) -> Callable[[], Array]:
        return lambda: _by_kernel(call, x, q, blocks, interpret is not None)

    kernels = {blocks.platform: by(blocks) for blocks in chosen}
    if interpret is not None:
        return kernels[interpret]() if interpret in kernels else evaluated(call, x, q)
    return lax.platform_dependent(default=lambda: evaluated(call, x, q), **kernels)


def _by_kernel(call: Call, x: Array, q: QTensor, blocks: Blocks, interpret: bool) -> Array:
    """Lays `x` out like the codes, runs the kernel, and puts axes in the result's order."""
    at = place(q, call.w_contract, call.w_batch)
    assert at is not None
    keep, last = at.keep[0], at.contract[0]
    operand = arranged(x, call.x_contract, call.x_batch, at, call.w_contract)
    lead = [x.shape[a] for a in range(x.ndim) if a not in call.x_contract]
    shape = (at.padded[keep], max(at.groups[last], 1))

    def full(a: Array) -> Array:
        return jnp.broadcast_to(a.astype(jnp.float32), shape)

    out = packed_product(
        operand.values.reshape(-1, at.padded[last]),
        q.codes,
        full(storage_scale(q)),
        None if q.zero_point is None else full(q.zero_point),
        q.spec.format,
        blocks,
        result_dtype(x.dtype, q.dtype, call.preferred),
        interpret,
    )
    return finish(call, x, q, at, out.reshape(*lead, shape[0]))


def _blocks(call: Call, x: Array, q: QTensor) -> list[Blocks]:
    """The blocks for each platform whose kernel supports the operands."""
    at = place(q, call.w_contract, call.w_batch)
    if at is None or x.dtype not in (jnp.float32, jnp.bfloat16) or not _suits(q, at):
        return []
    rows = lowering.static_size(x.shape, [a for a in range(x.ndim) if a not in call.x_contract])
    if rows == lowering.MANY or rows == 0 or 0 in q.shape or _spread(x):
        return []
    last = at.contract[0]
    layout = Layout.of(at.padded[last], at.block(last))
    if layout is None:
        return []
    args = (rows, at.padded[at.keep[0]], layout, x.dtype.itemsize)
    choices = (blocks_for(platform, *args) for platform in PLATFORMS)
    return [blocks for blocks in choices if blocks is not None]


def _suits(q: QTensor, at: Placement) -> bool:
    """Whether codes have 4 bits, fixed values, one kept axis and one contracted, packed axis."""
    one_each = len(at.contract) == len(at.keep) == 1 and at.contract[0] == len(at.padded) - 1
    if not one_each or at.batch or at.varies or q.spec.format.bits != 4 or q.codebook is not None:
        return False
    return at.groups[at.keep[0]] in (1, at.padded[at.keep[0]])


def _spread(x: Any) -> bool:
    """Whether an explicit mesh may shard the array."""
    mesh = jax.typeof(x).sharding.mesh
    explicit = [n for n, t in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
                if t == AxisType.Explicit and n > 1]  # fmt: skip
    return bool(explicit)
