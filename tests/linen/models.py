"""Linen models as users write them, none of which knows of quantization."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import linen
from jaxquant.recipe import Recipe
from tests.lowered import inlined

lecun = nn.initializers.lecun_normal()


class Raw(nn.Module):
    """A raw parameter in an einsum."""

    @nn.compact
    def __call__(self, x):
        return jnp.einsum("bi,io->bo", x, self.param("w", lecun, (32, 48)))


class LeftHand(nn.Module):
    """A weight on the left-hand side."""

    @nn.compact
    def __call__(self, x):
        return self.param("w", lecun, (48, 32)) @ x.T


class Twins(nn.Module):
    """Two parameters of one shape, and one used on both sides of it."""

    @nn.compact
    def __call__(self, x):
        a, b = (self.param(name, lecun, (32, 32)) for name in "ab")
        return jnp.tanh(x @ a) @ b + x @ a.T


class Tied(nn.Module):
    """A table looked up at the start and contracted at the end."""

    def setup(self):
        self.embed = nn.Embed(50, 32)

    def __call__(self, tokens):
        return self.embed.attend(jnp.tanh(self.embed(tokens)))


class Setup(nn.Module):
    """Submodules and a raw parameter made in `setup`, several methods, dropout."""

    def setup(self):
        self.w = self.param("w", lecun, (32, 48))
        self.head = nn.Dense(16)
        self.drop = nn.Dropout(0.5)

    def __call__(self, x, train=False):
        return self.head(self.drop(self.encode(x), deterministic=not train))

    def encode(self, x):
        return jnp.tanh(x @ self.w)

    def double(self, x):
        return 2 * x

    def facts(self):
        return "setup", 3


class Block(nn.Module):
    width: int = 32

    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(self.width)(nn.tanh(nn.Dense(64)(x))), None


class Scanned(nn.Module):
    """`nn.scan` over `nn.remat` blocks."""

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False)
        layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers()(x, None)[0]


class Mapped(nn.Module):
    """`nn.vmap`, with weights of their own or shared."""

    axis: int | None

    @nn.compact
    def __call__(self, x):
        dense = nn.vmap(
            nn.Dense,
            variable_axes={"params": self.axis},
            split_rngs={"params": self.axis is not None},
            in_axes=1,
            out_axes=1,
        )
        return dense(48)(x)


class Boxed(nn.Module):
    """Partitioning metadata around parameters, also of scanned layers."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                init = nn.with_partitioning(lecun, (None, "model"))
                return jnp.tanh(nn.Dense(32, kernel_init=init)(x)), None

        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers()(x, None)
        return nn.Dense(16, kernel_init=nn.with_partitioning(lecun, ("model", None)))(x)


class Shared(nn.Module):
    """`nn.share_scope`: the inner module's parameters are the outer one's."""

    def setup(self):
        self.inner = Raw()
        nn.share_scope(self, self.inner)

    def __call__(self, x):
        return self.inner(x)


class Jitted(nn.Module):
    """`nn.jit` of a submodule."""

    @nn.compact
    def __call__(self, x):
        return nn.jit(nn.Dense)(48)(x)


class Decorated(nn.Module):
    """`nn.jit` of the outermost method."""

    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.Dense(48)(x)


class Stateful(nn.Module):
    """BatchNorm, dropout and a sown value."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(64)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        self.sow("intermediates", "hidden", x)
        return nn.Dense(16)(x)


@jax.jit
def project(x, w):
    """A jitted helper, as many models call."""
    return jnp.einsum("btd,df->btf", x, w)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, deterministic=True)(h, mask=mask)
        h = nn.LayerNorm()(x)
        gate = jnp.einsum("btd,df->btf", h, self.param("gate", lecun, (32, 64)))
        up = project(h, self.param("up", lecun, (32, 64)))
        return x + nn.Dense(32, name="down")(nn.silu(gate) * up), None


class Transformer(nn.Module):
    """Scan, remat, attention, a raw einsum parameter, a jitted helper, a tied table."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(48, 32, name="embed")
        mask = nn.make_causal_mask(tokens)
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=2,
        )
        x, _ = layers(name="layers")(embed(tokens), mask)
        x = project(nn.LayerNorm()(x), self.param("last", lecun, (32, 32)))
        return embed.attend(nn.LayerNorm()(x))


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def intercepted(model: nn.Module, recipe: Recipe | None = None) -> Callable[..., Any]:
    """`model.apply` under the interceptor."""

    def apply(variables: Any, *args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(linen.interceptor(recipe)):
            return model.apply(variables, *args, **kwargs)

    return apply


def error(y: Any, exact: Any) -> float:
    """`|y - exact| / |exact|`."""
    y, exact = (np.asarray(a, np.float32) for a in (y, exact))
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))


def same(a: Any, b: Any) -> bool:
    """Whether two trees have one structure and bit for bit the same leaves."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


_CONTRACTION = re.compile(
    r"stablehlo\.(?:dot_general|convolution)\b.*: \(tensor<([^>]*)>, tensor<([^>]*)>\)"
)


def contractions(text: str) -> list[tuple[str, str]]:
    """The operands' element types of every contraction of a lowered program, as often as called."""
    text = inlined(text)
    found = [m.groups() for m in map(_CONTRACTION.search, text.splitlines()) if m]
    assert len(found) == len(re.findall(r"stablehlo\.(?:dot_general|convolution)\b", text))
    return [(lhs.split("x")[-1], rhs.split("x")[-1]) for lhs, rhs in found]
