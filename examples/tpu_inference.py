"""Decoding on a TPU, looked at without one: what a quantized, donated decode step is compiled from.

    python examples/tpu_inference.py                            # w8a8 for tpu
    python examples/tpu_inference.py --preset w4a16 --platform cuda
    python examples/tpu_inference.py --quick                    # a small model

A plain Flax decoder (rotary positions, grouped queries, gated MLP, layers under `nn.scan`, KV cache
as an argument) is quantized, its jitted decode step is exported by `jax.export` for a platform that
need not be there, and the exported text is read: the types of every contraction's operands, and
whether the cache is updated in place. The artifact is written, read back, and compared.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import pathlib
import re
import sys
import tempfile
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import export
from rich import box
from rich.console import Console
from rich.table import Table

import jaxquant as jq

PRESETS = {
    "w8a8": jq.w8a8(),
    "w8a16": jq.w8a16(),
    "w4a16": jq.w4a16(),
    "w4a8": jq.w4a8(),
    "nf4": jq.nf4(),
    "w8a8_fp8": jq.w8a8_fp8(),
    "mxfp4": jq.mxfp4(),
}
Cache = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder's sizes."""

    vocab: int = 32_000
    layers: int = 4
    width: int = 1024
    heads: int = 16
    kv_heads: int = 4
    mlp: int = 2816
    length: int = 2048
    dtype: str = "bfloat16"

    @property
    def head(self) -> int:
        """Width of one head."""
        return self.width // self.heads


QUICK = Config(vocab=512, layers=3, width=128, heads=4, kv_heads=2, mlp=384, length=64)


def rotate(x: jax.Array, position: jax.Array) -> jax.Array:
    """Rotary position embedding of x [batch, heads, head] at one position."""
    half = x.shape[-1] // 2
    angle = position * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = (jnp.broadcast_to(t, a.shape) for t in (cos, sin))
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Block(nn.Module):
    """Attention over the cache and a gated MLP, each with a norm before and a sum after."""

    config: Config

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: tuple[jax.Array, jax.Array], position: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Vectors [batch, width] of one token and one layer's cache to the same."""
        c = self.config
        keys, values = cache

        def dense(features: int | tuple[int, int], name: str) -> nn.DenseGeneral:
            return nn.DenseGeneral(features, use_bias=False, dtype=c.dtype, name=name)

        y = nn.RMSNorm(dtype=c.dtype, name="attn_norm")(x)
        query = rotate(dense((c.heads, c.head), "query")(y), position)
        key = rotate(dense((c.kv_heads, c.head), "key")(y), position)
        value = dense((c.kv_heads, c.head), "value")(y)
        at = (0, position, 0, 0)
        keys = jax.lax.dynamic_update_slice(keys, key[:, None], at)
        values = jax.lax.dynamic_update_slice(values, value[:, None], at)
        query = query.reshape(-1, c.kv_heads, c.heads // c.kv_heads, c.head) / c.head**0.5
        scores = jnp.einsum("bkgd,bskd->bkgs", query, keys)
        seen = jnp.arange(c.length) <= position
        scores = jnp.where(jnp.broadcast_to(seen, scores.shape), scores, -jnp.inf)
        weights = nn.softmax(scores.astype(jnp.float32)).astype(c.dtype)
        y = jnp.einsum("bkgs,bskd->bkgd", weights, values).reshape(x.shape[0], -1)
        x = x + dense(c.width, "out")(y)
        y = nn.RMSNorm(dtype=c.dtype, name="mlp_norm")(x)
        y = nn.silu(dense(c.mlp, "gate")(y)) * dense(c.mlp, "up")(y)
        return x + dense(c.width, "down")(y), (keys, values)


class Decoder(nn.Module):
    """A decoder with tied embeddings, one token a call."""

    config: Config

    @nn.compact
    def __call__(
        self, tokens: jax.Array, cache: Cache, position: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Tokens [batch] at one position to logits [batch, vocab] and the cache with them in it."""
        c = self.config
        embed = nn.Embed(c.vocab, c.width, dtype=c.dtype, name="embed")
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.layers,
        )(c, name="blocks")
        x, (keys, values) = blocks(embed(tokens), (cache["keys"], cache["values"]), position)
        x = nn.RMSNorm(dtype=c.dtype, name="norm")(x)
        return embed.attend(x).astype(jnp.float32), {"keys": keys, "values": values}


def inputs(config: Config, batch: int) -> tuple[jax.ShapeDtypeStruct, Any, jax.ShapeDtypeStruct]:
    """Shapes of tokens, cache and position."""
    shape = jax.ShapeDtypeStruct
    stored = (config.layers, batch, config.length, config.kv_heads, config.head)
    cache = {name: shape(stored, config.dtype) for name in ("keys", "values")}
    return shape((batch,), jnp.int32), cache, shape((), jnp.int32)


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A contraction as the exported text has it: operand and result types such as `8x64xi8`."""

    primitive: str
    lhs: str
    rhs: str
    out: str

    @property
    def types(self) -> tuple[str, str, str]:
        """Element types of the operands and the result."""
        lhs, rhs, out = (t.rsplit("x", 1)[-1] for t in (self.lhs, self.rhs, self.out))
        return lhs, rhs, out


_CONTRACTION = re.compile(
    r"stablehlo\.(dot_general|convolution)\b[^\n]*"
    r": \(tensor<([^>]*)>, tensor<([^>]*)>\) -> tensor<([^>]*)>"
)


def contractions(text: str) -> collections.Counter[Contraction]:
    """The contractions in StableHLO text; what stands in a loop or a helper counts once."""
    found = [Contraction(*groups) for groups in _CONTRACTION.findall(text)]
    if len(found) != len(re.findall(r"stablehlo\.(?:dot|convolution)", text)):
        raise RuntimeError("some contractions of the exported text were not understood")
    return collections.Counter(found)


def aliased(text: str) -> int:
    """How many of the exported function's arguments are donated to a result."""
    head = text[text.index("func.func public @main") :].split("\n", 1)[0]
    return len(re.findall(r"tf\.aliasing_output|jax\.buffer_donor", head))


@dataclasses.dataclass(frozen=True)
class Result:
    """What was found of one exported decode step.

    Attributes:
      contractions: how often each stands in the text.
      aliased: donated arguments of the exported function.
      cache_bytes: size of the cache.
      float_bytes: size of the float weights.
      stored_bytes: size of the quantized weights, scales included.
      artifact_bytes: size of the serialized export, which holds no weights.
      reread: whether the artifact read back holds the same program.
      report: what became of each weight.
    """

    contractions: collections.Counter[Contraction]
    aliased: int
    cache_bytes: int
    float_bytes: int
    stored_bytes: int
    artifact_bytes: int
    reread: bool
    report: jq.report.Report


def lower(config: Config, recipe: jq.Recipe, platform: str, batch: int = 8) -> Result:
    """Quantizes random weights, exports the decode step for a platform, and reads the export."""
    model = Decoder(config)
    tokens, cache, position = args = inputs(config, batch)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), args)
    variables = jax.jit(model.init)(jax.random.key(0), *zeros)
    qvariables, report = jq.ptq(model.apply, variables, recipe, *args, platforms=[platform])

    # The cache is donated, so that a step writes one row of it and copies nothing.
    step = jax.jit(jq.quantized(model.apply), donate_argnums=2)
    exported = export.export(step, platforms=[platform])(qvariables, tokens, cache, position)
    text = exported.mlir_module()
    artifact = exported.serialize()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / f"decode.{platform}.stablehlo"
        path.write_bytes(artifact)
        reread = export.deserialize(bytearray(path.read_bytes()))
    return Result(
        contractions=contractions(text),
        aliased=aliased(text),
        cache_bytes=sum(s.size * s.dtype.itemsize for s in cache.values()),
        float_bytes=report.bytes_before,
        stored_bytes=report.bytes_after,
        artifact_bytes=len(artifact),
        reread=reread.mlir_module() == text and reread.in_tree == exported.in_tree,
        report=report,
    )


def table(result: Result, config: Config, title: str) -> Table:
    """The contractions of a decode step, integer operands in green."""
    found = Table(
        title=title,
        caption=f"The layers' stand in one loop of {config.layers}.",
        box=box.SIMPLE_HEAD,
        title_style="bold",
        caption_style="dim",
        padding=(0, 1, 0, 0),
    )
    found.add_column("contraction", style="dim", no_wrap=True)
    for header in ("left operand", "right operand", "result", "times"):
        found.add_column(header, justify="right", no_wrap=True)
    for c, count in result.contractions.items():
        colour = "green" if c.types[:2] == ("i8", "i8") else "default"
        operands = (f"[{colour}]{operand}" for operand in (c.lhs, c.rhs))
        found.add_row(c.primitive, *operands, c.out, str(count))
    return found


def main(argv: list[str] | None = None) -> Result:
    """Exports the decode step and prints what it is made of."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="w8a8", help="default: w8a8")
    parser.add_argument("--platform", choices=("tpu", "cuda", "cpu"), default="tpu")
    parser.add_argument("--quick", action="store_true", help="a small model")
    options = parser.parse_args(argv)
    config = QUICK if options.quick else Config()
    console = Console()
    if not console.is_terminal:  # a pipe has no width
        console = Console(width=80)
    with console.status("quantizing random weights and exporting"):
        result = lower(config, PRESETS[options.preset], options.platform)
    title = f"A decode step under {options.preset}, exported for {options.platform}"
    console.print(table(result, config, title))
    alias = "updated in place" if result.aliased == 2 else "[red]copied[/red]"
    reread = "holds the same program" if result.reread else "[red]DIFFERS[/red]"
    before, after = result.float_bytes, result.stored_bytes
    for line in (
        f"weights   {before / 1e6:.1f} MB in float32, {after / 1e6:.1f} MB stored"
        f" ({after / before:.3f})",
        f"KV cache  {result.cache_bytes / 1e6:.1f} MB, {alias} ({result.aliased} of 2 donated)",
        f"artifact  {result.artifact_bytes / 1e3:.1f} kB without weights; read back, it {reread}",
    ):
        console.print(line, highlight=False)
    for event in result.report.events:
        console.print(f"note: {event}", style="yellow", highlight=False)
    where = f"jaxquant {jq.__version__}, jax {jax.__version__}; lowered on {jax.default_backend()}"
    console.print(where, style="dim", highlight=False)
    return result


if __name__ == "__main__":
    sys.exit(0 if main().reread else 1)
