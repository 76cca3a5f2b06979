"""The same sentence encoder in plain NumPy, float64: what the Flax model is checked against.

It reads the safetensors under their own names and shares no code with the Flax model, so a
transposed kernel or two swapped norms would show.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.special import erf, softmax


def embed(
    tensors: Mapping[str, np.ndarray], ids: np.ndarray, mask: np.ndarray, *, heads: int
) -> np.ndarray:
    """Unit-length sentence embeddings [batch, width] of ids and mask [batch, length]."""

    def get(name: str) -> np.ndarray:
        return tensors[name].astype(np.float64)

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ get(f"{name}.weight").T + get(f"{name}.bias")

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return centred / deviation * get(f"{name}.weight") + get(f"{name}.bias")

    def split(x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    x = get("embeddings.word_embeddings.weight")[ids]
    x = x + get("embeddings.position_embeddings.weight")[: ids.shape[1]]
    x = norm("embeddings.LayerNorm", x + get("embeddings.token_type_embeddings.weight")[0])
    layers = 1 + max(int(n.split(".")[2]) for n in tensors if n.startswith("encoder.layer."))
    for layer in (f"encoder.layer.{i}" for i in range(layers)):
        q, k, v = (
            split(linear(f"{layer}.attention.self.{n}", x)) for n in ("query", "key", "value")
        )
        scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])
        scores = np.where(mask[:, None, None, :], scores, -np.inf)
        mixed = (softmax(scores, axis=-1) @ v).transpose(0, 2, 1, 3).reshape(x.shape)
        x = norm(
            f"{layer}.attention.output.LayerNorm",
            x + linear(f"{layer}.attention.output.dense", mixed),
        )
        hidden = linear(f"{layer}.intermediate.dense", x)
        hidden = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2)))
        x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", hidden))
    mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)
