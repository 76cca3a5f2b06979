"""Text from a language model, token by token with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from smollm2_model import Config, empty_cache
from tokenizers import Tokenizer

END = "<|im_end|>"
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
)


def greedy(
    fn: Callable[..., Any], variables: Any, config: Config, tokens: np.ndarray, most: int
) -> Iterator[int]:
    """At most `most` tokens after tokens [time], each the likeliest one.

    `fn` is `model.apply`, or `jaxquant.quantized(model.apply)` with quantized variables. It is
    compiled twice: for all given tokens at once, and for one at a time. The cache is donated, so
    that it is updated in place.
    """

    def step(variables: Any, tokens: jax.Array, cache: Any, position: jax.Array) -> Any:
        logits, cache = fn(variables, tokens, cache, position)
        return jnp.argmax(logits[:, -1], axis=-1)[:, None], cache

    jitted = jax.jit(step, donate_argnums=2)
    cache = empty_cache(config, 1, len(tokens) + most)
    given, position = jnp.asarray(tokens)[None], 0
    for _ in range(most):
        following, cache = jitted(variables, given, cache, jnp.int32(position))
        position += given.shape[1]
        given = following
        yield int(following[0, 0])


def answer(
    fn: Callable[..., Any],
    variables: Any,
    config: Config,
    tokenizer: Tokenizer,
    prompt: str,
    most: int,
) -> Iterator[str]:
    """An assistant's answer to a prompt, in pieces of text as they come."""
    given = tokenizer.encode(CHAT.format(prompt=prompt)).ids
    said: list[int] = []
    shown = ""
    for token in greedy(fn, variables, config, np.array(given, np.int32), most):
        if token == tokenizer.token_to_id(END):
            return
        said.append(token)
        text = tokenizer.decode(said)
        if not text.endswith("\ufffd"):  # else within a character of several bytes
            yield text[len(shown) :]
            shown = text
