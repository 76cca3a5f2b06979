"""k-means: a learned codebook for each array or each group of channels."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxquant.encoders.base import Encoder, Info, measure
from jaxquant.encoders.checks import checked_weight
from jaxquant.encoders.clustering import clustered, spread_weights
from jaxquant.encoders.huffman import huffman_bits
from jaxquant.encoders.moments import check_moments
from jaxquant.numerics import pack
from jaxquant.numerics.cluster import sums
from jaxquant.observers import Inputs, InputStats, inputs
from jaxquant.qtensor import QSpec, QTensor, blocked, storage_layout, to_storage, unblocked
from jaxquant.report import Called, Found


@dataclasses.dataclass(frozen=True, repr=False)
class KMeans(Called, Encoder):
    """The encoder that `kmeans` makes.

    Attributes:
      exact: start at the optimum of dynamic programming.
      weighted: whether errors are weighted by the inputs' second moments.
    """

    name = "kmeans"

    exact: bool = False
    weighted: bool = False

    @property
    def observer(self) -> Inputs | None:
        """Second moments of the inputs, if `weighted`."""
        return inputs() if self.weighted else None

    @property
    def without_inputs(self) -> KMeans:
        """The unweighted encoder, for lookup tables, which have no inputs."""
        return dataclasses.replace(self, weighted=False)

    @property
    def learns_values(self) -> bool:
        """Always: encoding determines the codebook."""
        return True

    def notes(self, details: Mapping[str, Array]) -> tuple[str | Found, ...]:
        """Bits per weight after Huffman coding."""
        bits = huffman_bits(np.asarray(details["counts"]))
        return (Found("Huffman-coded", "bits per weight", bits, bits),)

    def __call__(
        self,
        w: Array,
        spec: QSpec,
        *,
        key: Array | None = None,
        storage_last_axes: tuple[int, ...] = (),
        batch_axes: int = 0,
        stats: Any = None,
    ) -> tuple[QTensor, Info]:
        """Encodes `w`; see `Encoder`.

        Args:
          w: float array `[*batch, *core]`, finite.
          spec: a codebook format with the number of values wanted, such as `palette(4)`; its own
            values are ignored. Each block of its granularity has a codebook.
          key: not used.
          storage_last_axes: core axes to store last, contiguous.
          batch_axes: number of leading batch axes; core arrays are encoded one by one.
          stats: with `weighted`, `InputStats` with a Hessian, whose diagonal weights the squared
            errors; or an array of weights that broadcasts to `w` (such as Fisher information).

        Returns:
          The `QTensor`, and `Info` with `details` `counts`, int32 `[*batch, levels]` or
          `[*batch, *groups, levels]`: how often each code occurs, see `huffman_bits`; and
          `iterations`.

        Raises:
          ValueError: `w` is not a float array, or not finite (unchecked under a trace); a format
            without a codebook, or `double` scales; a codebook with more values than its group;
            `weighted` without statistics, or with statistics of another shape, negative or not
            finite.
        """
        w = checked_weight("kmeans", w, spec, storage_last_axes, batch_axes)
        if spec.format.codebook is None or spec.double:
            raise ValueError(
                "kmeans: expected a codebook format with the number of values wanted, such as "
                f"jq.palette(4), and scales that are not quantized; got {spec!r}"
            )
        blank = storage_layout(w.shape[batch_axes:], spec, storage_last_axes, w.dtype.name)
        _check_size(len(spec.format.codebook), blank, w.shape)
        weights = _weights(stats, w, spec, storage_last_axes, batch_axes) if self.weighted else None
        return _encode(w, weights, self.exact, spec, storage_last_axes, batch_axes)


def kmeans(*, exact: bool = False, weighted: bool = False) -> KMeans:
    """k-means: `w_i ~ c[k_i]`, with the values `c` that minimise `sum_i h_i (w_i - c[k_i])^2`.

    Takes a codebook format, such as `palette(4)`, or `palette(4, channels=16)` for one codebook per
    16 output channels. Up to 8,192 values are sorted, more are put in up to 65,536 bins. Lloyd's
    iteration starts at the optimum for 256 to 1,024 coarser bins; its last two steps run on the
    values themselves.

    Args:
      exact: start at the optimum of dynamic programming: exact for up to 8,192 values, and up to
        the width of 8,192 bins for more. It takes longer, and gains with many levels.
      weighted: `h_i` is the second moment of the weight's input, the diagonal of the layer's
        Hessian, or an array passed as `stats`; otherwise 1.

    Sources: Han et al., "Deep Compression", arXiv 1510.00149; Lloyd, "Least squares quantization in
    PCM" (1982).

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> q, info = jq.kmeans()(jnp.array([[0.0, 1.0, 10.0, 11.0]]), jq.palette(1))
    >>> q.codebook.tolist(), jq.dequantize(q).tolist()
    ([0.5, 10.5], [[0.5, 0.5, 10.5, 10.5]])
    >>> info.details["counts"].tolist()
    [2, 2]
    """
    return KMeans(bool(exact), bool(weighted))


def _check_size(levels: int, blank: QTensor, shape: tuple[int, ...]) -> None:
    values = math.prod(min(b, n) for b, n in zip(blank.blocks, blank.storage, strict=True))
    if levels > values:
        owner = "the array" if math.prod(blank.groups) == 1 else "each group"
        raise ValueError(
            f"kmeans: a codebook of {levels} values for {owner} of {values} values (shape "
            f"{list(shape)}, {blank.spec.granularity!r}); use fewer bits or share it among more"
        )


def _weights(
    stats: Any, w: Array, spec: QSpec, storage_last_axes: tuple[int, ...], batch_axes: int
) -> Array:
    """The weights of the squared errors, in the shape of `w`."""
    if stats is None:
        raise ValueError(
            "kmeans(weighted=True) needs statistics of the inputs (stats=, or calibration batches)"
        )
    if not isinstance(stats, InputStats):
        return spread_weights(jnp.asarray(stats), w.shape)
    stats = check_moments("kmeans(weighted=True)", w, spec, storage_last_axes, batch_axes, stats)
    assert stats.hessian is not None
    core = w.shape[batch_axes:]
    axes = (*stats.batched, *stats.axes)
    sizes = [core[a] for a in axes]
    diagonal = jnp.diagonal(stats.hessian, axis1=-2, axis2=-1)
    weights = diagonal.reshape(*w.shape[:batch_axes], *sizes)
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    weights = jnp.transpose(weights, [*range(batch_axes), *(batch_axes + i for i in order)])
    missing = [a + batch_axes for a in range(len(core)) if a - len(core) not in axes]
    return jnp.broadcast_to(lax.expand_dims(weights, missing), w.shape)


def _encode(
    w: Array,
    weights: Array | None,
    exact: bool,
    spec: QSpec,
    storage_last_axes: tuple[int, ...],
    batch_axes: int,
) -> tuple[QTensor, Info]:
    assert spec.format.codebook is not None
    levels, lay = len(spec.format.codebook), (spec, storage_last_axes, batch_axes)
    x, h, real = _rows(w, weights, *lay)
    codebooks, codes, steps = clustered(x, h, exact, levels)
    return _filled(w, codebooks, codes, steps, real, *lay)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _rows(
    w: Array,
    weights: Array | None,
    spec: QSpec,
    storage_last_axes: tuple[int, ...],
    batch_axes: int,
) -> tuple[Array, Array | None, Array | None]:
    """Values and weights of each group, `[batch * groups, n]`, and a mask that is 0 on padding."""
    blank = storage_layout(w.shape[batch_axes:], spec, storage_last_axes, w.dtype.name)
    count, groups = math.prod(w.shape[:batch_axes]), math.prod(blank.groups)
    padded = groups > 1 and blank.padded != blank.storage

    def rows(a: Array) -> Array:
        if groups == 1:  # in any order
            return a.reshape(count, -1)
        stored = jax.vmap(functools.partial(to_storage, blank))(a.reshape(count, *blank.core))
        stored = blocked(blank, stored)
        order = [0, *range(1, stored.ndim, 2), *range(2, stored.ndim, 2)]
        return jnp.transpose(stored, order).reshape(count * groups, -1)

    real = rows(jnp.ones(w.shape, jnp.float32)) if padded else None
    if weights is None:
        return rows(w), real, real  # padding has no weight
    return rows(w), rows(jnp.broadcast_to(weights, w.shape)), real


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _filled(
    w: Array,
    codebooks: Array,
    codes: Array,
    steps: Array,
    real: Array | None,
    spec: QSpec,
    storage_last_axes: tuple[int, ...],
    batch_axes: int,
) -> tuple[QTensor, Info]:
    batch, levels = w.shape[:batch_axes], codebooks.shape[-1]
    blank = storage_layout(w.shape[batch_axes:], spec, storage_last_axes, w.dtype.name)
    count, rank = math.prod(batch), len(blank.axes)
    single = math.prod(blank.groups) == 1
    if real is None:
        counts = jax.vmap(lambda c: jnp.zeros(levels, jnp.int32).at[c].add(1))(codes)
    else:
        counts = jax.vmap(lambda c, r: sums(c, r, levels))(codes, real).astype(jnp.int32)
    if single:
        stored = jax.vmap(functools.partial(to_storage, blank))(codes.reshape(count, *blank.core))
    else:
        split = codes.reshape(count, *blank.groups, *blank.blocks)
        order = [0, *(a for s in range(rank) for a in (1 + s, 1 + rank + s))]
        stored = unblocked(blank, jnp.transpose(split, order))
    stored = pack(stored, spec.format.bits) if spec.format.packed else stored
    groups = () if single else blank.groups
    q = dataclasses.replace(
        blank,
        codes=stored.reshape(*batch, *stored.shape[1:]),
        scale=jnp.ones((*batch, *blank.groups), spec.scale_dtype),
        codebook=codebooks.reshape(*batch, *groups, levels),
        global_scale=jnp.ones(batch, jnp.float32) if spec.global_scale else None,
    )
    details = {
        "counts": counts.reshape(*batch, *groups, levels),
        "iterations": steps.reshape(*batch, *groups),
    }
    return q, measure(w, q)._replace(details=details)
