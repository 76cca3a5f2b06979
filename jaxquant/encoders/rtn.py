"""Round to nearest: each value takes the nearest code, independently of the others."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax import Array

from jaxquant.encoders.base import Encoder, Info
from jaxquant.qtensor import QSpec, QTensor, check_quantizable, encode_measured
from jaxquant.report import Called


@dataclasses.dataclass(frozen=True, repr=False)
class RoundToNearest(Called, Encoder):
    """The encoder that `rtn` makes: `q = round(w / S) + Z`, scales from the range alone.

    Attributes:
      stochastic: round to one of the two neighbours at random, without bias; needs a `key`.
    """

    name = "rtn"

    stochastic: bool = False

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
        """Encodes `w`; see `Encoder`. `stats` are ignored.

        Does not check for non-finite values, which `quantize_params` refuses: a core array that
        has one becomes NaN, and so do the sums in `Info`.

        Raises:
          ValueError: `stochastic` without a `key`.
        """
        del stats
        if self.stochastic and key is None:
            raise ValueError(
                "rtn(stochastic=True) draws random numbers: pass key=jax.random.key(0)"
            )
        w = check_quantizable(w, spec, storage_last_axes, batch_axes)
        key = key if self.stochastic else None
        q, error, signal = encode_measured(
            w, spec, key=key, storage_last_axes=storage_last_axes, batch_axes=batch_axes
        )
        return q, Info(error, signal)


def rtn(stochastic: bool = False) -> RoundToNearest:
    """Round to nearest, the default encoder of a rule.

    With `stochastic=True` a value between two codes takes the upper one with probability equal to
    its distance from the lower, so that the expected value is the value itself.

    >>> import jax, jaxquant as jq
    >>> w = jax.random.normal(jax.random.key(0), (64, 8))
    >>> q, info = jq.encoders.rtn()(w, jq.QSpec("int8", jq.PerChannel(1)))
    >>> q.codes.dtype.name, 40 < info.sqnr_db < 46
    ('int8', True)
    """
    return RoundToNearest(stochastic)
