"""k-means: a codebook, trained by the summed gradients of the weights that share its values."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar, NoReturn

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.numerics import pack, to_codebook
from jaxquant.numerics.cluster import ordered, sums
from jaxquant.numerics.optimal import clustered_points
from jaxquant.qtensor import (
    PerTensor,
    QSpec,
    QTensor,
    dequantize,
    storage_codes,
    storage_layout,
    to_storage,
)
from jaxquant.ste.base import Estimator, Learned


def kmeans(reassign: bool = False) -> KMeans:
    """k-means: weights are indices into a trained codebook, one for each array.

    `y_i = c[k_i]`, and `dc_k = sum of dy_i over the members k_i = k`.

    Codes are fixed when training starts, each the nearest value of a codebook from Lloyd's
    iteration; the weights then have no gradient. With `reassign`, each call finds the codes nearest
    to the current weights, which have the gradient of `y`, straight through. The spec is
    `PerTensor()` with a codebook format, which sets the number of levels; its values are not used.
    For weights only.

    Args:
      reassign: whether codes follow the weights in training.

    Source: Han et al., "Deep Compression", arXiv 1510.00149, section 3.

    >>> import jax, jax.numpy as jnp
    >>> from jaxquant.numerics import codebook_format
    >>> from jaxquant.qtensor import PerTensor, QSpec
    >>> spec, w = QSpec(codebook_format([-1, 1]), PerTensor()), jnp.array([0.0, 0.5, 10.0])
    >>> made = kmeans().init(w, spec)
    >>> made["codebook"].tolist(), made["codes"].tolist()
    ([0.25, 10.0], [0, 0, 1])
    >>> def total(codebook):
    ...     learned = {**made, "codebook": codebook}
    ...     return kmeans().values(w, learned, kmeans().encode(w, learned, spec)).sum()
    >>> jax.grad(total)(made["codebook"]).tolist()
    [2.0, 1.0]
    """
    return KMeans(bool(reassign))


@dataclasses.dataclass(frozen=True)
class KMeans(Estimator):
    """The estimator that `kmeans` makes.

    Attributes:
      reassign: whether codes follow the weights in training.
    """

    learns: ClassVar[tuple[str, ...]] = ("codebook",)

    reassign: bool = False

    @property
    def constants(self) -> tuple[str, ...]:
        """The codes, uint8 in array order, where they are fixed."""
        return () if self.reassign else ("codes",)

    def init(
        self, w: Array, spec: QSpec, *, storage_last_axes: tuple[int, ...] = (), batch_axes: int = 0
    ) -> dict[str, Array]:
        """Codebooks float32 `[*batch, levels]`, ascending, and the codes where they are fixed.

        Raises:
          ValueError: a spec that is not `PerTensor()` with a codebook, or an empty array.
        """
        del storage_last_axes
        if not w.size:
            raise ValueError(f"kmeans: expected an array with values, got {list(w.shape)}")
        codebook, codes = _clustered(jnp.asarray(w), _levels(spec), batch_axes)
        return {"codebook": codebook} if self.reassign else {"codebook": codebook, "codes": codes}

    def encode(
        self,
        w: Array,
        learned: Learned,
        spec: QSpec,
        *,
        storage_last_axes: tuple[int, ...] = (),
        batch_axes: int = 0,
    ) -> QTensor:
        """See `Estimator.encode`; with `reassign`, the codebook is sorted.

        Raises:
          ValueError: as `init`, or a codebook of another size than the format's.
        """
        levels, codebook = _levels(spec), learned["codebook"]
        if codebook.shape[-1] != levels:
            raise ValueError(
                f"kmeans: {spec.format.name} has {levels} values, the codebook learned "
                f"{codebook.shape[-1]}"
            )
        codes = None if self.reassign else learned["codes"]
        w, codebook = lax.stop_gradient((jnp.asarray(w), codebook))
        return _encode(w, codebook, codes, spec, storage_last_axes, batch_axes)

    def values(self, w: Array, learned: Learned, q: QTensor) -> Array:
        """See `Estimator.values`."""
        return _values(self.reassign, w, learned["codebook"], q)

    def rescaled(self, learned: Learned, old: QSpec, new: QSpec) -> NoReturn:
        """Raises `ValueError`: a codebook's number of bits cannot change."""
        raise ValueError(
            f"kmeans: a codebook of {_levels(old)} values cannot become {new.format.name}; "
            "train it without a schedule of bit widths"
        )


def _levels(spec: QSpec) -> int:
    values = spec.format.codebook
    if values is None or spec.granularity != PerTensor():
        raise ValueError(
            "kmeans takes PerTensor() and a codebook format, which sets the number of values, such "
            f"as jq.palette(4); got {spec!r}"
        )
    return len(values)


def _codebook(x: Array, levels: int) -> Array:
    """The values that `x` `[n]` is best rounded to, float32 `[levels]`, ascending."""
    shift = jnp.mean(x)  # short prefix sums lose fewer digits
    return clustered_points(ordered(x - shift), levels)[0] + shift


@functools.partial(jax.jit, static_argnums=(1, 2))
def _clustered(w: Array, levels: int, batch_axes: int) -> tuple[Array, Array]:
    batch = w.shape[:batch_axes]
    rows = w.astype(jnp.float32).reshape(math.prod(batch), -1)
    codebooks = jax.vmap(lambda row: _codebook(row, levels))(rows)
    codes = jax.vmap(to_codebook)(rows, codebooks)
    return codebooks.reshape(*batch, levels), codes.reshape(w.shape).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _encode(
    w: Array,
    codebook: Array,
    codes: Array | None,
    spec: QSpec,
    storage_last_axes: tuple[int, ...],
    batch_axes: int,
) -> QTensor:
    batch, core = w.shape[:batch_axes], w.shape[batch_axes:]
    blank = storage_layout(core, spec, storage_last_axes, w.dtype.name)
    codebook = codebook.astype(jnp.float32)
    if codes is None:
        codebook = jnp.sort(codebook, axis=-1)
        nearest = to_codebook
        for _ in batch:
            nearest = jax.vmap(nearest)
        codes = nearest(w.astype(jnp.float32), codebook).astype(jnp.uint8)
    lay = functools.partial(to_storage, blank)
    for _ in batch:
        lay = jax.vmap(lay)
    codes = lay(codes)
    return dataclasses.replace(
        blank,
        codes=pack(codes, spec.format.bits) if spec.format.packed else codes,
        scale=jnp.ones((*batch, *blank.groups), spec.scale_dtype),
        codebook=codebook,
        global_scale=jnp.ones(batch, jnp.float32) if spec.global_scale else None,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _values(reassign: bool, w: Array, codebook: Array, q: QTensor) -> Array:
    return dequantize(q).astype(w.dtype)


def _values_fwd(reassign: bool, w: Array, codebook: Array, q: QTensor) -> tuple[Array, Any]:
    return dequantize(q).astype(w.dtype), (codebook, q)


def _values_bwd(reassign: bool, saved: Any, g: Array) -> tuple[Array, Array, None]:
    codebook, q = saved

    def one(codebook: Array, codes: Array, g: Array) -> Array:
        total = sums(codes, to_storage(q, g), codebook.size)
        if not reassign:
            return total
        return jnp.zeros_like(total).at[jnp.argsort(codebook)].set(total)  # undo the sort

    for _ in q.batch:
        one = jax.vmap(one)
    total = one(codebook, storage_codes(q), g).astype(codebook.dtype)
    return g if reassign else jnp.zeros_like(g), total, None


_values.defvjp(_values_fwd, _values_bwd)
