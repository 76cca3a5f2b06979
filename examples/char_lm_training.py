"""Training of a character model, float or with quantization, by any optimizer; loss and samples."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from char_lm_text import Text, batches, in_order
from flax import nnx
from qat_training import run_steps


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long and how fast is trained.

    Attributes:
      steps: the same for every variant.
      rate: highest learning rate.
      rows: of characters a step.
      length: characters in a row.
      seed: of the weights and of the places that rows are cut from.
    """

    steps: int
    rate: float
    rows: int
    length: int
    seed: int = 0

    def schedule(self) -> optax.Schedule:
        """A linear rise over the first tenth, then down to a tenth of the rate by a cosine."""
        return optax.warmup_cosine_decay_schedule(
            0.0, self.rate, max(1, self.steps // 10), self.steps, self.rate / 10
        )


class State(NamedTuple):
    """What a training step takes and gives: `nnx.Param`s, other variables, optax's state."""

    params: nnx.State
    rest: nnx.State
    optimizer: Any


class FakeQuantTensor(NamedTuple):
    """A trained model, its losses, seconds, and the bytes that its optimizer's state takes."""

    model: nnx.Module
    losses: list[float]
    seconds: float
    optimizer_bytes: int


def mean_loss(model: Any, rows: jax.Array) -> jax.Array:
    """Cross entropy of each character, given those before it in the row, `[]`."""
    logits = model(rows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()


def fit(
    name: str,
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    text: Text,
    settings: Settings,
    step_done: Callable[[float], Any] = lambda loss: None,
) -> FakeQuantTensor:
    """Trains a model's `nnx.Param`s, what it learns about quantization among them.

    Args:
      name: of the variant, for errors.
      model: called with characters `[rows, length]`; it is not changed.
      optimizer: given gradients of norm 1 at most.
      text: what is trained on.
      settings: how long and how fast.
      step_done: told of each loss.
    """
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optimizer)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(state: State, rows: jax.Array) -> tuple[State, jax.Array]:
        def loss(params: nnx.State) -> tuple[jax.Array, nnx.State]:
            model = nnx.merge(graphdef, params, state.rest, copy=True)
            return mean_loss(model, rows), nnx.state(model, nnx.Not(nnx.Param))

        (found, rest), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, moments = clipped.update(gradients, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), rest, moments), found

    began = time.perf_counter()
    rows = batches(text.train, settings.steps, settings.rows, settings.length, settings.seed)
    start = State(params, rest, clipped.init(params))
    state, losses = run_steps(name, step, start, rows, step_done)
    seconds = time.perf_counter() - began
    model = nnx.merge(graphdef, state.params, state.rest)
    model.eval()
    stored = sum(x.nbytes for x in jax.tree.leaves(state.optimizer))
    return FakeQuantTensor(model, losses, seconds, stored)


def validate(
    model: nnx.Module,
    text: Text,
    settings: Settings,
    step_done: Callable[[], Any] = lambda: None,
) -> float:
    """The mean loss over all of the validation text."""
    loss = nnx.jit(mean_loss)
    found = []
    for rows in in_order(text.valid, settings.rows, settings.length):
        found.append(float(loss(model, rows)))
        step_done()
    return float(np.mean(found))


def sample(
    model: nnx.Module, text: Text, begin: str, count: int, length: int, temperature: float, key: Any
) -> str:
    """`begin` and `count` characters more, each drawn from what the model gives them.

    The model always reads `length` characters, so that it compiles once: what comes after those
    written so far is filled up, and being causal, it does not look there.
    """

    @nnx.jit
    def draw(model: Any, codes: jax.Array, last: jax.Array, key: jax.Array) -> jax.Array:
        logits = jnp.take(model(codes[None])[0], last, axis=0)
        return jax.random.categorical(key, logits / temperature)

    codes = list(text.codes(begin))
    for step in range(count):
        seen = codes[-length:]
        window = np.array(seen + [0] * (length - len(seen)), np.int32)
        codes.append(int(draw(model, window, len(seen) - 1, jax.random.fold_in(key, step))))
    return text.read(np.array(codes))
