"""Functions to train, the rules to train them by, and both put together.

`Many` runs one function with several sets of params, each under a rule of its own: a table of rules
is then one program to compile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxquant as jq
from jaxquant import PerGroup, PerTensor, QSpec, ste
from tests.arrays import normal

LSQ = {"weight_estimator": ste.lsq(), "activation_estimator": ste.lsq()}
LEVELS = jq.numerics.codebook_format(range(-8, 8), name="sixteen")


def tensor(name: str, **more: Any) -> QSpec:
    return QSpec(name, PerTensor(), **more)


KINDS: dict[str, dict[str, Any]] = {
    "w8a8": {"weights": jq.int8(), "activations": jq.int8()},
    "per tensor": {"weights": tensor("int8"), "activations": tensor("int8")},
    "moving average": {
        "weights": jq.int8(),
        "activations": tensor("int8", symmetric=False),
        "observer": jq.observers.moving_average(),
    },
    "minmax": {
        "weights": jq.int4(),
        "activations": tensor("uint8", symmetric=False),
        "observer": jq.observers.minmax(),
    },
    "absmax": {
        "weights": tensor("int8", range="qmax"),
        "activations": tensor("int4"),
        "observer": jq.observers.absmax(),
    },
    "lsq 8": {"weights": jq.int8(), "activations": tensor("int8"), **LSQ},
    "lsq 4": {"weights": jq.int4(), "activations": tensor("int4"), **LSQ},
    "lsq 4 unsigned": {"weights": tensor("int4"), "activations": tensor("uint4"), **LSQ},
    "lsq 2": {"weights": jq.int2(), "activations": tensor("int2"), **LSQ},
    "lsq 2 unsigned": {"weights": jq.int2(), "activations": tensor("uint2"), **LSQ},
    "lsq weights": {
        "weights": jq.int4(group=24),
        "activations": jq.int8(),
        "weight_estimator": ste.lsq(),
    },
    "lsq+": {
        "weights": jq.int4(symmetric=False),
        "activations": tensor("uint4", symmetric=False),
        "weight_estimator": ste.lsq_plus(),
        "activation_estimator": ste.lsq_plus(),
    },
    "pact": {
        "weights": jq.int4(),
        "activations": tensor("uint4"),
        "weight_estimator": ste.pact(),
        "activation_estimator": ste.pact(),
    },
    "kmeans": {
        "weights": tensor(LEVELS),
        "activations": jq.int8(),
        "weight_estimator": ste.kmeans(),
        "lookup": tensor("int8"),
    },
    "kmeans again": {"weights": tensor(LEVELS), "weight_estimator": ste.kmeans(reassign=True)},
    "w4a8": {"weights": jq.int4(group=24), "activations": jq.int8(), "lookup": jq.int8()},
    "w4a16": {"weights": jq.int4(group=24), "lookup": jq.int8()},
    "nf4": {"weights": QSpec("nf4", PerGroup(24))},
    "mxfp4": {"weights": QSpec("mxfp4"), "activations": jq.int8()},
    "fp8": {"weights": QSpec("float8_e4m3fn"), "activations": QSpec("float8_e4m3fn")},
    "int8 gradients": {
        "weights": jq.int8(),
        "activations": jq.int8(),
        "gradients": jq.qtensor.Gradients(),
    },
}


def rule(kind: str, pattern: str = "**") -> jq.Rule:
    return jq.Rule(pattern, **KINDS[kind])


def on_integers(kind: str) -> bool:
    """Whether both operands are integers: sums are exact then."""
    specs = [KINDS[kind].get(name) for name in ("weights", "activations")]
    return all(spec is not None and spec.format.is_integer for spec in specs)


def weights(seed: int, *shape: int, fan: int, dtype: Any = jnp.float32) -> jax.Array:
    return (normal(seed, *shape) / np.sqrt(fan)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Program:
    """A function and what makes its params of a seed; `kinds` are the rules it is tried with."""

    fn: Callable[..., Any]
    params: Callable[[int], Any]
    args: tuple[Any, ...]
    kinds: tuple[str, ...] = ()
    attention: bool = False


class Many:
    """A program run once for each of its kinds, all in one function under one recipe."""

    def __init__(self, program: Program, kinds: tuple[str, ...] | None = None):
        self.kinds = program.kinds if kinds is None else kinds
        self.args = program.args
        self.params = {k: program.params(n) for n, k in enumerate(self.kinds)}
        rules = [rule(kind, f"{kind}/**") for kind in self.kinds]
        if program.attention:
            rules.append(jq.Rule("**", attention=jq.int8()))
        self.recipe = jq.Recipe(rules)
        self._fn = program.fn

    def fn(self, params: Mapping[str, Any], *args: Any) -> dict[str, Any]:
        return {kind: self._fn(params[kind], *args) for kind in self.kinds}

    def state(self) -> jq.qat.QuantState:
        """A state, made by one compiled program: op by op takes longer."""
        make = jax.jit(lambda p, args: jq.init_quant_state(self.fn, p, self.recipe, *args))
        return make(self.params, self.args)

    def served(self, state: jq.qat.QuantState) -> Any:
        """The params served, as `state` makes of that, by one compiled program."""
        return jax.jit(lambda p, state: jq.convert(p, state, self.recipe))(self.params, state)


D, H, L = 64, 32, 2  # groups of 24 leave a remainder


def mlp(p: Any, x: Any) -> Any:
    h = jax.nn.relu(x @ p["a"] + p["bias"][None])
    return h @ p["b"]


def mlp_params(n: int, dtype: Any = jnp.float32) -> Any:
    return {
        "a": weights(3 * n, D, H, fan=D, dtype=dtype),
        "bias": weights(3 * n + 1, H, fan=9, dtype=dtype),
        "b": weights(3 * n + 2, H, 8, fan=H, dtype=dtype),
    }


@jax.jit
def helper(x: Any, w: Any) -> Any:
    return jnp.tanh(x @ w)


def layers(p: Any, x: Any) -> Any:
    """Attention and a helper used twice, rematerialized, over stacked layers."""

    @jax.checkpoint
    def block(x: Any, w: Any) -> Any:
        q, k, v = jnp.moveaxis(jnp.einsum("td,dchk->tchk", x, w["qkv"]), 1, 0)
        scores = jax.nn.softmax(jnp.einsum("qhk,thk->hqt", q, k), -1)
        x = x + jnp.einsum("qhk,hkd->qd", jnp.einsum("hqt,thk->qhk", scores, v), w["out"])
        return x + helper(helper(x, w["up"]), w["down"]), None

    return lax.scan(block, x, p)[0]


def layers_params(n: int) -> Any:
    return {
        "qkv": weights(4 * n, L, 16, 3, 2, 8, fan=16),
        "out": weights(4 * n + 1, L, 2, 8, 16, fan=16),
        "up": weights(4 * n + 2, L, 16, 32, fan=16),
        "down": weights(4 * n + 3, L, 32, 16, fan=32),
    }


NHWC = ("NHWC", "HWIO", "NHWC")


def convolutions(p: Any, x: Any) -> Any:
    x = lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=NHWC)
    x = lax.conv_general_dilated(
        jax.nn.relu(x), p["depth"], (2, 2), "SAME", dimension_numbers=NHWC, feature_group_count=4
    )
    return x.mean((1, 2)) @ p["head"]


def convolutions_params(n: int) -> Any:
    return {
        "k": weights(3 * n, 3, 3, 2, 4, fan=18),
        "depth": weights(3 * n + 1, 3, 3, 1, 4, fan=9),
        "head": weights(3 * n + 2, 4, 3, fan=4),
    }


def tied(p: Any, tokens: Any) -> Any:
    return jnp.tanh(p["e"][tokens]) @ p["e"].T


def decode(p: Any, x: Any) -> Any:
    """Params as constants of one loop and as the carry of another."""
    x = lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["w"]), x)
    return lax.while_loop(
        lambda c: c[2] < 2, lambda c: (c[0], c[1] @ c[0], c[2] + 1), (p["v"], x, 0)
    )[1]


def axes(p: Any, x: Any) -> Any:
    """Several contracted axes, a weight on the left, a batch axis shared by both."""
    y = jnp.einsum("bhk,hkd->bd", x, p["w"])
    y = (p["left"].T @ y.T).T
    return jnp.einsum("ebd,edf->ebf", jnp.stack([y, -y]), p["experts"])


def axes_params(n: int) -> Any:
    return {
        "w": weights(3 * n, 4, 8, 12, fan=32),
        "left": weights(3 * n + 1, 12, 12, fan=12),
        "experts": weights(3 * n + 2, 2, 12, 6, fan=12),
    }


ELSEWHERE = (
    "per tensor",
    "minmax",
    "absmax",
    "lsq 8",
    "lsq 4",
    "kmeans",
    "nf4",
    "mxfp4",
    "fp8",
)

PROGRAMS = {
    "mlp": Program(
        mlp,
        mlp_params,
        (normal(90, 6, D),),
        tuple(k for k in KINDS if k not in ELSEWHERE),
    ),
    "bfloat16": Program(
        mlp,
        lambda n: mlp_params(n, jnp.bfloat16),
        (normal(90, 6, D, dtype=jnp.bfloat16),),
        ("w8a8", "lsq+", "fp8"),
    ),
    "layers": Program(
        layers,
        layers_params,
        (normal(91, 5, 16),),
        ("moving average", "lsq 4"),
        attention=True,
    ),
    "convolutions": Program(
        convolutions,
        convolutions_params,
        (normal(92, 2, 6, 6, 2),),
        ("w8a8", "minmax", "lsq+"),
    ),
    "tied": Program(
        tied,
        lambda n: {"e": weights(n, 20, 32, fan=32)},
        (jnp.array([[3, 1, 19], [0, 0, 7]]),),
        ("absmax", "lsq 8", "kmeans", "nf4"),
    ),
    "decode": Program(
        decode,
        lambda n: {"w": weights(2 * n, 16, 16, fan=16), "v": weights(2 * n + 1, 16, 16, fan=16)},
        (normal(93, 3, 16),),
        ("per tensor", "moving average", "lsq 4"),
    ),
    "axes": Program(
        axes,
        axes_params,
        (normal(94, 5, 4, 8),),
        ("lsq 4 unsigned", "lsq weights", "mxfp4"),
    ),
}
