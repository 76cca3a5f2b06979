"""GPTQ: rounds the weights of one input after another to compensate for earlier errors."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxquant.encoders.base import Encoder, Info, measure
from jaxquant.encoders.checks import check_count, check_number
from jaxquant.encoders.columns import Grid, energy_in_blocks, round_columns
from jaxquant.encoders.damping import factor
from jaxquant.encoders.fixed import fixed_grid, scales_of_groups
from jaxquant.encoders.grids import grid_over, searched, total_scale
from jaxquant.encoders.layers import mapped
from jaxquant.encoders.layout import Layout, Order, layout, ordered
from jaxquant.encoders.matrix import from_matrix, to_matrix
from jaxquant.encoders.moments import Moments, aligned, check_moments, counting, grouped_axes
from jaxquant.observers import Inputs, InputStats, inputs
from jaxquant.qtensor import PerGroup, QSpec, QTensor, encode_given
from jaxquant.report import Called, Found

# Range search of grid="mse": 24 factors from 1 down in steps of 1/32, all above 0.25.
_LEAST, _STEPS = 0.25, 24


@dataclasses.dataclass(frozen=True, repr=False)
class GPTQ(Called, Encoder):
    """The encoder that `gptq` makes; its fields are that function's arguments."""

    name = "gptq"

    damping: float = 0.01
    block: int = 128
    act_order: bool | Literal["static", "dynamic"] = "dynamic"
    grid: Literal["range", "mse", "hessian"] = "hessian"
    shrinkage: float = 0.0
    dead: Literal["zero", "nearest"] = "nearest"

    def __post_init__(self) -> None:
        check_number("gptq: damping", self.damping, 0.0)
        check_count("gptq: block", self.block)
        check_number("gptq: shrinkage", self.shrinkage, 0.0, 1.0)
        if self.act_order is True:
            object.__setattr__(self, "act_order", "static")
        known: tuple[bool | str, ...]
        for name, known in (
            ("act_order", (False, "static", "dynamic")),
            ("grid", ("range", "mse", "hessian")),
            ("dead", ("zero", "nearest")),
        ):
            value = getattr(self, name)
            if type(value) not in (bool, str) or value not in known:
                raise ValueError(f"gptq: {name} is one of {known}, got {value!r}")

    @property
    def observer(self) -> Inputs:
        """Second moments of the inputs."""
        return inputs()

    def notes(self, details: Mapping[str, Array]) -> tuple[str | Found, ...]:
        """Raised damping, and inputs that were always zero."""
        remarks, damping = [], np.asarray(details["damping"], np.float64)
        if damping.max() > 1.5 * self.damping:
            text = f"the factorisation failed with damping {self.damping:.3g}"
            remarks.append(Found(text, "used", float(damping.min()), float(damping.max())))
        dead = float(np.sum(np.asarray(details["dead"])))
        if dead:
            remarks.append(Found("inputs that were always zero", "count", dead, dead))
        return tuple(remarks)

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

        Details, float32 `[*batch, *batched]`: `damping` used; `dead`, the number of inputs that
        were always 0; `loss`, `sum (w - q)^2 / (2 U_ii^2)` with `H = 2 X^T X / n`; `output_error`,
        `tr(D^T H D) / tr(W^T H W)`.

        Raises:
          ValueError: statistics are missing, lack `X^T X`, or do not fit the shape of the weight;
            weights or statistics are not finite (unchecked under a trace).
        """
        del key
        w = jnp.asarray(w)
        stats = check_moments("gptq", w, spec, storage_last_axes, batch_axes, stats)
        assert stats.hessian is not None
        _warn_of_few(stats)
        moments = Moments(stats.axes, stats.batched)
        return _encode(w, stats.hessian, self, spec, storage_last_axes, batch_axes, moments)


def gptq(
    damping: float = 0.01,
    block: int = 128,
    act_order: bool | Literal["static", "dynamic"] = "dynamic",
    grid: Literal["range", "mse", "hessian"] = "hessian",
    shrinkage: float = 0.0,
    dead: Literal["zero", "nearest"] = "nearest",
) -> GPTQ:
    """Rounds a weight such that the layer's output, not the weight itself, changes least.

    Column by column, `w_j` is rounded to `q_j`, and the columns not yet rounded compensate for it:
    `W_i -= U_ji (w_j - q_j) / U_jj`, `U` the upper Cholesky factor of `H'^-1`, `H' = (1 - s) H +
    s diag(H) + d mean(diag H) I`, `H = X^T X / n`. (`columns` documents the form computed.) Works
    with every format and granularity of a `QTensor`. Groups along the inputs take their scales
    from the updated weights when the group begins; all other scales are fixed in advance.

    Args:
      damping: `d`, raised tenfold until the factorisation succeeds.
      block: columns per block; affects speed, not results.
      act_order: round inputs with large `H_kk` first. `"static"` (or `True`) orders single columns;
        all scales are fixed in advance, and each column keeps the scales of its group. `"dynamic"`
        orders whole groups by their sum, and columns within a group, so that a group's scales are
        chosen when it begins; without groups it is `"static"`. Codes are stored in the original
        order, so inference needs no permutation.
      grid: how a range becomes a scale: `"range"`, the spec's rule; `"mse"`, the rule on the range
        shrunk by the factor in {1, 31/32, ..., 9/32} with the least squared error; `"hessian"`, as
        `"mse"` with errors weighted by `H_kk` (by its mean for inputs that were always 0).
      shrinkage: `s`, shrinks off-diagonal moments towards 0, for few rows or a later data shift.
      dead: weights of inputs that were always 0: rounded to `"nearest"`, or set to `"zero"`.
        Without any row (an expert that was never chosen) all are rounded to nearest.

    Raises:
      ValueError: an argument out of its range.

    Source: Frantar et al., "GPTQ" (arXiv 2210.17323), algorithm 1; `act_order`, static groups and
    `grid="mse"` are options of its reference implementation.

    >>> import jax, jaxquant as jq
    >>> from jaxquant.observers import input_stats, inputs
    >>> kx, kw = jax.random.split(jax.random.key(0))
    >>> x = jax.random.normal(kx, (256, 1)) + 0.5 * jax.random.normal(kw, (256, 32))
    >>> w, spec = jax.random.normal(kw, (32, 8)), jq.QSpec("int4", jq.PerGroup(16, 0))
    >>> stats = input_stats(inputs().update(inputs().init(x), x))
    >>> def output_error(q):
    ...     return float(jnp.square(x @ (jq.dequantize(q) - w)).sum())
    >>> q, info = gptq()(w, spec, stats=stats)
    >>> output_error(q) < 0.5 * output_error(jq.quantize(w, spec))
    True
    """
    return GPTQ(damping, block, act_order, grid, shrinkage, dead)


def _warn_of_few(stats: InputStats) -> None:
    if isinstance(stats.rows, jax.core.Tracer):
        return
    rows, k = np.asarray(stats.rows), stats.absmax.shape[-1]
    few = rows < k
    if few.any():
        some = f", for {int(few.sum())} of {rows.size} matrices" if rows.size > 1 else ""
        warnings.warn(
            f"gptq: {int(rows.min())} calibration rows for {k} columns{some}: with fewer rows than "
            "columns the second moments are singular, and the result overfits these rows",
            stacklevel=3,
        )


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _encode(
    w: Array,
    hessian: Array,
    encoder: GPTQ,
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
    out = mapped(one, flat)
    q, details = jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), out)
    return q, measure(w, q)._replace(details=details)


def _core(
    w: Array,
    hessian: Array,
    *,
    encoder: GPTQ,
    spec: QSpec,
    storage_last_axes: tuple[int, ...],
    moments: Moments,
) -> tuple[QTensor, dict[str, Array]]:
    """One array without batch axes: its matrices one after another."""
    gran, grouped = spec.granularity, grouped_axes(spec, w.ndim)
    axes, hessian = aligned(moments, grouped, hessian, w.shape)
    batched, lead = moments.batched, len(moments.batched)
    m = to_matrix(w.astype(jnp.float32), axes, batched)
    shape, k = m.shape, m.shape[-2]
    m, hessian = m.reshape(-1, *shape[lead:]), hessian.reshape(-1, k, k)
    diagonal = jnp.diagonal(hessian, axis1=1, axis2=2)
    dead = diagonal <= 0
    if encoder.dead == "zero":
        zeroed = dead & ~dead.all(axis=1, keepdims=True)
        m = jnp.where(zeroed[..., None], 0.0, m)

    def core(a: Array) -> Array:
        return from_matrix(a.reshape(*shape), w.shape, axes, batched)

    total = total_scale(m, spec)
    m = m if total is None else m / total
    local = dataclasses.replace(spec, global_scale=False)
    dynamic = gran.size if isinstance(gran, PerGroup) and grouped == axes else None
    order: Order = None if isinstance(encoder.act_order, bool) else encoder.act_order
    if dynamic is None and order is not None:
        order = "static"
    # quantized scales (`double`) are known only after all scales are
    chosen_on_the_way = dynamic is not None and order != "static" and not spec.double
    lay = layout(k, dynamic if chosen_on_the_way else None, encoder.block)
    fixed: Grid | None = None
    scale = zero = ratio = None
    if not chosen_on_the_way:
        weights = None
        if encoder.grid == "hessian":
            weights = core(jnp.broadcast_to(counting(diagonal)[..., None], m.shape))
        steps = None if encoder.grid == "range" else _STEPS
        (scale, zero), each, ratio = fixed_grid(
            core(m), local, storage_last_axes, weights, steps, _LEAST
        )
        fixed = jax.tree.map(lambda a: to_matrix(a, axes, batched).reshape(m.shape), each)

    solve = functools.partial(_matrix, encoder=encoder, spec=local, lay=lay, order=order)
    d, grids, details = mapped(solve, (m, hessian, fixed))
    if chosen_on_the_way:
        scale, zero = (
            None
            if a is None
            else scales_of_groups(a, w.shape, spec, storage_last_axes, axes, batched)
            for a in grids
        )
    assert scale is not None
    scale = scale.astype(spec.scale_dtype)
    rounded = core(m - d)
    for unit in (ratio, total):
        rounded = rounded if unit is None else rounded * unit
    q = encode_given(rounded, scale, zero, total, spec, storage_last_axes=storage_last_axes)
    q = dataclasses.replace(q, dtype=w.dtype.name)
    if total is not None:
        details["loss"] = details["loss"] * total**2
    details = {**details, "dead": dead.sum(axis=1, dtype=jnp.float32)}
    return q, {name: a.reshape(*shape[:lead]) for name, a in details.items()}


def _matrix(
    w: Array,
    hessian: Array,
    fixed: Grid | None,
    *,
    encoder: GPTQ,
    spec: QSpec,
    lay: Layout,
    order: Order,
) -> tuple[Array, Grid | None, dict[str, Array]]:
    """One matrix `[K, N]`: its errors, the grids of its groups `[groups, N]`, and details."""
    k = w.shape[0]
    diagonal = jnp.diagonal(hessian)
    place, group_order = ordered(lay, diagonal, order)

    in_order = order is None and np.array_equal(lay.place, np.arange(k))

    def permuted(a: Array, fill: float = 0.0) -> Array:
        return a if in_order else jnp.take(a, place, axis=0, mode="fill", fill_value=fill)

    h = hessian if in_order else permuted(permuted(hessian).T)
    h_diagonal = jnp.diagonal(h)
    filler = counting(h_diagonal) - h_diagonal
    error_weights = permuted(counting(diagonal))
    n = h.shape[0]
    eye = jax.lax.broadcasted_iota(jnp.int32, (n, n), 0) == jax.lax.broadcasted_iota(
        jnp.int32, (n, n), 1
    )
    damped = jnp.where(eye, h + filler[:, None], (1.0 - encoder.shrinkage) * h)
    m, used = factor(damped, encoder.damping)

    def choose(x: Array, first: Array) -> Grid:
        if encoder.grid == "range":
            return grid_over(x, (0,), spec)
        weights = jnp.ones((x.shape[0], 1))
        if encoder.grid == "hessian":
            weights = jax.lax.dynamic_slice_in_dim(error_weights, first, x.shape[0])[:, None]

        def cost(d: Array) -> Array:
            return jnp.sum(weights * d * d, axis=0, keepdims=True)

        return searched(x, (0,), spec, cost, _STEPS, _LEAST)[0]

    rows = permuted(w)
    grid = None
    if fixed is not None:
        grid = permuted(fixed[0], 1.0), None if fixed[1] is None else permuted(fixed[1])
    d, grids, loss = round_columns(rows, m, spec.format, lay.plan, grid, choose)

    size = lay.plan.levels[0]
    error = energy_in_blocks(h, d, size)
    signal = energy_in_blocks(h, rows, size)
    details = {
        "damping": used,
        "loss": loss,
        "output_error": error / jnp.where(signal > 0, signal, 1.0),
    }
    if not in_order:
        back = jnp.zeros((k,), jnp.int32)
        d = d[back.at[place].set(jnp.arange(n, dtype=jnp.int32), mode="drop")]
    group_grids = None
    if group_order is not None:
        group_grids = jax.tree.map(lambda a: a[jnp.argsort(group_order)][: lay.groups], grids)
    return d, group_grids, details
