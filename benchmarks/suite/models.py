"""The models of the suite: ordinary Flax Linen code, and the examples' pretrained ones."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.suite.program import Program


class MLP(nn.Module):
    """Dense layers with `relu` between."""

    width: int
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[rows, width]` to the same."""
        for n in range(self.layers):
            x = nn.Dense(self.width, use_bias=False)(nn.relu(x) if n else x)
        return x


class Block(nn.Module):
    """A transformer block of attention and MLP, each with a norm before and a sum after."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, past: jax.Array | None = None) -> jax.Array:
        """Tokens `[batch, time, width]`, and keys and values of earlier ones, stacked."""
        *lead, width = x.shape
        y = nn.RMSNorm()(x)
        query, keys, values = (
            nn.Dense(width, use_bias=False)(y).reshape(*lead, self.heads, width // self.heads)
            for _ in range(3)
        )
        if past is not None:
            keys = jnp.concatenate([past[0], keys], 1)
            values = jnp.concatenate([past[1], values], 1)
        seen = jnp.tril(jnp.ones((query.shape[1], keys.shape[1]), bool), keys.shape[1] - lead[1])
        y = nn.dot_product_attention(query, keys, values, mask=seen[None, None])
        x = x + nn.Dense(width, use_bias=False)(y.reshape(x.shape))
        y = nn.gelu(nn.Dense(4 * width, use_bias=False)(nn.RMSNorm()(x)))
        return x + nn.Dense(width, use_bias=False)(y)


class Separable(nn.Module):
    """Depthwise and pointwise convolutions, as MobileNet has them."""

    # channels and stride of each pair
    pairs: tuple[tuple[int, int], ...] = (
        (64, 1),
        (128, 2),
        (128, 1),
        (256, 2),
        (256, 1),
        (512, 2),
        (512, 1),
        (512, 1),
    )

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images `[batch, height, width, 3]` to 10 classes."""
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        for features, stride in self.pairs:
            channels = x.shape[-1]
            x = nn.relu(nn.Conv(channels, (3, 3), stride, feature_group_count=channels)(x))
            x = nn.relu(nn.Conv(features, (1, 1))(x))
        return nn.Dense(10)(x.mean((1, 2)))


def _examples() -> None:
    """Makes the examples' modules importable: the models are theirs, not copies of them."""
    folder = str(pathlib.Path(__file__).parents[2] / "examples")
    if folder not in sys.path:
        sys.path.insert(0, folder)


def minilm(batch: int) -> Program:
    """MiniLM-L6 on sentences of 64 tokens."""
    _examples()
    import _data
    import minilm_model
    import minilm_text

    files = _data.minilm_files()
    model, variables, _ = minilm_model.load(files)
    sentences = _data.review_snippets(500)
    made = minilm_text.make_batches(files["tokenizer.json"], sentences, (64,), batch)
    full = [(b.ids, b.mask) for b in made if len(b.ids) == batch]
    return Program(model, variables, full[-1], tuple(full[:2]))


def smollm2(time: int, cached: int) -> Program:
    """SmolLM2-135M: `time` tokens, after `cached` ones; layers in a loop."""
    _examples()
    import _data
    import smollm2_model
    import smollm2_weights

    model, variables = smollm2_weights.load(smollm2_weights.read(_data.smollm2_file()))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab, (3, 1, time))
    rest: tuple[Any, ...] = ()
    if cached:
        cache = smollm2_model.empty_cache(model.config, 1, cached)
        rest = (cache, jnp.int32(cached - time))
    given = [(jnp.asarray(ids, jnp.int32), *rest) for ids in tokens]
    return Program(model, variables, given[0], tuple(given[1:]))
