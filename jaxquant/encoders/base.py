"""The encoder protocol: turns one float array into a `QTensor` and measures its error."""

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
    """The error measures of an encoded array.

    `error` and `signal` are in units of the square of a power of two near `max |w|`, so that
    neither overflows in float32; only their quotient has a meaning, see `sqnr_db`.

    Attributes:
      error: `sum (w - dequantize(q))^2`.
      signal: `sum w^2`.
      details: further results of the encoder by name (damping used, iterations, ...).
    """

    error: Array
    signal: Array
    details: Mapping[str, Array] | None = None

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio `10 log10(signal / error)`, `inf` where exact.

        `nan` if a sum is not finite in float32.
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

    Encoders differ only in how they choose codes and scales: all results are dequantized and
    contracted in the same way. A custom encoder derives from this class and overrides only the
    properties that differ.
    """

    name: ClassVar[str] = "encoder"
    """The name in recipes and reports."""

    @property
    def observer(self) -> Inputs | None:
        """The observer of the weight's inputs; `None` if no statistics are needed."""
        return None

    @property
    def without_inputs(self) -> Encoder | None:
        """The encoder for leaves without inputs (lookup tables); `None`: round to nearest."""
        return None

    @property
    def learns_values(self) -> bool:
        """Whether encoding determines the values of the format (a codebook)."""
        return False

    @property
    def outliers(self) -> Outliers | None:
        """The rule by which the encoder fixes outlier columns of the inputs, if it does."""
        return None

    def notes(self, details: Mapping[str, Array]) -> tuple[str | Found, ...]:
        """Remarks for the report, from concrete `Info.details`."""
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
          key: PRNG key, for encoders that draw random numbers.
          storage_last_axes: core axes to store last, contiguous.
          batch_axes: number of leading batch axes; core arrays are encoded one by one.
          stats: statistics of the inputs that `w` is contracted with, for encoders that use data.
        """
        ...


def measure(w: Array, q: QTensor) -> Info:
    """Squared error of `q` against its source array `w`, both in float32.

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
    # Division by a power of two is exact: an unchanged codebook value must have zero error.
    unit = jnp.where(peak > 0, jnp.exp2(jnp.floor(jnp.log2(jnp.where(peak > 0, peak, 1.0)))), 1.0)
    scaled = w / unit
    error = scaled - dequantize(q, jnp.float32) / unit
    return Info(error=jnp.sum(error * error), signal=jnp.sum(scaled * scaled))
