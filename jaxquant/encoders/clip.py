"""Clip search: shrinks the range of each group by the factor with the least output error."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.encoders.base import Encoder, Info, measure
from jaxquant.encoders.checks import check_count, check_number
from jaxquant.encoders.fixed import stored_scales
from jaxquant.encoders.grids import searched, total_scale
from jaxquant.encoders.layers import mapped
from jaxquant.encoders.matrix import from_matrix, to_matrix
from jaxquant.encoders.moments import Moments, aligned, check_moments, energy, grouped_axes
from jaxquant.observers import Inputs, InputStats, inputs
from jaxquant.qtensor import (
    PerChannel,
    PerGroup,
    PerTensor,
    QSpec,
    QTensor,
    dequantize,
    encode_given,
)
from jaxquant.report import Called


@dataclasses.dataclass(frozen=True, repr=False)
class Clip(Called, Encoder):
    """The encoder that `clip` makes.

    Attributes:
      steps: number of candidate factors, 1 included.
      least: exclusive lower bound of the factors.
    """

    name = "clip"

    steps: int = 10
    least: float = 0.5

    def __post_init__(self) -> None:
        check_count("clip: steps", self.steps)
        check_number("clip: least", self.least, 0.0, 1.0, above=True)

    @property
    def observer(self) -> Inputs:
        """Second moments of the inputs."""
        return inputs()

    def __call__(
        self,
        w: Array,
        spec: QSpec,
        *,
        key: Array | None = None,
        storage_last_axes: tuple[int, ...] = (),
        batch_axes: int = 0,
        stats: InputStats | None = None,
    ) -> tuple[QTensor, Info]:
        """Encodes `w`; see `Encoder`. `key` is ignored.

        Details, float32 `[*batch]`: `factor`, the mean of the chosen factors; `output_error`,
        `tr(D^T H D) / tr(W^T H W)`.

        Raises:
          ValueError: statistics are missing, lack `X^T X`, or do not fit the shape of the weight;
            weights or statistics are not finite (unchecked under a trace); groups do not run over
            the contracted axes, or channels are not all the other axes.
        """
        del key
        w = jnp.asarray(w)
        stats = check_moments("clip", w, spec, storage_last_axes, batch_axes, stats)
        assert stats.hessian is not None
        moments = Moments(stats.axes, stats.batched)
        _check(spec, w.ndim - batch_axes, moments)
        return _encode(w, stats.hessian, self, spec, storage_last_axes, batch_axes, moments)


def clip(steps: int = 10, least: float = 0.5) -> Clip:
    """Rounds to nearest on ranges shrunk by the factor with the least output error.

    For each group `g` of inputs and each output channel, the factor `p` in
    `1 - i (1 - least) / steps`, `i = 0 .. steps - 1`, minimises `d^T H_gg d`, `d = w - Q_p(w)`:
    the squared error of the group's term of the output. `H_gg` is the group's diagonal block of
    `H = X^T X / n`. Per channel, all inputs are one group; per tensor, channels are summed.

    Args:
      steps: number of candidate factors.
      least: exclusive lower bound of the factors; 10 steps and 0.5 give AWQ's `1 - i / 20`.

    Raises:
      ValueError: an argument out of its range.

    Source: Lin et al., "AWQ" (arXiv 2306.00978), the weight clipping of its implementation.

    >>> import jax, jaxquant as jq
    >>> from jaxquant.observers import input_stats, inputs
    >>> x, w = jax.random.normal(jax.random.key(0), (2, 64, 32))
    >>> w, spec = w[:32, :8], jq.QSpec("int3", jq.PerGroup(16, 0))
    >>> stats = input_stats(inputs().update(inputs().init(x), x))
    >>> q, info = clip()(w, spec, stats=stats)
    >>> bool(
    ...     jnp.square(x @ (jq.dequantize(q) - w)).sum()
    ...     < jnp.square(x @ (jq.dequantize(jq.quantize(w, spec)) - w)).sum()
    ... )
    True
    """
    return Clip(steps, least)


def _check(spec: QSpec, ndim: int, moments: Moments) -> None:
    gran, grouped = spec.granularity, grouped_axes(spec, ndim)
    if isinstance(gran, PerTensor):
        return
    if grouped is not None and sorted(grouped) == sorted(moments.axes):
        return
    if isinstance(gran, PerChannel) and gran.size == 1:
        named = (gran.axes,) if isinstance(gran.axes, int) else gran.axes or ()
        others = {a for a in range(-ndim, 0) if a not in moments.axes}
        if {a % ndim - ndim for a in named} == others:
            return
    raise ValueError(
        "clip: expected PerTensor(), PerChannel over all other axes (of size 1), or PerGroup over "
        f"the contracted axes {moments.axes}; got {gran!r}"
    )


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _encode(
    w: Array,
    hessian: Array,
    encoder: Clip,
    spec: QSpec,
    storage_last_axes: tuple[int, ...],
    batch_axes: int,
    moments: Moments,
) -> tuple[QTensor, Info]:
    batch = w.shape[:batch_axes]
    one = functools.partial(
        _core, encoder=encoder, spec=spec, storage_last_axes=storage_last_axes, moments=moments
    )
    flat = w.reshape(-1, *w.shape[batch_axes:]), hessian.reshape(-1, *hessian.shape[batch_axes:])
    q, details = jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), mapped(one, flat))
    return q, measure(w, q)._replace(details=details)


def _core(
    w: Array,
    hessian: Array,
    *,
    encoder: Clip,
    spec: QSpec,
    storage_last_axes: tuple[int, ...],
    moments: Moments,
) -> tuple[QTensor, dict[str, Array]]:
    """Encodes one core array."""
    gran = spec.granularity
    axes, hessian = aligned(moments, grouped_axes(spec, w.ndim), hessian, w.shape)
    m = to_matrix(w.astype(jnp.float32), axes, moments.batched)
    shape, k, n = m.shape, m.shape[-2], m.shape[-1]
    m, hessian = m.reshape(-1, k, n), hessian.reshape(-1, k, k)
    total = total_scale(m, spec)
    m = m if total is None else m / total
    size = min(gran.size, k) if isinstance(gran, PerGroup) else k
    groups = math.ceil(k / size)
    rest = groups * size - k
    x = jnp.pad(m, ((0, 0), (0, rest), (0, 0))).reshape(-1, groups, size, n)
    split = jnp.pad(hessian, ((0, 0), (0, rest), (0, rest)))
    split = split.reshape(-1, groups, size, groups, size)
    blocks = jnp.moveaxis(jnp.diagonal(split, axis1=1, axis2=3), -1, 1)  # [matrices, groups, g, g]
    inner = (0, 1, 2, 3) if isinstance(gran, PerTensor) else (2,)

    def cost(d: Array) -> Array:
        product = jnp.matmul(blocks, d, precision=lax.Precision.HIGHEST)
        return jnp.sum(d * product, axis=inner, keepdims=True)

    local = dataclasses.replace(spec, global_scale=False)
    (scale, zero), chosen = searched(x, inner, local, cost, encoder.steps, encoder.least)

    def stored(a: Array) -> Array:
        expanded = jnp.broadcast_to(a, x.shape).reshape(-1, groups * size, n)[:, :k]
        core = from_matrix(expanded.reshape(shape), w.shape, axes, moments.batched)
        return stored_scales(core, spec, storage_last_axes)

    q = encode_given(
        w,
        stored(scale).astype(spec.scale_dtype),
        None if zero is None else stored(zero),
        total,
        spec,
        storage_last_axes=storage_last_axes,
    )
    error = to_matrix(
        w.astype(jnp.float32) - dequantize(q, jnp.float32), axes, moments.batched
    ).reshape(-1, k, n)
    weight = to_matrix(w.astype(jnp.float32), axes, moments.batched).reshape(-1, k, n)
    signal = energy(hessian, weight)
    return q, {
        "factor": jnp.mean(chosen),
        "output_error": energy(hessian, error) / jnp.where(signal > 0, signal, 1.0),
    }
