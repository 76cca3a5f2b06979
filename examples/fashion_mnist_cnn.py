"""A small CNN in plain Flax Linen, which knows nothing of quantization."""

from __future__ import annotations

import flax.linen as nn
import jax


class CNN(nn.Module):
    """Images `[n, 28, 28, 1]` to logits `[n, classes]` by 3 x 3 convolutions with BatchNorm.

    Attributes:
      widths: channels of each convolution.
      strides: of each; small images early keep it fast on CPUs.
      classes: how many logits.
    """

    widths: tuple[int, ...] = (32, 64, 64, 128)
    strides: tuple[int, ...] = (2, 2, 1, 2)
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i, (width, stride) in enumerate(zip(self.widths, self.strides, strict=True)):
            x = nn.Conv(width, (3, 3), (stride, stride), use_bias=False, name=f"conv{i}")(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"norm{i}")(x)
            x = nn.relu(x)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))
