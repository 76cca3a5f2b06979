"""MiniLM-L6, a BERT sentence encoder, as an ordinary Flax Linen model: nothing here is quantized.

`jaxquant` never edits a model, so this file does not know of it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Config:
    """A BERT's sizes; the defaults are MiniLM-L6's."""

    vocab: int = 30522
    positions: int = 512
    types: int = 2
    layers: int = 6
    width: int = 384
    heads: int = 12
    mlp: int = 1536
    epsilon: float = 1e-12

    @classmethod
    def read(cls, path: pathlib.Path) -> Config:
        """The sizes in a Hugging Face `config.json`."""
        read = json.loads(path.read_text())
        return cls(
            vocab=read["vocab_size"],
            positions=read["max_position_embeddings"],
            types=read["type_vocab_size"],
            layers=read["num_hidden_layers"],
            width=read["hidden_size"],
            heads=read["num_attention_heads"],
            mlp=read["intermediate_size"],
            epsilon=read["layer_norm_eps"],
        )


class Embeddings(nn.Module):
    """Sum of word, position and type embeddings, normalised."""

    config: Config

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Ids [batch, length] to vectors [batch, length, width]."""
        c = self.config
        positions = jnp.arange(ids.shape[-1])[None]
        x = nn.Embed(c.vocab, c.width, name="word_embeddings")(ids)
        x += nn.Embed(c.positions, c.width, name="position_embeddings")(positions)
        x += nn.Embed(c.types, c.width, name="token_type_embeddings")(jnp.zeros_like(ids))
        return nn.LayerNorm(c.epsilon, name="norm")(x)


class Attention(nn.Module):
    """Multi-head self-attention over the tokens that the mask keeps."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Vectors [batch, length, width] and mask [batch, length] to vectors."""
        width = x.shape[-1]
        split = (*x.shape[:-1], self.heads, width // self.heads)
        query = nn.Dense(width, name="query")(x).reshape(split)
        key = nn.Dense(width, name="key")(x).reshape(split)
        value = nn.Dense(width, name="value")(x).reshape(split)
        y = nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
        return nn.Dense(width, name="out")(y.reshape(x.shape))


class Mlp(nn.Module):
    """The two dense layers of a block, with the exact GELU between them."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Vectors [batch, length, width] to vectors."""
        y = nn.Dense(self.hidden, name="up")(x)
        return nn.Dense(x.shape[-1], name="down")(nn.gelu(y, approximate=False))


class Layer(nn.Module):
    """One block: attention and MLP, each added to its input and then normalised."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Vectors [batch, length, width] and mask [batch, length] to vectors."""
        c = self.config
        x = nn.LayerNorm(c.epsilon, name="attn_norm")(x + Attention(c.heads, name="attn")(x, mask))
        return nn.LayerNorm(c.epsilon, name="mlp_norm")(x + Mlp(c.mlp, name="mlp")(x))


class Encoder(nn.Module):
    """The blocks, one after the other."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Vectors [batch, length, width] and mask [batch, length] to vectors."""
        for i in range(self.config.layers):
            x = Layer(self.config, name=f"layer_{i}")(x, mask)
        return x


class MiniLM(nn.Module):
    """Sentence embeddings of unit length: the mean over a sentence's tokens, normalised."""

    config: Config = Config()

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Ids and mask [batch, length] to embeddings [batch, width]."""
        x = Embeddings(self.config, name="embeddings")(ids)
        x = Encoder(self.config, name="encoder")(x, mask)
        weight = mask[..., None].astype(x.dtype)
        mean = jnp.sum(x * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1e-9)
        return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def load_variables(tensors: Tensors, config: Config) -> dict[str, Any]:
    """The Linen variables from tensors under their Hugging Face names.

    The pooler's two tensors are left out: mean pooling does not use them.
    """

    def dense(name: str) -> dict[str, np.ndarray]:
        # PyTorch keeps a linear layer as [out, in], Flax as [in, out].
        kernel = np.ascontiguousarray(tensors[f"{name}.weight"].T)
        return {"kernel": kernel, "bias": tensors[f"{name}.bias"]}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}

    def layer(i: int) -> dict[str, Any]:
        name = f"encoder.layer.{i}"
        return {
            "attn": {
                "query": dense(f"{name}.attention.self.query"),
                "key": dense(f"{name}.attention.self.key"),
                "value": dense(f"{name}.attention.self.value"),
                "out": dense(f"{name}.attention.output.dense"),
            },
            "attn_norm": norm(f"{name}.attention.output.LayerNorm"),
            "mlp": {
                "up": dense(f"{name}.intermediate.dense"),
                "down": dense(f"{name}.output.dense"),
            },
            "mlp_norm": norm(f"{name}.output.LayerNorm"),
        }

    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    params = {
        "embeddings": {
            **{t: {"embedding": tensors[f"embeddings.{t}.weight"]} for t in tables},
            "norm": norm("embeddings.LayerNorm"),
        },
        "encoder": {f"layer_{i}": layer(i) for i in range(config.layers)},
    }
    return jax.tree.map(jnp.asarray, {"params": params})


def load(files: Mapping[str, pathlib.Path]) -> tuple[MiniLM, dict[str, Any], Tensors]:
    """The model, its variables, and the tensors as they stand in the file."""
    config = Config.read(files["config.json"])
    tensors = load_file(files["model.safetensors"])
    return MiniLM(config), load_variables(tensors, config), tensors
