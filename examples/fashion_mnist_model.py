"""A small residual CNN in plain Flax Linen and its training; neither knows of quantization."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax


class Block(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm, added to their own input."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = functools.partial(nn.Conv, self.features, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        strides = (self.stride, self.stride)
        y = nn.relu(norm(name="norm1")(conv((3, 3), strides, name="conv1")(x)))
        y = norm(name="norm2")(conv((3, 3), name="conv2")(y))
        if x.shape != y.shape:
            x = norm(name="norm_skip")(conv((1, 1), strides, name="conv_skip")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Images `[n, 28, 28, 1]` to logits `[n, classes]`; each stage after the first halves the size.

    Attributes:
      widths: channels of each stage, which is one residual block.
      classes: how many logits.
    """

    widths: tuple[int, ...] = (32, 64, 128)
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(self.widths[0], (3, 3), use_bias=False, name="stem")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="stem_norm")(x)
        x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        for i, width in enumerate(self.widths):
            x = Block(width, stride=1 if i == 0 else 2, name=f"stage{i}")(x, train)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


def train(
    model: nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int = 0,
    step_done: Callable[[float], Any] = lambda loss: None,
) -> Any:
    """The model's variables after AdamW under a one-cycle schedule.

    Images are mirrored at random, half of them. `step_done` is told of each step's loss.

    Args:
      model: called as `model.apply(variables, x, train=True, mutable=["batch_stats"])`.
      images: float `[n, h, w, 1]`.
      labels: integers `[n]`.
      steps: how many steps.
      batch: images a step; what is left of an epoch is dropped.
      rate: highest learning rate.
      seed: of the weights, the order and the mirroring.
      step_done: called after each step.
    """
    schedule = optax.cosine_onecycle_schedule(steps, rate, pct_start=0.25)
    optimizer = optax.adamw(schedule, weight_decay=0.01)
    variables = model.init(jax.random.key(seed), images[:1])
    params, stats = variables["params"], variables["batch_stats"]
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, stats: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            logits, updated = model.apply(
                {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
            )
            found = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return found, updated["batch_stats"]

        (found, stats), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), stats, state, found

    rng = np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = rng.permutation(len(images))
        chosen, order = order[:batch], order[batch:]
        mirrored = rng.random(batch) < 0.5
        x = images[chosen]
        x = np.where(mirrored[:, None, None, None], x[:, :, ::-1], x)
        params, stats, state, found = step(params, stats, state, x, labels[chosen])
        step_done(float(found))
    return {"params": params, "batch_stats": stats}
