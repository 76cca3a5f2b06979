"""Training of a classifier with BatchNorm by AdamW: in float, or by a recipe of jaxquant."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from fashion_mnist_data import Images
from qat_training import run_steps

import jaxquant as jq

LEARNED = 10  # rate of what is learned about quantization, in rates of the weights


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long and how fast is trained.

    Attributes:
      steps: of the float model, from scratch.
      rate: its highest learning rate.
      tuning_steps: of each quantized variant, which starts from the float model.
      tuning_rate: its highest learning rate; see also `adamw`.
      batch: images a step.
      seed: of the weights, the order and the mirroring.
    """

    steps: int
    rate: float
    tuning_steps: int
    tuning_rate: float
    batch: int = 128
    seed: int = 0

    def from_scratch(self) -> optax.Schedule:
        """Learning rates of the float model: one cycle."""
        return optax.cosine_onecycle_schedule(self.steps, self.rate, pct_start=0.25)

    def tuning(self) -> optax.Schedule:
        """Learning rates from trained weights on: down by a cosine, after a few steps."""
        first = max(1, self.tuning_steps // 20)
        return optax.warmup_cosine_decay_schedule(0.0, self.tuning_rate, first, self.tuning_steps)


class State(NamedTuple):
    """What a training step takes and gives.

    Attributes:
      variables: `params`, `batch_stats` and, with quantization, `quant`.
      optimizer: optax's state.
    """

    variables: Any
    optimizer: Any


def fit(
    name: str,
    model: nn.Module | jq.linen.FakeQuantizedModel,
    variables: Any,
    images: Images,
    settings: Settings,
    steps: int,
    schedule: optax.Schedule,
    step_done: Callable[[float], Any] = lambda loss: None,
) -> tuple[Any, list[float]]:
    """Trained variables, and the loss of each step.

    Args:
      name: of the variant, for errors.
      model: a classifier in float, or with quantization.
      variables: where to begin.
      images: what is trained on.
      settings: batch and seed.
      steps: how many.
      schedule: learning rates.
      step_done: told of each loss.
    """
    optimizer = adamw(schedule, variables)

    @jax.jit
    def step(state: State, x: jax.Array, y: jax.Array) -> tuple[State, jax.Array]:
        def loss(trained: Any) -> Any:
            now = jq.linen.updated(state.variables, trained)
            logits, updates = model.apply(now, x, train=True, mutable=["batch_stats", "quant"])
            found = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return found, updates

        trained = jq.linen.trainable(state.variables)
        (found, updates), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        changes, moments = optimizer.update(gradient, state.optimizer, trained)
        trained = optax.apply_updates(trained, changes)
        return State(jq.linen.updated(state.variables, updates, trained), moments), found

    state = State(variables, optimizer.init(jq.linen.trainable(variables)))
    given = batches(images, steps, settings)
    state, losses = run_steps(name, step, state, given, step_done)
    return state.variables, losses


def adamw(schedule: optax.Schedule, variables: Any) -> optax.GradientTransformation:
    """AdamW for weights, and Adam for what is learned about quantization.

    Steps differ in size by orders of magnitude, with bits and layers, and must not decay: so each
    moves by a share of its own size. LSQ's first steps are some times too large where there are
    many bits, so that share is greater than the rate of weights.
    """
    learned = optax.chain(
        optax.scale_by_adam(),
        optax.scale_by_param_block_rms(1e-8),
        optax.scale_by_learning_rate(lambda step: LEARNED * schedule(step)),
    )
    kinds = {"params": optax.adamw(schedule, weight_decay=0.05), "quant": learned}
    return optax.partition(kinds, {kind: kind for kind in jq.linen.trainable(variables)})


def batches(
    images: Images, steps: int, settings: Settings
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images, half of them mirrored, and labels; what is left of an epoch is dropped."""
    rng = np.random.default_rng(settings.seed)
    order = np.empty(0, np.int64)
    for _ in range(steps):
        if len(order) < settings.batch:
            order = rng.permutation(len(images.train_x))
        chosen, order = order[: settings.batch], order[settings.batch :]
        mirrored = rng.random(settings.batch) < 0.5
        x = images.train_x[chosen]
        yield np.where(mirrored[:, None, None, None], x[:, :, ::-1], x), images.train_y[chosen]
