"""What a case is made of."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import numpy as np


@dataclasses.dataclass(frozen=True)
class Program:
    """A model, its variables, and the arguments of the call that is timed.

    Attributes:
      model: a Linen module.
      variables: of the module.
      args: arguments after the variables.
      samples: arguments of calls to calibrate on.
      dense: where the model is a chain of dense layers with `relu` between, its kernels.
    """

    model: nn.Module
    variables: Any
    args: tuple[Any, ...]
    samples: tuple[tuple[Any, ...], ...]
    dense: tuple[np.ndarray, ...] | None = None
