"""Int8 with one scale per output channel, rounded as in LLM.int8()."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxquant.encoders.base import Encoder, Info, measure
from jaxquant.encoders.checks import checked_weight
from jaxquant.observers.inputs import Inputs, InputStats, inputs
from jaxquant.qtensor import Calibration, Outliers, QSpec, QTensor, encode_products
from jaxquant.report import Called


@dataclasses.dataclass(frozen=True, repr=False)
class Vectorwise(Called, Encoder):
    """The encoder that `vectorwise` makes.

    Attributes:
      outliers: if `calibrated`, statistics fix the outlier columns; `None`: no outliers.
    """

    name = "vectorwise"

    outliers: Outliers | None = None

    @property
    def observer(self) -> Inputs | None:
        """The absmax of each input column, for calibrated outliers only."""
        fixed = self.outliers is not None and self.outliers.calibrated
        return inputs(hessian=False) if fixed else None

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

        Raises:
          ValueError: the spec is not symmetric int8 with `range="qmax"`; the outliers are
            calibrated and there are no statistics; `w` is not a float array, or not finite
            (unchecked under a trace).
        """
        del key
        w = checked_weight("vectorwise", w, spec, storage_last_axes, batch_axes)
        fmt = spec.format
        eight = fmt.is_integer and fmt.signed and fmt.bits == 8
        if not eight or not spec.symmetric or spec.range != "qmax":
            raise ValueError(
                f"vectorwise: expected a symmetric int8 spec with range='qmax', got {spec!r}"
            )
        q, info = _encode(w, spec, storage_last_axes, batch_axes)
        if self.observer is None or self.outliers is None:
            return q, info
        if not isinstance(stats, InputStats):
            raise ValueError(
                "vectorwise: calibrated outlier columns need statistics of the inputs: pass "
                "stats=, or batches= to jaxquant.ptq"
            )
        if stats.batched:  # experts: their columns are found at run time
            return q, info
        index = outlier_columns(stats.absmax, self.outliers)
        fixed = Calibration(outliers=index, over=stats.axes)
        return dataclasses.replace(q, calibration=fixed), info


def outlier_columns(absmax: Array, outliers: Outliers) -> Array:
    """The columns with the largest absmax, int32 `[*batch, capacity]`; -1 below the threshold.

    >>> outlier_columns(jnp.array([1.0, 9.0, 7.0, 2.0]), Outliers(6.0, capacity=3)).tolist()
    [1, 2, -1]
    """
    top, index = jax.lax.top_k(absmax, outliers.columns(absmax.shape[-1]))
    return jnp.where(top >= outliers.threshold, index, -1)


def vectorwise(outliers: Outliers | None = None) -> Vectorwise:
    """Int8 codes as LLM.int8() rounds them: `q = round(w (127 / max |w|))`.

    About one code in 100,000 differs from round-to-nearest's `w / (max |w| / 127)`. With
    `calibrated` outliers, statistics fix the input columns that stay in float; the columns of
    experts are found at run time.

    Source: bitsandbytes, `int8_vectorwise_quant`.

    >>> import jax, jaxquant as jq
    >>> w = jax.random.normal(jax.random.key(0), (64, 8))
    >>> q, info = vectorwise()(w, jq.int8(range="qmax", granularity=jq.PerChannel(1)))
    >>> q.codes.dtype.name, 40 < info.sqnr_db < 46
    ('int8', True)
    """
    return Vectorwise(outliers)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _encode(
    w: Array, spec: QSpec, storage_last_axes: tuple[int, ...], batch_axes: int
) -> tuple[QTensor, Info]:
    def one(row: Array) -> QTensor:
        return encode_products(row, spec, storage_last_axes=storage_last_axes)

    run = one
    for _ in range(batch_axes):
        run = jax.vmap(run)
    q = run(w)
    return q, measure(w, q)
