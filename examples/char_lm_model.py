"""A small causal transformer over characters in plain Flax NNX, without any quantization."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Config:
    """A transformer's sizes; `length` is the most characters it looks at."""

    vocab: int
    width: int = 128
    heads: int = 4
    mlp: int = 512
    layers: int = 2
    length: int = 64


class Block(nnx.Module):
    """Causal attention and a perceptron, each with a norm before and a sum after."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.heads = config.heads
        self.attn_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.qkv = linear(config.width, 3 * config.width)
        self.out = linear(config.width, config.width)
        self.mlp_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.up = linear(config.width, config.mlp)
        self.down = linear(config.mlp, config.width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Vectors `[n, length, width]` to the same."""
        n, length, width = x.shape
        y = self.qkv(self.attn_norm(x)).reshape(n, length, 3, self.heads, -1)
        query, key, value = y[:, :, 0], y[:, :, 1], y[:, :, 2]
        scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) / (width // self.heads) ** 0.5
        seen = jnp.tril(jnp.ones((length, length), bool))
        scores = jnp.where(jnp.broadcast_to(seen, scores.shape), scores, -jnp.inf)
        y = jnp.einsum("nhqk,nkhd->nqhd", nnx.softmax(scores), value)
        x = x + self.out(y.reshape(n, length, width))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class CharLM(nnx.Module):
    """Characters `[n, length]` to logits `[n, length, vocab]` of the character after each."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(config.vocab, config.width, rngs=rngs)
        self.position = nnx.Embed(config.length, config.width, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, config.vocab, use_bias=False, rngs=rngs)

    def __call__(self, codes: jax.Array) -> jax.Array:
        """See the class."""
        places = jnp.broadcast_to(jnp.arange(codes.shape[1]), codes.shape)
        x = self.embed(codes) + self.position(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
