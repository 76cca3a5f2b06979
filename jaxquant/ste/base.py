"""The protocol of estimators, which encode a trained array and define gradients of rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array

from jaxquant.numerics import decode, encode
from jaxquant.qtensor import QSpec, QTensor

Learned = Mapping[str, Any]

# Below any useful step; its inverse is finite in float32.
SMALLEST = 2.0**-100

_WEIGHTS = "{} trains weights; for activations in {!r} use lsq() or pact()"


class Moments(NamedTuple):
    """Statistics of an activation that initialise its scale; float32 `[*layers]` each.

    Attributes:
      mean_abs: mean of `|x|`.
      mean: mean of `x`.
      std: standard deviation of `x`.
      low: smallest value.
      high: largest value.
    """

    mean_abs: Array
    mean: Array
    std: Array
    low: Array
    high: Array


@runtime_checkable
class Estimator(Protocol):
    """A hashable value (a frozen dataclass) that defines how an array is quantized in training.

    Weights: `q = encode(w, learned, spec)` and `y = values(w, learned, q)`; `y` is `dequantize(q)`
    bit for bit, and differentiable in `w` and `learned`. Activations, rounded with the scale and
    zero point of `grid(learned, spec)`, get their gradients from `pass_activation`. One of your own
    derives from this class; one for weights alone leaves out the last four methods.
    """

    @property
    def learns(self) -> tuple[str, ...]:
        """Names of the arrays that are trained with the weights."""
        ...

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of arrays that `init` makes and that are not trained; none by default."""
        return ()

    def init(
        self, w: Array, spec: QSpec, *, storage_last_axes: tuple[int, ...] = (), batch_axes: int = 0
    ) -> dict[str, Array]:
        """Initial learned parameters of a weight; arguments as for `jaxquant.quantize`.

        Returns:
          float32 `[*batch, *groups]` each, as `QTensor.scale`; without names that `spec` does not
          need.
        """
        ...

    def encode(
        self,
        w: Array,
        learned: Learned,
        spec: QSpec,
        *,
        storage_last_axes: tuple[int, ...] = (),
        batch_axes: int = 0,
    ) -> QTensor:
        """Codes and scales of a weight, constant to `jax.grad`; may be traced."""
        ...

    def values(self, w: Array, learned: Learned, q: QTensor) -> Array:
        """`dequantize(q)` in the dtype of `w`, with gradients to `w` and `learned`."""
        ...

    def init_activation(self, moments: Moments, spec: QSpec) -> dict[str, Array]:
        """Initial learned parameters of an activation: float32 `[*layers]` each.

        Raises:
          ValueError: it is for weights alone.
        """
        raise ValueError(_WEIGHTS.format(self, spec))

    def grid(self, learned: Learned, spec: QSpec) -> tuple[Array, Array | None]:
        """Scale (float32) and zero point (int32, in the format's codes) of an activation."""
        raise ValueError(_WEIGHTS.format(self, spec))

    def pass_activation(
        self,
        x: Array,
        rounded: Array,
        learned: Learned,
        spec: QSpec,
        *,
        count: int | None = None,
    ) -> Array:
        """`rounded`, the rounded `x`, with gradients to `x` and `learned`."""
        raise ValueError(_WEIGHTS.format(self, spec))

    def rescaled(self, learned: Learned, old: QSpec, new: QSpec) -> dict[str, Array]:
        """What is learned, for the same clipping range with another number of bits."""
        raise ValueError(f"{self}: expected {old!r} in all of training, got {new!r} in a schedule")


def positive(a: Any) -> Array:
    """`max(|a|, 2^-100)` in float32: a step that becomes negative in training is reflected.

    >>> positive(jnp.array([0.5, -0.25])).tolist()
    [0.5, 0.25]
    """
    return jnp.maximum(jnp.abs(jnp.asarray(a, jnp.float32)), SMALLEST)


def direction(a: Array) -> Array:
    """The derivative of `positive`, approximated by that of `|a|`: 1, or -1 below zero.

    It does not vanish where `|a| < 2^-100`, or a step could never grow again.
    """
    return jnp.where(a < 0, -1.0, 1.0)


def ends(spec: QSpec) -> tuple[float, float]:
    """The smallest and the largest value of a format, unscaled."""
    return float(spec.format.min), float(spec.format.max)


def largest(spec: QSpec) -> float:
    """The largest magnitude of a format, unscaled."""
    return max(abs(spec.format.min), abs(spec.format.max))


def middle(spec: QSpec) -> int | None:
    """The zero point of an asymmetric spec whose range is not learned: the middle code.

    >>> middle(QSpec("uint4", symmetric=False)), middle(QSpec("int4", symmetric=False))
    (8, 0)
    """
    return None if spec.symmetric else (spec.format.qmin + spec.format.qmax + 1) // 2


def same_range(steps: Array, old: QSpec, new: QSpec) -> Array:
    """Steps of `new` with the range of `steps` of `old`: `s (max - min)_old / (max - min)_new`.

    >>> float(same_range(jnp.float32(1.0), QSpec("int8"), QSpec("int4")))
    17.0
    """
    (low, high), (new_low, new_high) = ends(old), ends(new)
    return steps * jnp.float32((high - low) / (new_high - new_low))


def on_format(v: Array, spec: QSpec) -> Array:
    """The value of the format nearest to `v`, float32; integers are not clipped."""
    if spec.format.is_integer:
        return jnp.round(v)
    return decode(encode(v, spec.format), spec.format)
