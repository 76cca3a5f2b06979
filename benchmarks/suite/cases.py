"""What is timed: layers, blocks and whole models, as ordinary Flax Linen code."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.suite import models
from benchmarks.suite.program import Program


@dataclasses.dataclass(frozen=True)
class Case:
    """Something to time.

    Attributes:
      name: `family/size/rows`.
      make: makes the program.
      formats: names of what it is timed in; `None` is all.
      quick: whether it takes part in a quick run.
    """

    name: str
    make: Callable[[], Program]
    formats: tuple[str, ...] | None = None
    quick: bool = False


def normal(seed: int, *shape: int) -> jax.Array:
    """Reproducible normal data."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def of_module(model: nn.Module, *args: Any) -> Program:
    """A module with random params; samples are other data of the arguments' shape."""
    variables = jax.jit(model.init)(jax.random.key(0), *args)
    samples = tuple((normal(n + 1, *args[0].shape), *args[1:]) for n in range(2))
    return Program(model, variables, args, samples)


def dense(size: int, layers: int, rows: int) -> Program:
    """Dense layers of `size x size`, with `relu` between."""
    program = of_module(models.MLP(size, layers), normal(0, rows, size))
    kernels = tuple(
        np.asarray(program.variables["params"][f"Dense_{n}"]["kernel"]) for n in range(layers)
    )
    return dataclasses.replace(program, dense=kernels)


def conv(image: tuple[int, ...], features: int, window: int, depthwise: bool = False) -> Program:
    """One convolution over images `[batch, height, width, channels]`."""
    groups = image[-1] if depthwise else 1
    model = nn.Conv(features, (window, window), feature_group_count=groups, use_bias=False)
    return of_module(model, normal(0, *image))


def block(time: int, cached: int, width: int = 1024, heads: int = 16) -> Program:
    """A transformer block: `time` tokens, after `cached` ones whose keys and values are given."""
    model = models.Block(heads)
    past = normal(7, 2, 1, cached, heads, width // heads) if cached else None
    return of_module(model, normal(0, 1, time, width), past)


def mobilenet(batch: int, size: int) -> Program:
    """Depthwise and pointwise convolutions as in MobileNet, without its norms."""
    return of_module(models.Separable(), normal(0, batch, size, size, 3))


CONVOLUTION = ("float32", "bfloat16", "w8a8", "w8a8 static", "w8a16", "w4a8", "integer", "qwix*")
MODEL = (
    "float32",
    "bfloat16",
    "w8a8",
    "w8a8 float attention",
    "w8a8 static",
    "w8a16",
    "w4a8",
    "w4a16",
    "nf4",
    "qwix*",
)


LAYER = (
    "float32", "bfloat16", "w8a8", "w8a8 static", "integer", "w8a16", "w4a8", "w4a16", "nf4",
    "kmeans4", "qwix*", "onnx*", "torch*",
)  # fmt: skip


def _cases() -> list[Case]:
    make = functools.partial
    found = [Case("dense/256/2", make(dense, 256, 1, 2), LAYER, quick=True)]
    for size in (2048, 4096):
        for rows in (1, 2, 4, 16, 64, 256, 512):
            found.append(Case(f"dense/{size}/{rows}", make(dense, size, 1, rows), LAYER))
    found.append(Case("mlp/128x4/8", make(dense, 128, 4, 8), LAYER, quick=True))
    for rows in (1, 16, 256):
        found.append(Case(f"mlp/2048x4/{rows}", make(dense, 2048, 4, rows), LAYER))
    small = make(block, 3, 5, 64, 4)
    found.append(Case("block/small", small, MODEL, quick=True))
    found.append(Case("block/decode", make(block, 1, 512), MODEL))
    found.append(Case("block/prefill", make(block, 512, 0), MODEL))
    for name, image, features, window, depthwise in (
        ("3x3/8x14x14x256", (8, 14, 14, 256), 256, 3, False),
        ("3x3/8x28x28x64", (8, 28, 28, 64), 64, 3, False),
        ("1x1/8x28x28x128", (8, 28, 28, 128), 128, 1, False),
        ("depthwise/8x28x28x128", (8, 28, 28, 128), 128, 3, True),
    ):
        found.append(
            Case(f"conv/{name}", make(conv, image, features, window, depthwise), CONVOLUTION)
        )
    found.append(Case("conv/small", make(conv, (1, 5, 5, 8), 8, 3), CONVOLUTION, quick=True))
    found.append(Case("mobilenet/8x112", make(mobilenet, 8, 112), CONVOLUTION))
    found.append(Case("mobilenet/small", make(mobilenet, 1, 32), CONVOLUTION, quick=True))
    for batch in (1, 32):
        found.append(Case(f"minilm/{batch}", make(models.minilm, batch), MODEL))
    found.append(Case("smollm2/decode", make(models.smollm2, 1, 512), MODEL))
    found.append(Case("smollm2/prefill", make(models.smollm2, 256, 0), MODEL))
    return found


def chosen(globs: str, quick: bool) -> list[Case]:
    """The cases that comma-separated globs match, of the quick ones or of the others.

    Raises:
      ValueError: a glob matches nothing.
    """
    known = [case for case in _cases() if case.quick == quick]
    wanted = [glob.strip() for glob in globs.split(",")]
    for glob in wanted:
        if not any(fnmatch.fnmatch(case.name, glob) for case in known):
            names = ", ".join(case.name for case in known)
            raise ValueError(f"no case matches {glob!r}; there are {names}")
    return [case for case in known if any(fnmatch.fnmatch(case.name, glob) for glob in wanted)]
