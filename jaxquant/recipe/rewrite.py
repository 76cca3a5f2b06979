"""The protocol of rewrites, which choose factors for input channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

from jax import Array

from jaxquant.observers.inputs import Inputs, InputStats
from jaxquant.qtensor import QSpec

Details = dict[str, Array]


@runtime_checkable
class Rewrite(Protocol):
    """A hashable value (a frozen dataclass) that chooses the factors `c` of input channels.

    Attributes:
      online: whether the activation is scaled at run time where no operation before it can absorb
        `1 / c`; `False` leaves such weights unchanged.
    """

    name: ClassVar[str] = "rewrite"
    """Name in recipes and reports."""

    @property
    def online(self) -> bool:
        """See above."""
        ...

    @property
    def observer(self) -> Inputs:
        """The observer of the statistics it needs."""
        ...

    def __call__(
        self, weights: Sequence[Array], specs: Sequence[QSpec], stats: InputStats
    ) -> tuple[Array, Details]:
        """The factors for all weights contracted with one activation.

        Args:
          weights: float arrays `[*batch, K, N_i]`, read as float32.
          specs: the spec each weight will be encoded with, for its last two axes.
          stats: statistics of the activation; arrays `[*batch, ...]`.

        Returns:
          `c`, float32 `[*batch, K]`, positive and finite; and details for the report, arrays
          `[*batch]` by name.

        Raises:
          ValueError: shapes do not match, or statistics are missing, empty or not finite.
        """
        ...
