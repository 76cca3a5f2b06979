"""The same decoder in plain NumPy, float64: what the Flax model is checked against.

It reads the tensors under GGUF's names and shares no code with the Flax model. Queries and keys are
put back into the order of the published checkpoint, whose rotary pairs are halves of a head apart,
so that a misread permutation would show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np


def logits(
    tensors: Mapping[str, Callable[[], np.ndarray]],
    tokens: np.ndarray,
    *,
    heads: int,
    kv_heads: int,
    base: float,
    epsilon: float,
) -> np.ndarray:
    """Logits [time, vocab] of tokens [time]."""

    def get(name: str) -> np.ndarray:
        return tensors[f"{name}.weight"]().astype(np.float64)

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * get(name)

    def project(name: str, x: np.ndarray, count: int, rotary: bool) -> np.ndarray:
        w = get(name)
        if rotary:  # rows of a head: neighbours in GGUF, halves in the checkpoint
            w = w.reshape(count, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        return (x @ w.T).reshape(len(x), count, -1)

    def rotate(x: np.ndarray) -> np.ndarray:
        half = x.shape[-1] // 2
        angle = np.outer(np.arange(len(x)), base ** (-np.arange(half) / half))[:, None]
        angle = np.concatenate([angle, angle], -1)
        turned = np.concatenate([-x[..., half:], x[..., :half]], -1)
        return x * np.cos(angle) + turned * np.sin(angle)

    table = get("token_embd")
    x = table[tokens]
    future = np.triu(np.ones((len(tokens), len(tokens)), bool), 1)
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blk."))
    for layer in (f"blk.{i}" for i in range(layers)):
        y = norm(f"{layer}.attn_norm", x)
        q = rotate(project(f"{layer}.attn_q", y, heads, True))
        k = rotate(project(f"{layer}.attn_k", y, kv_heads, True))
        v = project(f"{layer}.attn_v", y, kv_heads, False)
        mixed = np.empty_like(q)
        for h in range(heads):
            shared = h // (heads // kv_heads)
            scores = q[:, h] @ k[:, shared].T / np.sqrt(q.shape[-1])
            scores = np.where(future, -np.inf, scores)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, h] = weights / weights.sum(-1, keepdims=True) @ v[:, shared]
        x = x + mixed.reshape(x.shape) @ get(f"{layer}.attn_output").T
        y = norm(f"{layer}.ffn_norm", x)
        gate = y @ get(f"{layer}.ffn_gate").T
        hidden = gate / (1 + np.exp(-gate)) * (y @ get(f"{layer}.ffn_up").T)
        x = x + hidden @ get(f"{layer}.ffn_down").T
    return norm("output_norm", x) @ table.T
