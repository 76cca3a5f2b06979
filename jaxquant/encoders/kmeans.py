"""k-means: each array, or each group of channels, is rounded to a few values of its own."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxquant.encoders.base import Info, measure
from jaxquant.encoders.optimal import optimal
from jaxquant.numerics import pack
from jaxquant.numerics.cluster import (
    Points,
    binned,
    inertia,
    nearest,
    ordered,
    refined,
    settled,
    sums,
)
from jaxquant.numerics.starts import STARTS, begin
from jaxquant.observers import Inputs, InputStats, inputs
from jaxquant.qtensor import QTensor, blocked, storage_layout, to_storage, unblocked
from jaxquant.spec import QSpec

_SORTED = 8192  # up to so many values are sorted; more are put in bins
_BINS = 1 << 16
_OPTIMAL_BINS = 8192  # for the exact optimum of more values than that
_AT_ONCE = 1 << 22  # places of all codebooks that are made together


@dataclasses.dataclass(frozen=True)
class KMeans:
    """The encoder that `kmeans` makes.

    Attributes:
      start: names of what to begin with; of several ends the best is kept.
      iterations: most steps from each.
      exact: begin at the optimum of dynamic programming instead.
      weighted: whether errors count by the inputs' second moment.
    """

    start: tuple[str, ...] = ("density",)
    iterations: int = 300
    exact: bool = False
    weighted: bool = False

    @property
    def observer(self) -> Inputs | None:
        """What it has to know of the inputs: second moments, if it is weighted."""
        return inputs() if self.weighted else None

    def __call__(
        self,
        w: Array,
        spec: QSpec,
        *,
        key: Array | None = None,
        minor: tuple[int, ...] = (),
        batch_axes: int = 0,
        stats: Any = None,
    ) -> tuple[QTensor, Info]:
        """Encodes `w`; see `Encoder`.

        Args:
          w: float array `[*batch, *core]`, finite.
          spec: a codebook format of as many values as are wanted, such as `palette(4)`; its own
            values are not used. Each block of its granularity has a codebook.
          key: for `start="kmeans++"`.
          minor: core axes to store last, contiguous.
          batch_axes: how many leading axes are encoded one by one.
          stats: with `weighted`, `InputStats` with a Hessian, whose diagonal counts; or an array of
            what the square of each value's error costs (a Fisher information), that broadcasts to
            `w`.

        Returns:
          The codes, and `Info` with `details` `counts`, int32 `[*batch, levels]` or
          `[*batch, *groups, levels]`: how often each code occurs, see `huffman_bits`; and
          `iterations`.

        Raises:
          ValueError: a format without a codebook; a codebook larger than the values it is for;
            `weighted` without statistics, or statistics of another shape; `"kmeans++"` without a
            key.
        """
        w = jnp.asarray(w)
        if spec.format.codebook is None:
            raise ValueError(
                "kmeans takes a codebook format of as many values as are wanted, such as "
                f"jq.palette(4); got {spec!r}"
            )
        if not 0 <= batch_axes <= w.ndim:
            raise ValueError(f"kmeans: batch_axes={batch_axes} of an array of rank {w.ndim}")
        blank = storage_layout(w.shape[batch_axes:], spec, minor, w.dtype.name)
        _check_size(len(spec.format.codebook), blank, w.shape)
        if "kmeans++" in self.start and not self.exact and key is None:
            raise ValueError("kmeans(start='kmeans++') draws: pass key=jax.random.key(0)")
        weights = _weights(stats, w, batch_axes) if self.weighted else None
        return _encode(w, weights, key, self, spec, minor, batch_axes)


def kmeans(
    start: str | tuple[str, ...] = "density",
    iterations: int = 300,
    exact: bool = False,
    weighted: bool = False,
) -> KMeans:
    """k-means: `w_i ~ c[k_i]`, with the values `c` that minimise `sum_i h_i (w_i - c[k_i])^2`.

    For a codebook format, such as `palette(4)`, or `palette(4, channels=16)` for a codebook for
    each 16 output channels. Values are put in 65,536 bins, or sorted if they are few; Lloyd's
    iteration runs on those, and one last step on the values themselves.

    Args:
      start: where Lloyd's iteration begins: `"linear"`, `"quantile"`, `"density"` (equal shares of
        `density^(1/3)`) or `"kmeans++"`, see `jaxquant.numerics.starts`; of several ends the best
        is kept.
      iterations: most steps; it ends before when nothing moves.
      exact: begin at the optimum, which dynamic programming finds up to the width of 8,192 bins,
        exactly for as many values.
      weighted: `h_i` is the second moment of the input that a weight meets, the diagonal of the
        layer's Hessian, or an array given as `stats`; otherwise 1.

    Raises:
      ValueError: an unknown start, or a number of iterations that is not positive.

    Sources: Han et al., "Deep Compression", arXiv 1510.00149; Lloyd, "Least squares quantization in
    PCM" (1982).

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> q, info = jq.kmeans()(jnp.array([[0.0, 1.0, 10.0, 11.0]]), jq.palette(1))
    >>> q.codebook.tolist(), jq.dequantize(q).tolist()
    ([0.5, 10.5], [[0.5, 0.5, 10.5, 10.5]])
    >>> info.details["counts"].tolist()
    [2, 2]
    """
    return KMeans(_starts(start), _iterations(iterations), bool(exact), bool(weighted))


def kmeans_codebook(
    x: Array,
    levels: int,
    *,
    weights: Array | None = None,
    start: str | tuple[str, ...] = "density",
    iterations: int = 300,
    exact: bool = False,
    key: Array | None = None,
) -> Array:
    """The `levels` values that an array is best rounded to; arguments as of `kmeans`.

    Args:
      x: finite values of any shape, at least `levels`.
      levels: 1 to 256.
      weights: what the square of each value's error costs, of a shape that broadcasts to `x`'s, not
        negative; `None` counts all alike.
      start: where to begin.
      iterations: most steps.
      exact: begin at the optimum.
      key: PRNG key, for `"kmeans++"`.

    Returns:
      float32 `[levels]`, ascending.

    Raises:
      ValueError: fewer values than levels, or what `kmeans` refuses.

    >>> kmeans_codebook(jnp.array([0.0, 1.0, 2.0]), 1, weights=jnp.array([1.0, 0.0, 0.0])).tolist()
    [0.0]
    """
    how = kmeans(start, iterations, exact)
    x = jnp.asarray(x)
    if isinstance(levels, bool) or not isinstance(levels, int) or not 1 <= levels <= 256:
        raise ValueError(f"kmeans: levels: expected 1 to 256, got {levels!r}")
    if levels > x.size:
        raise ValueError(
            f"kmeans: a codebook of {levels} values for {x.size} values of an array of shape "
            f"{list(x.shape)}"
        )
    if "kmeans++" in how.start and not exact and key is None:
        raise ValueError("kmeans(start='kmeans++') draws: pass key=jax.random.key(0)")
    if weights is not None:
        weights = _broadcast(jnp.asarray(weights), x.shape).reshape(1, -1)
    keys = None if key is None else key[None]
    return _codebooks(x.reshape(1, -1), weights, keys, how, levels)[0][0]


def _starts(start: str | tuple[str, ...]) -> tuple[str, ...]:
    names = (start,) if isinstance(start, str) else tuple(start)
    if not names or any(name not in STARTS for name in names):
        raise ValueError(f"kmeans: start: expected one or several of {STARTS}, got {start!r}")
    return names


def _iterations(count: int) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"kmeans: iterations: expected a positive integer, got {count!r}")
    return count


def _check_size(levels: int, blank: QTensor, shape: tuple[int, ...]) -> None:
    held = math.prod(min(b, n) for b, n in zip(blank.blocks, blank.storage, strict=True))
    if levels > held:
        what = "the array" if math.prod(blank.groups) == 1 else "each group"
        raise ValueError(
            f"kmeans: a codebook of {levels} values for {what} of {held} values (shape "
            f"{list(shape)}, {blank.spec.granularity!r}); use fewer bits or share it among more"
        )


def _weights(stats: Any, w: Array, batch_axes: int) -> Array:
    """What each value's squared error costs, of the shape of `w`."""
    if stats is None:
        raise ValueError(
            "kmeans(weighted=True) needs statistics of the inputs (stats=, or calibration batches)"
        )
    if not isinstance(stats, InputStats):
        return _broadcast(jnp.asarray(stats), w.shape)
    if stats.hessian is None:
        raise ValueError("kmeans(weighted=True) needs a Hessian: observe with inputs(hessian=True)")
    core = w.shape[batch_axes:]
    axes = (*stats.batched, *stats.axes)
    sizes = [core[a] for a in axes]
    diagonal = jnp.diagonal(stats.hessian, axis1=-2, axis2=-1)
    experts, k = sizes[: len(stats.batched)], math.prod(core[a] for a in stats.axes)
    want = (*w.shape[:batch_axes], *experts, k)
    if diagonal.shape != want:
        raise ValueError(
            f"kmeans: expected a Hessian with a diagonal of shape {list(want)} for an array of "
            f"shape {list(w.shape)}, got {list(diagonal.shape)}"
        )
    laid = diagonal.reshape(*w.shape[:batch_axes], *sizes)
    order = sorted(range(len(axes)), key=lambda i: axes[i] % len(core))
    laid = jnp.transpose(laid, [*range(batch_axes), *(batch_axes + i for i in order)])
    gone = [a + batch_axes for a in range(len(core)) if a - len(core) not in axes]
    return jnp.broadcast_to(lax.expand_dims(laid, gone), w.shape)


def _broadcast(weights: Array, shape: tuple[int, ...]) -> Array:
    try:
        if np.broadcast_shapes(weights.shape, shape) != shape:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"kmeans: weights of shape {list(weights.shape)} for an array of shape {list(shape)}"
        ) from None
    rank = len(shape) - weights.ndim
    return jnp.broadcast_to(lax.expand_dims(weights, range(rank)), shape)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _encode(
    w: Array,
    weights: Array | None,
    key: Array | None,
    how: KMeans,
    spec: QSpec,
    minor: tuple[int, ...],
    batch_axes: int,
) -> tuple[QTensor, Info]:
    batch, core = w.shape[:batch_axes], w.shape[batch_axes:]
    blank = storage_layout(core, spec, minor, w.dtype.name)
    assert spec.format.codebook is not None
    levels, count, groups = len(spec.format.codebook), math.prod(batch), math.prod(blank.groups)
    x = w.astype(jnp.float32).reshape(count, *core)
    h = None if weights is None else weights.astype(jnp.float32).reshape(count, *core)
    whole = groups == 1
    if not whole and blank.padded != blank.storage:
        h = jnp.ones_like(x) if h is None else h  # padding, which is laid out as zeros, has none

    def rows(a: Array) -> Array:
        """`[count, *core] -> [count * groups, values of a group]`."""
        if whole:
            return a.reshape(count, -1)
        laid = blocked(blank, jax.vmap(functools.partial(to_storage, blank))(a))
        inner = range(2, laid.ndim, 2)
        return jnp.transpose(laid, [0, *range(1, laid.ndim, 2), *inner]).reshape(count * groups, -1)

    def stored(codes: Array) -> Array:
        """Inverse of `rows` up to storage: `[count, *padded storage]`."""
        if whole:
            return jax.vmap(functools.partial(to_storage, blank))(codes.reshape(count, *core))
        split = codes.reshape(count, *blank.groups, *blank.blocks)
        rank = len(blank.axes)
        order = [0, *(a for s in range(rank) for a in (1 + s, 1 + rank + s))]
        return unblocked(blank, jnp.transpose(split, order))

    values, costs = rows(x), None if h is None else rows(h)
    keys = None if key is None else jax.random.split(key, count * groups)
    codebooks, codes, counts, steps = _codebooks(values, costs, keys, how, levels)
    own, unpadded = () if whole else blank.groups, codes
    codes = stored(codes)
    codes = pack(codes, spec.format.bits) if spec.format.packed else codes
    q = dataclasses.replace(
        blank,
        codes=codes.reshape(*batch, *codes.shape[1:]),
        scale=jnp.ones((*batch, *blank.groups), spec.scale_dtype),
        codebook=codebooks.reshape(*batch, *own, levels),
        global_scale=jnp.ones(batch, jnp.float32) if spec.global_scale else None,
    )
    info = measure(w, q)
    if not whole and blank.padded != blank.storage:
        real = rows(jnp.ones_like(x))
        counts = jax.vmap(lambda c, r: sums(c, r, levels))(unpadded, real).astype(jnp.int32)
    details = {
        "counts": counts.reshape(*batch, *own, levels),
        "iterations": steps.reshape(*batch, *own),
    }
    return q, info._replace(details=details)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _codebooks(
    x: Array, weights: Array | None, keys: Array | None, how: KMeans, levels: int
) -> tuple[Array, Array, Array, Array]:
    """Of rows `[rows, n]`: codebooks `[rows, levels]`, codes uint8 `[rows, n]`, counts, steps."""
    rows, size = x.shape
    places = size if size <= _SORTED else _bins(size)
    one = functools.partial(_row, how=how, levels=levels)
    some = max(1, min(rows, _AT_ONCE // max(places, 1)))
    if size > _BINS:
        some = 1  # each fills the processor
    if rows == 1:
        found = one(*jax.tree.map(lambda a: a[0], (x, weights, keys)))
        return jax.tree.map(lambda a: a[None], found)
    given = (x, weights, keys)
    return lax.map(lambda a: one(*a), given, batch_size=None if some == 1 else some)


def _bins(size: int) -> int:
    return min(_BINS, 1 << (4 * size - 1).bit_length())


def _row(
    x: Array, weights: Array | None, key: Array | None, *, how: KMeans, levels: int
) -> tuple[Array, Array, Array, Array]:
    x = x.astype(jnp.float32)
    peak = jnp.max(jnp.abs(x))
    least = jnp.float32(jnp.finfo(jnp.float32).tiny)
    # a power of two, by which division is exact, so that no square overflows or vanishes
    unit = jnp.exp2(jnp.floor(jnp.log2(jnp.maximum(peak, least))))
    y = x / unit
    h = None
    if weights is not None:
        most = jnp.max(weights)
        h = jnp.where(most > 0, weights / jnp.where(most > 0, most, 1.0), 1.0)
    shift = jnp.mean(y)
    near = y - shift  # short prefix sums lose fewer digits

    few = y.shape[0] <= _SORTED
    points = ordered(near, h) if few else binned(near, _bins(y.shape[0]), h)
    if how.exact:
        coarse = points if few else binned(near, _OPTIMAL_BINS, h)
        starts = [optimal(coarse, levels)]
    else:
        starts = [begin(name, points, levels, key) for name in how.start]
    centroids, steps = _best(points, starts, how.iterations)
    centroids = refined(y, centroids + shift, h)
    codes = nearest(y, centroids)
    counts = jnp.zeros(levels, jnp.int32).at[codes].add(1)
    return centroids * unit, codes, counts, steps


def _best(points: Points, starts: list[Array], iterations: int) -> tuple[Array, Array]:
    if len(starts) == 1:
        return settled(points, starts[0], iterations)
    ends, steps = jax.vmap(lambda start: settled(points, start, iterations))(jnp.stack(starts))
    best = jnp.argmin(jax.vmap(lambda end: inertia(points, end))(ends))
    return ends[best], steps[best]
