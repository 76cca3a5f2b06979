"""What a rewrite is: a value that chooses factors of input channels, for a rule to name."""

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
      online: whether `c` stays on the activation where nothing before it can absorb `1 / c`;
        `False` leaves such weights as they are.
    """

    name: ClassVar[str] = "rewrite"
    """How recipes and reports name it."""

    @property
    def online(self) -> bool:
        """See above."""
        ...

    @property
    def observer(self) -> Inputs:
        """The observer of the statistics that it needs."""
        ...

    def __call__(
        self, weights: Sequence[Array], specs: Sequence[QSpec], stats: InputStats
    ) -> tuple[Array, Details]:
        """The factors for weights that one activation feeds.

        Args:
          weights: float arrays `[*batch, K, N_i]`, read as float32.
          specs: for each weight the spec that it will be encoded with, of its last two axes.
          stats: of the activation; arrays `[*batch, ...]`.

        Returns:
          `c`, float32 `[*batch, K]`, positive and finite; and what was found, arrays `[*batch]` by
          name.

        Raises:
          ValueError: shapes that do not fit, or statistics that are missing, empty or not finite.
        """
        ...
