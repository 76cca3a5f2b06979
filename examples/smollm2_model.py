"""SmolLM2, a Llama decoder, as an ordinary Flax Linen model: nothing here is quantized.

`jaxquant` never edits a model, so this file does not know of it. The layers stand in a Python loop,
or under `nn.scan` with their params stacked on a leading axis; both compute the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# Keys and values of earlier tokens, each [layers, batch, length, kv_heads, head].
Cache = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """A Llama's sizes; the defaults are SmolLM2-135M's."""

    vocab: int = 49152
    layers: int = 30
    width: int = 576
    heads: int = 9
    kv_heads: int = 3
    mlp: int = 1536
    rope_base: float = 100_000.0
    epsilon: float = 1e-5

    @property
    def head(self) -> int:
        """Width of one head."""
        return self.width // self.heads


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding of x [batch, time, heads, head] at positions [time].

    Neighbours `(x_2i, x_2i+1)` are a pair, as GGUF files store queries and keys.
    """
    half = x.shape[-1] // 2
    angle = positions[:, None] * (base ** (-jnp.arange(half) / half))[None]
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    a, b = x[..., ::2], x[..., 1::2]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)


class Attention(nn.Module):
    """Causal attention in which several query heads share one head of keys and values."""

    config: Config

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: Cache | None, position: jax.Array | int
    ) -> tuple[jax.Array, Cache | None]:
        """Vectors [batch, time, width] and one layer's cache to the same."""
        c = self.config
        batch, time, _ = x.shape

        def heads(count: int, name: str) -> jax.Array:
            y = nn.Dense(count * c.head, use_bias=False, name=name)(x)
            return y.reshape(batch, time, count, c.head)

        positions = position + jnp.arange(time)
        query = rotate(heads(c.heads, "query"), positions, c.rope_base)
        keys = rotate(heads(c.kv_heads, "key"), positions, c.rope_base)
        values = heads(c.kv_heads, "value")
        if cache is not None:
            at = (0, position, 0, 0)
            keys = jax.lax.dynamic_update_slice(cache["keys"], keys, at)
            values = jax.lax.dynamic_update_slice(cache["values"], values, at)
            cache = {"keys": keys, "values": values}
        first = 0 if cache is not None else position
        seen = first + jnp.arange(keys.shape[1])[None] <= positions[:, None]
        query = query.reshape(batch, time, c.kv_heads, -1, c.head) / c.head**0.5
        scores = jnp.einsum("btkgd,bskd->bkgts", query, keys)
        weights = nn.softmax(jnp.where(seen[None, None, None], scores, -jnp.inf))
        y = jnp.einsum("bkgts,bskd->btkgd", weights, values).reshape(x.shape)
        return nn.Dense(c.width, use_bias=False, name="out")(y), cache


class Mlp(nn.Module):
    """The gated dense layers of a block."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Vectors [batch, time, width] to vectors."""
        gate = nn.Dense(self.hidden, use_bias=False, name="gate")(x)
        up = nn.Dense(self.hidden, use_bias=False, name="up")(x)
        return nn.Dense(x.shape[-1], use_bias=False, name="down")(nn.silu(gate) * up)


class Block(nn.Module):
    """Attention and MLP, each with a norm before and a sum after."""

    config: Config

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: Cache | None, position: jax.Array | int
    ) -> tuple[jax.Array, Cache | None]:
        """Vectors [batch, time, width] and one layer's cache to the same."""
        c = self.config
        y = nn.RMSNorm(c.epsilon, name="attn_norm")(x)
        y, cache = Attention(c, name="attn")(y, cache, position)
        x = x + y
        y = nn.RMSNorm(c.epsilon, name="mlp_norm")(x)
        return x + Mlp(c.mlp, name="mlp")(y), cache


class SmolLM2(nn.Module):
    """A decoder with tied embeddings.

    Attributes:
      config: the sizes.
      scan: whether the layers are scanned, their params stacked under `blocks`; else they are
        `block_0`, `block_1` and so on.
    """

    config: Config = Config()
    scan: bool = False

    @nn.compact
    def __call__(
        self, tokens: jax.Array, cache: Cache | None = None, position: jax.Array | int = 0
    ) -> Any:
        """Logits [batch, time, vocab] of tokens [batch, time], the first of them at `position`.

        With a cache, which holds what came before `position`: logits, and the cache with these
        tokens in it.
        """
        c = self.config
        embed = nn.Embed(c.vocab, c.width, name="embed")
        x = embed(tokens)
        if self.scan:
            blocks = nn.scan(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=c.layers,
            )(c, name="blocks")
            x, new = blocks(x, cache, position)
        else:
            layers = []
            for i in range(c.layers):
                own = None if cache is None else {name: a[i] for name, a in cache.items()}
                x, own = Block(c, name=f"block_{i}")(x, own, position)
                layers.append(own)
            new = jax.tree.map(lambda *a: jnp.stack(a), *layers)
        logits = embed.attend(nn.RMSNorm(c.epsilon, name="norm")(x))
        return logits if cache is None else (logits, new)


def empty_cache(config: Config, batch: int, length: int) -> Cache:
    """A cache for `length` tokens."""
    shape = (config.layers, batch, length, config.kv_heads, config.head)
    return {name: jnp.zeros(shape) for name in ("keys", "values")}
