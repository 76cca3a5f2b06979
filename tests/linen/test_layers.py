"""Linen's layers and transforms, quantized: close to float, on integers, alike by every door."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import linen
from tests.linen import models
from tests.linen.models import contractions, error, intercepted, normal

x, xs = normal(4, 32), normal(2, 5, 32)
image = normal(2, 8, 8, 16)
tokens = np.arange(8, dtype=np.int32).reshape(2, 4)


class Case(NamedTuple):
    """A model, its input, and how many contractions run on integers, and how many stay float."""

    model: nn.Module
    x: jax.Array
    ints: int = 1
    floats: int = 0


def conv(features: int, *window: int, **options: Any) -> Case:
    model = nn.Conv(features, window, **options)
    return Case(model, image if len(window) == 2 else xs)


CASES = {
    "Dense": Case(nn.Dense(48), x),
    "Dense, bfloat16": Case(
        nn.Dense(48, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
        np.asarray(x).astype(jnp.bfloat16),
    ),
    "DenseGeneral": Case(nn.DenseGeneral((4, 16)), xs),
    "DenseGeneral, two axes": Case(nn.DenseGeneral(24, axis=(-2, -1)), xs),
    "DenseGeneral, batch": Case(nn.DenseGeneral(24, batch_dims=(0,)), xs),
    "Conv": conv(24, 3, 3),
    "Conv, strided": conv(24, 3, 3, strides=2),
    "Conv, dilated": conv(24, 3, 3, kernel_dilation=2),
    "Conv, grouped": conv(32, 3, 3, feature_group_count=4),
    "Conv, depthwise": conv(16, 3, 3, feature_group_count=16),
    "Conv, causal 1D": conv(24, 3, padding="CAUSAL"),
    "ConvTranspose": Case(nn.ConvTranspose(24, (3, 3), strides=(2, 2)), image),
    "ConvTranspose, flipped": Case(
        nn.ConvTranspose(24, (3, 3), strides=(2, 2), transpose_kernel=True), image
    ),
    # patches are taken by a convolution with an identity
    "ConvLocal": Case(nn.ConvLocal(8, (3,)), xs, floats=1),
    "Embed": Case(nn.Embed(50, 32), tokens, ints=0),
    "Embed, tied": Case(models.Tied(), tokens),
    "Einsum": Case(nn.Einsum((32, 48), "bi,io->bo"), x),
    "attention": Case(nn.MultiHeadDotProductAttention(4), xs, ints=6),
    "LSTM": Case(nn.RNN(nn.LSTMCell(32)), xs, ints=8),
    "LSTM, fused": Case(nn.RNN(nn.OptimizedLSTMCell(32)), xs, ints=2),
    "GRU": Case(nn.RNN(nn.GRUCell(32)), xs, ints=6),
    "LSTM of convolutions": Case(nn.RNN(nn.ConvLSTMCell(8, (3, 3))), normal(2, 3, 8, 8, 16), 2),
    "Sequential": Case(nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(8)]), x, ints=2),
    "raw parameter": Case(models.Raw(), x),
    "left-hand weight": Case(models.LeftHand(), x),
    "same shapes": Case(models.Twins(), x, ints=3),
    "setup": Case(models.Setup(), x, ints=2),
    "scan of remat": Case(models.Scanned(), x, ints=2),
    "vmap": Case(models.Mapped(0), xs),
    "vmap, shared": Case(models.Mapped(None), xs),
    "Partitioned": Case(models.Boxed(), x, ints=2),
    "share_scope": Case(models.Shared(), x),
    "nn.jit inside": Case(models.Jitted(), x),
    "nn.jit outside": Case(nn.jit(nn.Dense)(48), x),
    "nn.jit method": Case(models.Decorated(), x),
    "nn.remat outside": Case(nn.remat(models.Setup)(), x, ints=2),
}


def noise(report: jq.report.Report) -> float:
    """The relative error that rounding the weights makes, if the leaves' errors are independent."""
    ratios = [10 ** (-leaf.sqnr_db / 10) for leaf in report.leaves if leaf.sqnr_db is not None]
    return math.sqrt(sum(ratios))


@functools.cache
def begun(name: str) -> tuple[Any, jax.Array]:
    """Variables of a case and its float result, by one program."""
    model, inputs, _, _ = CASES[name]

    @jax.jit
    def both(key: jax.Array, inputs: jax.Array) -> tuple[Any, jax.Array]:
        variables = model.init(key, inputs)
        return variables, model.apply(variables, inputs)

    return both(jax.random.key(0), inputs)


SLOW = ("LSTM", "LSTM of convolutions")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES]
)
def test_layer(name: str) -> None:
    model, inputs, ints, floats = CASES[name]
    variables, exact = begun(name)
    for recipe in (jq.w8a8(), jq.w4a16(group=32)):
        qvariables, report = jq.ptq(model.apply, variables, recipe, inputs)
        y = jax.jit(jq.quantized(model.apply))(qvariables, inputs)
        assert (y.shape, y.dtype) == (exact.shape, exact.dtype)
        # activations in 8 bits add about 0.007 for each layer
        assert error(y, exact) < (0.03 if recipe.name == "w8a8" else 2 * noise(report))

        doors = jq.quantized(model.apply), linen.quantized(model, recipe).apply, intercepted(model)
        texts = [lowered(door, qvariables, inputs) for door in doors]
        assert texts[0] == texts[1] == texts[2]  # one program: results are alike bit for bit
        if recipe.name == "w8a8":
            expected = [("i8", "i8")] * ints + [("f32", "f32")] * floats
            assert sorted(contractions(texts[0])) == sorted(expected)


def lowered(fn: Callable[..., Any], *args: Any) -> str:
    return jax.jit(lambda *a: fn(*a)).trace(*args).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("name", ["Embed, tied", "attention", "Partitioned"])
def test_float_variables_are_quantized_within(name: str) -> None:
    model, inputs, _, _ = CASES[name]
    variables, _ = begun(name)
    recipe = jq.w8a8()
    qvariables, _ = jq.ptq(model.apply, variables, recipe, inputs)
    stored = jax.jit(jq.quantized(model.apply))(qvariables, inputs)
    door = linen.quantized(model, recipe).apply
    assert error(jax.jit(door)(variables, inputs), stored) < 1e-5
    assert lowered(door, variables, inputs) == lowered(
        intercepted(model, recipe), variables, inputs
    )
    # a function that closes over its variables: codes are constants of the program
    closed = jax.jit(lambda inputs: intercepted(model, recipe)(variables, inputs))
    assert error(closed(inputs), stored) < 1e-5
