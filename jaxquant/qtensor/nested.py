"""Scales that are quantized themselves (double quantization)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.numerics.nested_map import decode_nested, encode_nested
from jaxquant.qtensor.scales import over

if TYPE_CHECKING:
    from jaxquant.qtensor.tensor import QTensor

BLOCK = 256


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("scale", "offset"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Nested:
    """Scale and offset of quantized scales: `S = offset + scale[block] map[code]`.

    Attributes:
      scale: float32 `[*batch, ceil(groups / 256)]`, one for each run of 256 scales of a core array,
        flattened in storage order.
      offset: float32 `[*batch]`, the mean of the scales.
    """

    scale: Array
    offset: Array


def nest(scale: Array, offset: Array | None = None) -> tuple[Array, Nested]:
    """Quantizes the scales of one core array to 8 bits, less their mean, in blocks of 256.

    `code = nearest(map, (S - offset) / max_block |S - offset|)` with the signed dynamic map.

    Args:
      scale: float32 `[*groups]`.
      offset: `[]`, subtracted from the scales; `None` takes their mean.

    Returns:
      `(codes, nested)`, codes uint8 `[*groups]`.

    Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023), section 3.

    >>> codes, nested = nest(jnp.array([1.0, 2.0, 3.0]))
    >>> codes.tolist(), nested.scale.tolist(), nested.offset.tolist()
    ([0, 131, 255], [1.0], 2.0)
    """
    flat = scale.astype(jnp.float32).reshape(-1)
    count = flat.shape[0]
    if offset is None:
        offset = _sum(flat) / max(count, 1)
    blocks = -(-count // BLOCK)
    rest = jnp.pad(flat - offset, (0, blocks * BLOCK - count)).reshape(blocks, BLOCK)
    # scales of non-finite values are non-finite: the maximum must propagate them
    amax = jnp.max(jnp.where(jnp.isnan(rest), jnp.inf, jnp.abs(rest)), axis=1, initial=0.0)
    amax = jnp.where(jnp.isfinite(amax), amax, jnp.nan)
    some = amax[:, None] != 0
    codes = encode_nested(over(rest, jnp.where(some, amax[:, None], 1.0)))
    codes = jnp.where(some, codes, jnp.uint8(0))
    return codes.reshape(-1)[:count].reshape(scale.shape), Nested(amax, offset)


def _sum(x: Array) -> Array:
    """The sum of float32 values, within an ulp: compensated by the error of each addition."""

    def add(a: Any, b: Any) -> Any:
        total = a[0] + b[0]
        other = total - a[0]
        lost = (a[0] - (total - other)) + (b[0] - other)
        return total, a[1] + b[1] + lost

    start = jnp.float32(0), jnp.float32(0)
    total, lost = lax.reduce((x, jnp.zeros_like(x)), start, add, (0,))
    return total + lost


def unnested(codes: Array, nested: Nested) -> Array:
    """Decodes quantized scales, float32 `[*batch, *groups]`.

    >>> unnested(*nest(jnp.array([1.0, 2.0, 3.0]))).round(1).tolist()
    [1.0, 2.0, 3.0]
    """
    lead = nested.offset.shape
    count = math.prod(codes.shape[len(lead) :])
    flat = decode_nested(codes.reshape(*lead, count))
    length = nested.scale.shape[-1] * BLOCK
    each = jnp.repeat(nested.scale, BLOCK, axis=-1, total_repeat_length=length)[..., :count]
    return (flat * each + nested.offset[..., None]).reshape(codes.shape)


def read_back(scale: Array, empty: Array) -> tuple[Array, Array]:
    """Scales as input for `nest`, 0 where a block is empty, and as decoded from its codes.

    Scales of blocks of zeros are arbitrary, and would shift the mean; they come back unchanged.

    Args:
      scale: float32 `[*groups]`.
      empty: bool like `scale`.

    >>> plain, back = read_back(jnp.array([1.0, 0.5, 0.5]), jnp.array([True, False, False]))
    >>> plain.tolist(), back.round(2).tolist()
    ([0.0, 0.5, 0.5], [1.0, 0.5, 0.5])
    """
    plain = jnp.where(empty, 0.0, scale)
    back = unnested(*nest(plain))
    return plain, jnp.where((back > 0) & ~empty, back, scale)


def with_plain_scales(q: QTensor) -> QTensor:
    """`q` with scales in float32, if they are quantized; it dequantizes to the same values.

    Needed before values, and with them scales, change position.

    >>> import jax, jaxquant as jq
    >>> w = jax.random.normal(jax.random.key(0), (256, 8))
    >>> q = jq.quantize(w, jq.QSpec("nf4", jq.PerGroup(64, axis=0), double=True))
    >>> q.scale.dtype.name, with_plain_scales(q).scale.dtype.name
    ('uint8', 'float32')
    """
    if q.nested is None:
        return q
    spec = dataclasses.replace(q.spec, double=False)
    return dataclasses.replace(q, scale=unnested(q.scale, q.nested), nested=None, spec=spec)
