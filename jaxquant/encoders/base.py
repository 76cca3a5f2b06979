"""What an encoder is: a value that turns one float array into a `QTensor` and says how well."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

from jaxquant.observers.inputs import Inputs
from jaxquant.qtensor import Outliers, QSpec, QTensor, dequantize
from jaxquant.report import Found


class Info(NamedTuple):
    """What an encoder did, as arrays.

    `error` and `signal` are in units of the square of the largest magnitude, so that neither
    overflows in float32; only their quotient is meant to be used, see `sqnr_db`.

    Attributes:
      error: `sum (w - dequantize(q))^2`.
      signal: `sum w^2`.
      details: what else the encoder has to say, by name (damping used, iterations, ...).
    """

    error: Array
    signal: Array
    details: Mapping[str, Array] | None = None

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio `10 log10(signal / error)`, `inf` where exact.

        `nan` where a sum is not finite: float32 does not reach from one to the other.
        """
        error, signal = float(self.error), float(self.signal)
        if not (math.isfinite(error) and math.isfinite(signal)):
            return math.nan
        if error == 0.0:
            return math.inf
        return 10.0 * math.log10(signal / error) if signal > 0.0 else -math.inf


@runtime_checkable
class Encoder(Protocol):
    """A hashable value (a frozen dataclass) that quantizes one array.

    Encoders differ in how they choose codes and scales, never in what a `QTensor` means: whatever
    comes out is dequantized and contracted alike. One of your own derives from this class, and
    says only what differs from the properties below.
    """

    name: ClassVar[str] = "encoder"
    """How recipes and reports name it."""

    @property
    def observer(self) -> Inputs | None:
        """The observer of what it has to know of a weight's inputs; `None` if nothing."""
        return None

    @property
    def without_inputs(self) -> Encoder | None:
        """What encodes leaves that meet no inputs in its place; `None` rounds to nearest."""
        return None

    @property
    def learns_values(self) -> bool:
        """Whether the values of the format are only found in encoding."""
        return False

    @property
    def outliers(self) -> Outliers | None:
        """The outlier columns of the inputs that it fixes."""
        return None

    def notes(self, details: Mapping[str, Array]) -> tuple[str | Found, ...]:
        """What a report should say of `Info.details`, which are concrete."""
        del details
        return ()

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
        """Encodes `w`, with the arguments of `jaxquant.quantize`.

        Args:
          w: float array `[*batch, *core]`, finite.
          spec: format, granularity and range rule; axes named, counted within the core.
          key: PRNG key, for encoders that draw.
          storage_last_axes: core axes to store last, contiguous.
          batch_axes: how many leading axes are encoded one by one.
          stats: statistics of the inputs that the array is contracted with, for encoders that
            look at data.
        """
        ...


def measure(w: Array, q: QTensor) -> Info:
    """Squared error of `q` against the array `w` it was made from, both read as float32.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> w = jnp.array([[1.0, -2.0, 127.0]])
    >>> measure(w, jq.quantize(w, jq.QSpec("int8", jq.PerTensor(), range="qmax"))).sqnr_db
    inf
    """
    return _measure(w, q)


@jax.jit
def _measure(w: Array, q: QTensor) -> Info:
    w = w.astype(jnp.float32)
    peak = jnp.max(jnp.abs(w), initial=0.0)
    # A power of two, so that the division is exact: a codebook value that came back unchanged must
    # count as no error.
    unit = jnp.where(peak > 0, jnp.exp2(jnp.floor(jnp.log2(jnp.where(peak > 0, peak, 1.0)))), 1.0)
    scaled = w / unit
    error = scaled - dequantize(q, jnp.float32) / unit
    return Info(error=jnp.sum(error * error), signal=jnp.sum(scaled * scaled))
