"""SmolLM2 out of its GGUF file: sizes, weights as Linen variables, and the tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from smollm2_model import Config, SmolLM2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

CONTROL = 3  # the token type of `<|im_start|>` and the like in GGUF


@dataclasses.dataclass(frozen=True)
class File:
    """What a GGUF file holds: its metadata, and its tensors, made float32 one by one."""

    metadata: dict[str, Any]
    tensors: dict[str, Callable[[], np.ndarray]]

    @property
    def config(self) -> Config:
        """The decoder's sizes."""
        m = self.metadata
        if m["general.architecture"] != "llama" or "output.weight" in self.tensors:
            raise ValueError(
                "expected a GGUF file of a Llama with tied embeddings, got "
                f"{m['general.architecture']}, output.weight: {'output.weight' in self.tensors}"
            )
        return Config(
            vocab=len(m["tokenizer.ggml.tokens"]),
            layers=m["llama.block_count"],
            width=m["llama.embedding_length"],
            heads=m["llama.attention.head_count"],
            kv_heads=m["llama.attention.head_count_kv"],
            mlp=m["llama.feed_forward_length"],
            rope_base=m["llama.rope.freq_base"],
            epsilon=m["llama.attention.layer_norm_rms_epsilon"],
        )


def read(path: pathlib.Path) -> File:
    """A GGUF file, mapped into memory; tensors of any block format come out as float32."""
    reader = gguf.GGUFReader(path)

    def tensor(t: gguf.ReaderTensor) -> Callable[[], np.ndarray]:
        return lambda: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)

    metadata = {name: field.contents() for name, field in reader.fields.items()}
    return File(metadata, {t.name: tensor(t) for t in reader.tensors})


def load_variables(file: File, *, scan: bool = False) -> dict[str, Any]:
    """The Linen variables, for layers in a loop or scanned.

    Tensors are read one by one, or those of one name in all layers: beside the variables nothing
    large is held.
    """

    def get(name: str) -> Callable[[], np.ndarray]:
        return file.tensors[f"{name}.weight"]

    def dense(name: str) -> dict[str, Callable[[], np.ndarray]]:
        # GGUF keeps a linear layer as [out, in], Flax as [in, out].
        return {"kernel": lambda: np.ascontiguousarray(get(name)().T)}

    def block(name: str) -> dict[str, Any]:
        attn = {"query": "attn_q", "key": "attn_k", "value": "attn_v", "out": "attn_output"}
        mlp = {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
        return {
            "attn_norm": {"scale": get(f"{name}.attn_norm")},
            "attn": {ours: dense(f"{name}.{theirs}") for ours, theirs in attn.items()},
            "mlp_norm": {"scale": get(f"{name}.ffn_norm")},
            "mlp": {ours: dense(f"{name}.{theirs}") for ours, theirs in mlp.items()},
        }

    def stacked(*layers: Callable[[], np.ndarray]) -> np.ndarray:
        return np.stack([read() for read in layers])

    blocks = [block(f"blk.{i}") for i in range(file.config.layers)]
    params: dict[str, Any] = {
        "embed": {"embedding": get("token_embd")},
        "norm": {"scale": get("output_norm")},
    }
    if scan:
        params["blocks"] = jax.tree.map(lambda *a: functools.partial(stacked, *a), *blocks)
    else:
        params |= {f"block_{i}": b for i, b in enumerate(blocks)}
    return jax.tree.map(lambda read: jnp.asarray(read()), {"params": params})


def load(file: File, *, scan: bool = False) -> tuple[SmolLM2, dict[str, Any]]:
    """The model and its variables, with the layers in a loop or scanned."""
    return SmolLM2(file.config, scan), load_variables(file, scan=scan)


def tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer in a GGUF file's metadata.

    Texts are cut before pairs are merged: each digit by itself, then as GPT-2 does.

    Raises:
      ValueError: the file asks for another tokenizer.
    """
    kind = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"expected a tokenizer of kind gpt2, smollm, got {', '.join(kind)}")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    pairs = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    digit = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digit, bytes_])
    made.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return made
