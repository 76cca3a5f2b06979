"""Half-quadratic quantization (HQQ): zero points for a sparse error, found without data."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.encoders.base import Encoder, Info, measure
from jaxquant.encoders.checks import check_count, check_number, checked_weight
from jaxquant.numerics import pack
from jaxquant.qtensor import (
    QSpec,
    QTensor,
    blocked,
    nest,
    read_back,
    storage_layout,
    store_scale,
    to_storage,
    unblocked,
)
from jaxquant.report import Called


@dataclasses.dataclass(frozen=True, repr=False)
class HQQ(Called, Encoder):
    """The encoder that `hqq` makes.

    Attributes:
      iterations: maximum number of steps.
      p: exponent of the loss `sum |w - w'|^p`; below 1, a few large errors cost less than many
        small ones.
      beta: penalty that ties the auxiliary error to the real one.
      growth: factor on `beta` after each step.
      gain: share of a group's squared error that a zero point between codes has to save.
    """

    name = "hqq"

    iterations: int = 20
    p: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    gain: float = 0.3

    def __post_init__(self) -> None:
        check_count("hqq: iterations", self.iterations, 0)
        for name, high in (("p", 1.0), ("beta", math.inf), ("growth", math.inf)):
            check_number(f"hqq: {name}", getattr(self, name), 0.0, high, above=True)
        check_number("hqq: gain", self.gain, 0.0, 1.0)

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
        """Encodes `w`; see `Encoder`. `key` and `stats` are ignored.

        Details `[*batch]`: `iterations`; `before` and `after`, the mean of `(w - w')^2` with the
        range's zero points rounded to codes, and with the stored zero points.

        Raises:
          ValueError: the spec is symmetric or its format is not an integer format; `w` is not a
            float array, or not finite (unchecked under a trace).
        """
        del key, stats
        w = checked_weight("hqq", w, spec, storage_last_axes, batch_axes)
        if not spec.format.is_integer or spec.symmetric:
            raise ValueError(
                "hqq finds a zero point: expected an asymmetric spec of an integer format such as "
                f"jq.int4(group=64, symmetric=False), got {spec!r}"
            )
        return _encode(w, self, spec, storage_last_axes, batch_axes)


def hqq(
    iterations: int = 20,
    p: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
    gain: float = 0.3,
) -> HQQ:
    """Half-quadratic quantization: needs no data, and takes no longer than a few roundings.

    With the inverse scale `s = (2^b - 1) / (max - min)` fixed, it reduces `sum |W - W'|_p^p` over
    the zero point `z` by steps of

        `Q = clip(round(W s + z))`, `W' = (Q - z) / s`,
        `E = shrink(W - W')`, `shrink(d) = sign(d) max(|d| - |d|^(p - 1) / beta, 0)`,
        `z = mean(Q - (W - E) s)` over each group,

    until the mean error no longer falls; each group keeps the zero point of least squared error.
    Unlike the original, which limits `s` to 2e4, small weights are quantized as large ones are.

    Zero points are floats if the spec has a `zero_dtype`. A zero point between two codes has a
    cost that no error norm shows: 0 and the many weights near 0, which keep large activations out
    of a sum, are no longer exact. A group therefore takes one only if it saves the share `gain` of
    the squared error with the range's zero point rounded to a code; `gain=0.0` takes the smaller
    error. Without `zero_dtype` the range includes 0, and the group takes the best of the range's
    zero point and the HQQ zero point rounded down or up.

    Args:
      iterations: maximum number of steps.
      p: exponent of the norm, above 0 and at most 1.
      beta: penalty of the auxiliary error.
      growth: factor on `beta` after each step.
      gain: share of the squared error that a zero point between codes has to save, from 0 to 1.

    Raises:
      ValueError: an argument out of range.

    Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023);
    mobiusml/hqq, `optimize_weights_proximal`.

    >>> import jax, jaxquant as jq
    >>> w = jax.random.t(jax.random.key(0), 4.0, (256, 32))
    >>> spec = jq.QSpec("uint4", jq.PerGroup(64, 0), symmetric=False, zero_dtype="float32")
    >>> q, info = hqq()(w, spec)
    >>> q.zero_point.dtype.name, bool(info.details["after"] < info.details["before"])
    ('float32', True)
    """
    return HQQ(iterations, p, beta, growth, gain)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _encode(
    w: Array, how: HQQ, spec: QSpec, storage_last_axes: tuple[int, ...], batch_axes: int
) -> tuple[QTensor, Info]:
    def one(w: Array) -> tuple[QTensor, dict[str, Array]]:
        return _encode_core(w, how, spec, storage_last_axes)

    if not batch_axes:
        q, details = one(w)
    else:
        flat = w.reshape(-1, *w.shape[batch_axes:])
        q, details = jax.tree.map(
            lambda a: a.reshape(w.shape[:batch_axes] + a.shape[1:]), lax.map(one, flat)
        )
    return q, measure(w, q)._replace(details=details)


class _Step(NamedTuple):
    zero: Array  # next candidate
    best: Array  # zero point of each group with the least squared error so far
    error: Array  # mean of `|w - w'|` at the last step
    least: Array  # least squared error of each group so far
    beta: Array
    taken: Array
    going: Array


def _encode_core(
    w: Array, how: HQQ, spec: QSpec, storage_last_axes: tuple[int, ...]
) -> tuple[QTensor, dict[str, Array]]:
    fmt = spec.format
    blank = storage_layout(w.shape, spec, storage_last_axes, w.dtype.name)
    x = blocked(blank, to_storage(blank, w.astype(jnp.float32)))
    inner = tuple(range(1, x.ndim, 2))
    real = blocked(blank, to_storage(blank, jnp.ones(w.shape, jnp.float32)))  # not padding
    count = jnp.sum(real, axis=inner, keepdims=True)
    low = jnp.min(jnp.where(real > 0, x, jnp.inf), axis=inner, keepdims=True, initial=jnp.inf)
    high = jnp.max(jnp.where(real > 0, x, -jnp.inf), axis=inner, keepdims=True, initial=-jnp.inf)
    some = jnp.isfinite(low) & jnp.isfinite(high)  # false for groups of an empty array
    low, high = jnp.where(some, low, 0.0), jnp.where(some, high, 0.0)
    if spec.zero_dtype is None:
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    steps = float(fmt.qmax - fmt.qmin)
    # halves, as the span could overflow; a group of equal values is one step from 0: exact
    span = (0.5 * high - 0.5 * low) / (0.5 * steps)
    stored = store_scale(jnp.where(high > low, span, jnp.abs(high)), spec)
    scale = stored.astype(jnp.float32)
    if spec.double:
        empty = jnp.max(jnp.abs(x), axis=inner, keepdims=True, initial=0.0) == 0
        stored, scale = read_back(stored, empty)
    inverse = 1.0 / scale
    zero = jnp.where(high > low, fmt.qmin - low * inverse, jnp.where(high < 0, fmt.qmax, fmt.qmin))
    size = jnp.maximum(jnp.sum(count), 1.0)

    def codes(z: Array) -> Array:
        return jnp.clip(jnp.round(x * inverse + z), fmt.qmin, fmt.qmax)

    def cost(z: Array) -> Array:
        off = (x - (codes(z) - z) * scale) * real
        return jnp.sum(off * off, axis=inner, keepdims=True)

    def step(at: _Step) -> _Step:
        q = codes(at.zero)
        off = x - (q - at.zero) * scale
        error = jnp.sum(jnp.abs(off) * real) / size
        squares = jnp.sum(off * off * real, axis=inner, keepdims=True)
        magnitude = jnp.where(off == 0, 1.0, jnp.abs(off))
        reduced = jnp.abs(off) - jnp.where(off == 0, 0.0, magnitude ** (how.p - 1.0) / at.beta)
        shrunk = jnp.sign(off) * jnp.maximum(reduced, 0.0)
        total = jnp.sum((q - (x - shrunk) * inverse) * real, axis=inner, keepdims=True)
        better = squares < at.least
        return _Step(
            total / jnp.maximum(count, 1.0),
            jnp.where(better, at.zero, at.best),
            error,
            jnp.minimum(squares, at.least),
            at.beta * how.growth,
            at.taken + 1,
            error < at.error,
        )

    def going(at: _Step) -> Array:
        return at.going & (at.taken <= how.iterations)

    far = jnp.float32(jnp.inf)
    least = jnp.full(zero.shape, jnp.inf, jnp.float32)
    beta, yes = jnp.float32(how.beta), jnp.asarray(True)
    start = _Step(zero, zero, far, least, beta, jnp.int32(0), yes)
    end = lax.while_loop(going, step, start)
    exact = jnp.round(start.zero)
    if spec.zero_dtype is None:
        each = [exact, jnp.floor(end.best), jnp.ceil(end.best)]
        candidates = jnp.stack([jnp.clip(z, fmt.qmin, fmt.qmax) for z in each])
        costs = lax.map(cost, candidates)
        least, before = jnp.argmin(costs, axis=0), costs[0]
        zero = jnp.take_along_axis(candidates, least[None], axis=0)[0]
    else:
        free, exact = (z.astype(spec.zero_dtype).astype(jnp.float32) for z in (end.best, exact))
        before = cost(exact)
        zero = jnp.where(cost(free) < (1.0 - how.gain) * before, free, exact)
    details = {
        "iterations": jnp.maximum(end.taken - 1, 0),
        "before": jnp.sum(before) / size,
        "after": jnp.sum(cost(zero)) / size,
    }
    return _filled(blank, codes(zero), stored, zero), details


def _filled(blank: QTensor, codes: Array, scale: Array, zero: Array) -> QTensor:
    """The `QTensor` of codes, scales and zero points in blocked layout."""
    spec = blank.spec
    packed = unblocked(blank, codes).astype(spec.format.storage)
    if spec.format.packed:
        packed = pack(packed, spec.format.bits)
    scale, nested = scale.reshape(blank.groups), None
    if spec.double:
        scale, nested = nest(scale)
    return dataclasses.replace(
        blank,
        codes=packed,
        scale=scale,
        zero_point=zero.reshape(blank.groups).astype(spec.zero_dtype or spec.format.storage),
        nested=nested,
    )
