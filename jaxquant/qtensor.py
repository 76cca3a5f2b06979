"""`QTensor`, the quantized array as a pytree, with `quantize` and `dequantize`."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Sequence
from typing import Any, TypeGuard

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxquant.numerics import Format, decode, encode, pack, packed_bytes, unpack
from jaxquant.spec import PerBlock, PerChannel, PerGroup, PerTensor, QSpec


@dataclasses.dataclass(frozen=True)
class Use:
    """How contractions use a quantized parameter: what the recipe said of the other operand.

    Attributes:
      activations: spec that the other operand is quantized to at run time; `None` keeps it float.
      attention: for the recipe's rules that set `attention` or `skip`, in order, the pattern and
        the spec (`None` to skip), so that contractions without a parameter find theirs.
    """

    activations: QSpec | None = None
    attention: tuple[tuple[Any, QSpec | None], ...] = ()


_DATA = ("codes", "scale", "zero_point", "codebook", "global_scale")
_META = ("spec", "core", "axes", "blocks", "dtype", "use")


@functools.partial(jax.tree_util.register_dataclass, data_fields=_DATA, meta_fields=_META)
@dataclasses.dataclass(frozen=True)
class QTensor:
    """An array stored as codes and scales: `r = S (q - Z)`, or `r = S codebook[q]`.

    A pytree: its arrays are leaves and everything else is static, describing the trailing *core*
    axes only, by negative index. Any number of leading batch axes may stand before them, and
    every leaf carries all of those, so that `jax.tree.map(lambda a: a[0], q)` is the first layer
    of a stacked tensor and `scan`, `vmap`, sharding and checkpoints need to know nothing of it.
    The constructor does not validate, since tree operations pass placeholders; see `validate`.

    Attributes:
      codes: `[*batch, *storage]`; sub-byte formats are packed along the last axis as uint8.
      scale: `[*batch, *groups]`, one per block of `blocks[s]` indices of each storage axis `s`.
      zero_point: like `scale`, in the codes' integer dtype; `None` where `Z = 0`.
      codebook: `[*batch, levels]` of a learned codebook; `None` where the format holds it.
      global_scale: `[*batch]` float32, multiplies `scale`; `None` where there is none.
      spec: the `QSpec` it was encoded with.
      core: sizes of the core axes in the array's own order.
      axes: for each storage axis, the core axes (negative) flattened into it.
      blocks: for each storage axis, how many indices share one scale.
      dtype: name of the dtype that `dequantize` returns.
      use: what contractions do with the other operand.
    """

    codes: Array
    scale: Array
    zero_point: Array | None
    codebook: Array | None
    global_scale: Array | None
    spec: QSpec
    core: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    blocks: tuple[int, ...]
    dtype: str
    use: Use = Use()

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the leading axes that the static data do not describe."""
        return tuple(self.codes.shape[: self.codes.ndim - len(self.axes)])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array this stands for."""
        return self.batch + self.core

    @property
    def ndim(self) -> int:
        """Rank of the array this stands for."""
        return self.codes.ndim - len(self.axes) + len(self.core)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales, zero points and codebooks."""
        return sum(a.size * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over values, scales included."""
        return 8.0 * self.nbytes / self.size if self.size else 0.0

    @property
    def storage(self) -> tuple[int, ...]:
        """Sizes of the storage axes before padding and packing."""
        return tuple(math.prod(self.core[a] for a in merged) for merged in self.axes)

    @property
    def padded(self) -> tuple[int, ...]:
        """Sizes of the storage axes, padded so that blocks are full."""
        return tuple(-(-n // b) * b for n, b in zip(self.storage, self.blocks, strict=True))

    @property
    def groups(self) -> tuple[int, ...]:
        """Number of scales along each storage axis."""
        return tuple(-(-n // b) for n, b in zip(self.storage, self.blocks, strict=True))

    def __repr__(self) -> str:
        codes = f"{jnp.dtype(self.codes.dtype).name}{list(self.codes.shape)}"
        scale = f"{jnp.dtype(self.scale.dtype).name}{list(self.scale.shape)}"
        return (
            f"QTensor({self.spec.format.name}{list(self.shape)} for {self.dtype}, "
            f"codes={codes}, scale={scale})"
        )

    def validate(self) -> QTensor:
        """Returns itself if arrays and static data agree.

        Raises:
          ValueError: what was expected and what came.
        """
        fmt, batch = self.spec.format, self.batch
        last = self.padded[-1:] if self.axes else ()
        if fmt.packed and self.axes:
            last = (packed_bytes(self.padded[-1], fmt.bits),)
        want: dict[str, tuple[tuple[int, ...], Any]] = {
            "codes": (batch + self.padded[:-1] + last, np.uint8 if fmt.packed else fmt.storage),
            "scale": (batch + self.groups, self.spec.scale_dtype),
        }
        if self.zero_point is not None:
            want["zero_point"] = (batch + self.groups, fmt.storage)
        if self.global_scale is not None:
            want["global_scale"] = (batch, np.float32)
        for name, (shape, dtype) in want.items():
            got = getattr(self, name)
            if tuple(got.shape) != shape or jnp.dtype(got.dtype) != jnp.dtype(dtype):
                raise ValueError(
                    f"QTensor.{name}: expected {jnp.dtype(dtype).name}{list(shape)}, "
                    f"got {jnp.dtype(got.dtype).name}{list(got.shape)}"
                )
        return self


# `jax.export` keeps the structure of arguments in the artifact. Static data are written as JSON:
# reading an artifact must run no code, as unpickling would.
_STATIC = {c.__name__: c for c in (Format, PerTensor, PerChannel, PerGroup, PerBlock, QSpec, Use)}


def _to_json(x: Any) -> Any:
    if isinstance(x, tuple):
        return [_to_json(item) for item in x]
    if isinstance(x, re.Pattern):
        return {"regex": x.pattern, "flags": x.flags}
    if type(x) in _STATIC.values():
        fields = {f.name: _to_json(getattr(x, f.name)) for f in dataclasses.fields(x)}
        return {"type": type(x).__name__, **fields}
    return x


def _from_json(x: Any) -> Any:
    if isinstance(x, list):
        return tuple(_from_json(item) for item in x)
    if isinstance(x, dict):
        if "regex" in x:
            return re.compile(x["regex"], x["flags"])
        fields = {name: _from_json(value) for name, value in x.items() if name != "type"}
        return _STATIC[x["type"]](**fields)
    return x


jax.export.register_pytree_node_serialization(
    QTensor,
    serialized_name="jaxquant.QTensor",
    serialize_auxdata=lambda aux: json.dumps(_to_json(aux)).encode(),
    deserialize_auxdata=lambda data: _from_json(json.loads(data)),
)


def is_qtensor(x: Any) -> TypeGuard[QTensor]:
    """Whether `x` is a `QTensor`; for the `is_leaf` argument of tree functions."""
    return isinstance(x, QTensor)


def quantize(
    w: Array,
    spec: QSpec,
    *,
    key: Array | None = None,
    minor: tuple[int, ...] = (),
    batch_axes: int = 0,
) -> QTensor:
    """Quantizes an array by `spec`.

    `q = clip(round(w / S) + Z)` for integers; the nearest value of the format for the others.

    Args:
      w: float array `[*batch, *core]`.
      spec: format, granularity and range rule; axes must be named in it (see `QSpec.at`).
      key: PRNG key for stochastic rounding, unbiased between the two neighbours; `None` rounds
        to nearest, ties to even.
      minor: axes to store last, contiguous: those that will be contracted. Values are the same.
      batch_axes: how many leading axes are batch axes, encoded one by one; axes in `spec` and
        `minor` then count within the rest.

    Raises:
      ValueError: `w` is not a float array, holds non-finite values, or lacks an axis of `spec`.

    >>> import jax, jaxquant as jq
    >>> w = jax.random.normal(jax.random.key(0), (256, 8))
    >>> q = jq.quantize(w, jq.QSpec("int4", granularity=jq.PerGroup(128, axis=0)))
    >>> q.codes.shape, q.scale.shape, q.bits_per_weight
    ((8, 128), (8, 2), 4.25)
    >>> bool(abs(jq.dequantize(q) - w).max() <= 0.5 * q.scale.max() * 1.001)
    True
    """
    w = jnp.asarray(w)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"quantize: expected a float array, got {w.dtype.name}{list(w.shape)}")
    if not 0 <= batch_axes <= w.ndim:
        raise ValueError(f"quantize: batch_axes={batch_axes} of an array of rank {w.ndim}")
    spec.resolve(w.shape[batch_axes:], minor)  # raises here, outside any trace
    finite = _all_finite(w)  # traced where `w` is, or where a trace is under way
    if not isinstance(finite, jax.core.Tracer) and not bool(finite):
        raise ValueError(f"quantize: non-finite values in {w.dtype.name}{list(w.shape)}")
    return _quantize(w, key, spec, minor, batch_axes)


@jax.jit
def _all_finite(w: Array) -> Array:
    return jnp.isfinite(w).all()


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _quantize(
    w: Array, key: Array | None, spec: QSpec, minor: tuple[int, ...], batch_axes: int
) -> QTensor:
    if not batch_axes:
        return _encode(w, key, spec, minor)
    rows = w.reshape(-1, *w.shape[batch_axes:])
    keys = None if key is None else jax.random.split(key, rows.shape[0])
    stacked = jax.vmap(lambda row, k: _encode(row, k, spec, minor))(rows, keys)
    return jax.tree.map(lambda a: a.reshape(w.shape[:batch_axes] + a.shape[1:]), stacked)


def encode_array(w: Array, spec: QSpec) -> QTensor:
    """`quantize` without its checks: for activations, which may be non-finite."""
    return _encode(w, None, spec, ())


def _encode(w: Array, key: Array | None, spec: QSpec, minor: tuple[int, ...]) -> QTensor:
    fmt, placed = spec.format, spec.resolve(w.shape, minor)
    blank = QTensor(
        codes=w,
        scale=w,
        zero_point=None,
        codebook=None,
        global_scale=None,
        spec=_negative_axes(spec, w.ndim),
        core=w.shape,
        axes=placed.axes,
        blocks=placed.blocks,
        dtype=w.dtype.name,
    )
    x = blocked(blank, to_storage(blank, w.astype(jnp.float32)))
    scale, zero, global_scale = scales_over(x, tuple(range(1, x.ndim, 2)), spec)
    effective = scale.astype(jnp.float32)
    if global_scale is not None:
        effective = effective * global_scale
    codes = scaled_codes(x, effective, zero, fmt, key=key).reshape(blank.padded)
    if fmt.packed:
        codes = pack(codes, fmt.bits)
    return dataclasses.replace(
        blank,
        codes=codes,
        scale=scale.reshape(blank.groups),
        zero_point=None if zero is None else zero.reshape(blank.groups).astype(fmt.storage),
        global_scale=global_scale,
    )


def _negative_axes(spec: QSpec, ndim: int) -> QSpec:
    """The spec with axes counted from the end, as static data of a `QTensor` must be."""

    def neg(axes: int | Sequence[int] | None) -> tuple[int, ...]:
        axes = (axes,) if isinstance(axes, int) else tuple(axes or ())
        return tuple(a % ndim - ndim for a in axes)

    gran = spec.granularity
    if isinstance(gran, PerChannel):
        gran = PerChannel(neg(gran.axes))
    elif isinstance(gran, PerGroup):
        gran = PerGroup(gran.size, neg(gran.axis))
    elif isinstance(gran, PerBlock) and gran.axes is not None:
        rows, cols = neg(gran.axes)
        gran = PerBlock(gran.rows, gran.cols, (rows, cols))
    return QSpec(
        spec.format, gran, spec.symmetric, spec.range, spec.scale_dtype, spec.global_scale
    )


def scaled_codes(
    x: Array, scale: Array, zero: Array | None, fmt: Format, *, key: Array | None = None
) -> Array:
    """Codes of `x / scale + zero`, rounded and clipped to the format."""
    v = x / scale
    if fmt.is_integer:
        # amax / (amax / (qmax + 1/2)) may fall one ulp short of the tie that rounds out to qmin
        v = jnp.where(v < -fmt.qmax, v * (1 + 2**-21), v)
        if zero is not None:
            v = v + zero
    return encode(v, fmt, key=key)


def scales_over(
    x: Array, inner: tuple[int, ...], spec: QSpec
) -> tuple[Array, Array | None, Array | None]:
    """Scale, zero point and global scale of float32 `x`, shared over the axes `inner` (kept)."""
    fmt = spec.format
    if not spec.symmetric or spec.range == "signed":
        high = jnp.max(x, axis=inner, keepdims=True, initial=0.0)
        low = jnp.min(x, axis=inner, keepdims=True, initial=0.0)
    # one reduction where one is enough: activations are quantized at every call
    amax = jnp.max(jnp.abs(x), axis=inner, keepdims=True, initial=0.0)
    if not spec.symmetric:
        steps = fmt.qmax - fmt.qmin
        # halves first: max - min may overflow where each alone does not
        scale = store_scale(high / steps - low / steps, spec)
        zero = fmt.qmin - jnp.round(low / scale.astype(jnp.float32))
        return scale, jnp.clip(zero, fmt.qmin, fmt.qmax), None
    if not fmt.is_integer:
        largest = max(abs(fmt.min), fmt.max)
        if spec.global_scale:
            top = float(jnp.finfo(spec.scale_dtype).max)
            total = jnp.max(amax, initial=0.0) / np.float32(largest * top)
            total = jnp.where(total > 0, jnp.maximum(total, _tiny("float32")), 1.0)
            return store_scale(amax / largest / total, spec), None, total
        return store_scale(amax / largest, spec), None, None
    if spec.range == "signed" and fmt.signed:
        extreme = jnp.where(high > -low, high, low)
        return store_scale(extreme / fmt.qmin, spec), None, None
    return store_scale(amax / (fmt.qmax + (0.5 if spec.range == "half" else 0.0)), spec), None, None


def _tiny(dtype: str) -> float:
    return float(jnp.finfo(dtype).tiny)


def store_scale(scale: Array, spec: QSpec) -> Array:
    """Casts scales to their stored dtype, such that none is zero, subnormal or infinite.

    A zero range gives scale 1, a subnormal one the smallest normal. Power-of-two scales are
    rounded up, so that no value of a block is cut off: `2^ceil(log2(amax / max))`. OCP
    Microscaling Formats v1.0, section 6.3, rounds down and clips instead, which on normal data
    costs 0.2 dB (mxfp4) to 1.2 dB (mxfp8). Rounding up follows Mishra et al., "Recipes for
    Pre-training LLMs with MXFP8" (2025).
    """
    info = jnp.finfo(spec.scale_dtype)
    if spec.scale_dtype == "float8_e8m0fnu":
        mantissa, exponent = jnp.frexp(scale)  # scale = mantissa * 2^exponent, mantissa >= 1/2
        exponent = jnp.where(mantissa > 0.5, exponent, exponent - 1)
        power = jnp.exp2(jnp.clip(exponent, -126, 126).astype(jnp.float32))
        return jnp.where(scale == 0, 1.0, power).astype(spec.scale_dtype)
    # (qmax + 1) * S must stay finite
    top = min(float(info.max), float(jnp.finfo(jnp.float32).max) / 2.0**16)
    size = jnp.clip(jnp.abs(scale), float(info.tiny), top)
    signed = jnp.where(scale < 0, -size, size)
    return jnp.where(scale == 0, 1.0, signed).astype(spec.scale_dtype)


def to_storage(q: QTensor, w: Array) -> Array:
    """Lays a core array out as `q` stores it: axes permuted, merged, padded with zeros."""
    order = [a % w.ndim for merged in q.axes for a in merged]
    w = jnp.transpose(w, order) if order != list(range(w.ndim)) else w
    w = w.reshape(q.storage)
    return pad_to(w, q.padded)


def pad_to(w: Array, shape: tuple[int, ...]) -> Array:
    """Pads with zeros at the end of each axis up to `shape`."""
    if w.shape == shape:
        return w
    return jnp.pad(w, [(0, n - m) for n, m in zip(shape, w.shape, strict=True)])


def blocked(q: QTensor, x: Array) -> Array:
    """`[*batch, p0, p1, ...] -> [*batch, g0, b0, g1, b1, ...]`, `g b = p`."""
    lead = x.shape[: x.ndim - len(q.axes)]
    pairs = (n for pair in zip(q.groups, q.blocks, strict=True) for n in pair)
    return x.reshape(*lead, *pairs)


def spread(q: QTensor, s: Array) -> Array:
    """`[*batch, g0, g1, ...] -> [*batch, g0, 1, g1, 1, ...]`, to meet `blocked` codes."""
    lead = s.shape[: s.ndim - len(q.axes)]
    return s.reshape(*lead, *(n for g in q.groups for n in (g, 1)))


def storage_codes(q: QTensor) -> Array:
    """Unpacked codes `[*batch, *padded storage]`, in the format's storage dtype."""
    fmt = q.spec.format
    if not fmt.packed:
        return q.codes
    return unpack(q.codes, fmt.bits, q.padded[-1], fmt.signed and fmt.is_integer)


def storage_scale(q: QTensor) -> Array:
    """Scales `[*batch, *groups]` in float32, the global scale multiplied in."""
    scale = q.scale.astype(jnp.float32)
    if q.global_scale is None:
        return scale
    lead = q.global_scale.shape
    return scale * q.global_scale.reshape(lead + (1,) * (scale.ndim - len(lead)))


def storage_values(q: QTensor) -> Array:
    """`q - Z` or `codebook[q]` in float32, unscaled, `[*batch, *padded storage]`."""
    codes = storage_codes(q)
    if q.codebook is not None:
        flat = codes.reshape(*q.batch, -1).astype(jnp.int32)
        return jnp.take_along_axis(q.codebook, flat, axis=-1).reshape(codes.shape)
    values = decode(codes, q.spec.format, jnp.float32)
    if q.zero_point is None:
        return values
    zero = spread(q, q.zero_point.astype(jnp.float32))
    return (blocked(q, values) - zero).reshape(codes.shape)


def from_storage(q: QTensor, x: Array) -> Array:
    """Inverse of `to_storage`, batch axes allowed: unpads, splits, permutes."""
    nb = x.ndim - len(q.axes)
    for axis, (have, want) in enumerate(zip(q.padded, q.storage, strict=True)):
        if have != want:
            x = jax.lax.slice_in_dim(x, 0, want, axis=nb + axis)
    order = [a for merged in q.axes for a in merged]
    x = x.reshape(*x.shape[:nb], *(q.core[a] for a in order))
    rank = len(q.core)
    place = [nb + order.index(a - rank) for a in range(rank)]
    perm = list(range(nb)) + place
    return jnp.transpose(x, perm) if perm != list(range(x.ndim)) else x


def dequantize(q: QTensor, dtype: Any = None) -> Array:
    """The float array that `q` stands for: `S (q - Z)` or `S codebook[q]`.

    Computed in float32 and cast to `dtype`, by default the dtype `q` was made from; float16
    saturates at its largest finite value instead of overflowing.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> q = jq.quantize(jnp.array([[-1.0, 0.0, 1.0]]), jq.QSpec("int2", jq.PerTensor(), range="qmax"))
    >>> jq.dequantize(q)
    Array([[-1.,  0.,  1.]], dtype=float32)
    """
    dtype = jnp.dtype(q.dtype if dtype is None else dtype)
    scaled = blocked(q, storage_values(q)) * spread(q, storage_scale(q))
    values = from_storage(q, scaled.reshape(*q.batch, *q.padded))
    if dtype == jnp.float16:
        top = float(jnp.finfo(dtype).max)
        values = jnp.clip(values, -top, top)
    return values.astype(dtype)


def with_use(q: QTensor, use: Use) -> QTensor:
    """`q` with other instructions for the contractions that meet it."""
    return dataclasses.replace(q, use=use)
