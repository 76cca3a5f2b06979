"""Recipes for common schemes, named by the bits of weights (w) and activations (a).

Each is one rule for every parameter that a contraction or a lookup uses. In 4-bit schemes, lookup
tables (embeddings) stay at 8 bits: they cost no multiplication, and are read row by row.
"""

from __future__ import annotations

import dataclasses

from jaxquant.encoders import vectorwise
from jaxquant.observers import Observer, absmax, mse
from jaxquant.qtensor import Gradients, Outliers, PerChannel, PerTensor
from jaxquant.recipe.recipe import Recipe
from jaxquant.recipe.rules import Requantize, Rule
from jaxquant.recipe.specs import fp8, int4, int8


def w8a8(*, attention: bool = True) -> Recipe:
    """Weights int8 per channel, activations int8 per row, integer contractions.

    Args:
      attention: quantize attention scores and attention times values to int8 as well.

    >>> import jaxquant as jq
    >>> jq.w8a8().rules[0].weights
    QSpec(int8, PerChannel(axes=None))
    """
    spec = int8() if attention else None
    return Recipe([Rule("**", weights=int8(), activations=int8(), attention=spec)], "w8a8")


def w8a8_static(
    observer: Observer | None = None,
    *,
    per_channel: bool = False,
    symmetric: bool = False,
    attention: bool = False,
) -> Recipe:
    """As `w8a8`, with static activation scales and zero points from calibration.

    Args:
      observer: finds the ranges; by default `jaxquant.observers.mse()`, per channel `absmax`.
      per_channel: one scale for each feature of an activation, folded into the weights, with zero
        points 0. For models with outlier features; dense layers only.
      symmetric: whether zero points are 0, which costs a bit where values are never negative.
      attention: quantize attention scores and values too, with their own scales.

    >>> import jaxquant as jq
    >>> jq.w8a8_static().rules[0].activations
    QSpec(int8, PerTensor(), symmetric=False)
    """
    rule = _static(None if per_channel else observer, symmetric)
    per_tensor = rule.activations
    if per_channel:
        observer = absmax(axis=-1) if observer is None else observer
        spec = int8(granularity=PerChannel(-1))
        rule = dataclasses.replace(rule, activations=spec, observer=observer)
    both = [Rule("**", attention=per_tensor, observer=mse())] if attention else []
    return Recipe([rule, *both], "w8a8_static")


def w8a8_integer(
    observer: Observer | None = None,
    *,
    requantize: Requantize = "float32",
    symmetric: bool = False,
) -> Recipe:
    """As `w8a8_static`, with integer results between layers where possible.

    Args:
      observer: finds the ranges, by default `jaxquant.observers.mse()`.
      requantize: how int32 sums become the next layer's int8: `"float32"`, or `"fixed_point"` by
        an int32 multiplier and a rounding shift.
      symmetric: whether zero points are 0, which costs a bit where values are never negative.

    >>> import jaxquant as jq
    >>> jq.w8a8_integer(requantize="fixed_point").rules[0].requantize
    'fixed_point'
    """
    rule = dataclasses.replace(_static(observer, symmetric), requantize=requantize)
    return Recipe([rule], "w8a8_integer")


def _static(observer: Observer | None, symmetric: bool) -> Rule:
    spec = int8(symmetric=symmetric, granularity=PerTensor())
    return Rule(
        "**", weights=int8(), activations=spec, observer=mse() if observer is None else observer
    )


def w8a16() -> Recipe:
    """Weights int8 per channel, activations in float.

    >>> import jaxquant as jq
    >>> jq.w8a16().rules[0].activations is None
    True
    """
    return Recipe([Rule("**", weights=int8())], "w8a16")


def w4a16(group: int = 128) -> Recipe:
    """Weights int4 in groups along the contracted axes, tables int8, activations in float.

    >>> import jaxquant as jq
    >>> jq.w4a16(group=64).rules[0].weights
    QSpec(int4, PerGroup(size=64, axis=None))
    """
    return Recipe([Rule("**", weights=int4(group=group), lookup=int8())], "w4a16")


def w4a8(group: int = 128, *, attention: bool = False) -> Recipe:
    """Weights int4 in groups, tables int8, activations int8 per row.

    Args:
      group: how many values along the contracted axes share a scale.
      attention: quantize attention scores and attention times values to int8 as well.

    >>> import jaxquant as jq
    >>> jq.w4a8().rules[0].activations
    QSpec(int8, PerChannel(axes=None))
    """
    rule = Rule(
        "**",
        weights=int4(group=group),
        activations=int8(),
        attention=int8() if attention else None,
        lookup=int8(),
    )
    return Recipe([rule], "w4a8")


def llm_int8(
    threshold: float = 6.0, capacity: int | float = 64, *, calibrated: bool = False
) -> Recipe:
    """Weights int8 per channel, activations int8 per row except outlier columns, kept in float.

    Args:
      threshold: the smallest magnitude of an outlier.
      capacity: the maximum number of columns, see `Outliers`.
      calibrated: take the columns from calibration samples instead of at run time.

    Source: Dettmers et al., "LLM.int8()" (2022).

    >>> import jaxquant as jq
    >>> jq.llm_int8(capacity=32).rules[0].outliers
    Outliers(threshold=6.0, capacity=32, calibrated=False)
    """
    outliers, spec = Outliers(threshold, capacity, calibrated), int8(range="qmax")
    encoder = vectorwise(outliers)
    rule = Rule("**", weights=spec, activations=spec, encoder=encoder, outliers=outliers)
    return Recipe([rule], "llm_int8")


def w8a8_fp8() -> Recipe:
    """Weights and activations float8 e4m3fn, one scale per channel and per row.

    >>> import jaxquant as jq
    >>> jq.w8a8_fp8().rules[0].weights.format.name
    'float8_e4m3fn'
    """
    return Recipe([Rule("**", weights=fp8(), activations=fp8())], "w8a8_fp8")


def int8_training(gradients: Gradients | None = None, *, attention: bool = False) -> Recipe:
    """As `w8a8`, for training with `fake_quantized`: all three contractions of a layer in int8.

    Args:
      gradients: how gradients are quantized, by default int8 with stochastic rounding for both.
        Backward contractions use integers where weights are integers per channel or per tensor;
        groups, codebooks and convolutions take dequantized gradients in float.
      attention: quantize attention scores and attention times values to int8 as well; their
        gradients are float.

    >>> import jaxquant as jq
    >>> jq.int8_training().rules[0].gradients.stochastic
    True
    """
    rule = Rule(
        "**",
        weights=int8(),
        activations=int8(),
        attention=int8() if attention else None,
        gradients=Gradients() if gradients is None else gradients,
    )
    return Recipe([rule], "int8_training")
