"""Recipes for the usual schemes, named by the bits of weights (w) and activations (a).

Each is one rule for every parameter that takes part in a contraction or a lookup. In the schemes
of 4 bits a table that rows are looked up in is kept at 8: it costs no multiplication, and is read
row by row.
"""

from __future__ import annotations

from jaxquant.recipe.rules import Recipe, Rule
from jaxquant.recipe.specs import int4, int8
from jaxquant.spec import PerGroup, QSpec


def w8a8(*, attention: bool = True) -> Recipe:
    """Weights int8 per channel, activations int8 per row, contractions on integers.

    Args:
      attention: quantize attention scores and attention times values to int8 as well.

    >>> import jaxquant as jq
    >>> jq.w8a8().rules[0].weights
    QSpec(int8, PerChannel(axes=None))
    """
    spec = int8() if attention else None
    return Recipe([Rule("**", weights=int8(), activations=int8(), attention=spec)], "w8a8")


def w8a16() -> Recipe:
    """Weights int8 per channel, activations as they are.

    >>> import jaxquant as jq
    >>> jq.w8a16().rules[0].activations is None
    True
    """
    return Recipe([Rule("**", weights=int8())], "w8a16")


def w4a16(group: int = 128) -> Recipe:
    """Weights int4 in groups along the contracted axes, tables int8, activations as they are.

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


def nf4(group: int = 64) -> Recipe:
    """Weights in the 4-bit normal-float codebook of QLoRA, in groups; tables int8.

    Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023), section 3.

    >>> import jaxquant as jq
    >>> jq.nf4().rules[0].weights.format.name
    'nf4'
    """
    return Recipe([Rule("**", weights=QSpec("nf4", PerGroup(group)), lookup=int8())], "nf4")


def fp8() -> Recipe:
    """Weights and activations float8 e4m3fn, one scale per channel and per row.

    >>> import jaxquant as jq
    >>> jq.fp8().rules[0].weights.format.name
    'float8_e4m3fn'
    """
    spec = QSpec("float8_e4m3fn")
    return Recipe([Rule("**", weights=spec, activations=spec)], "fp8")


def mxfp4() -> Recipe:
    """Weights in OCP's MXFP4: float4 e2m1 with a power-of-two scale per 32; tables int8.

    >>> import jaxquant as jq
    >>> jq.mxfp4().rules[0].weights
    QSpec(float4_e2m1fn, PerGroup(size=32, axis=None), scale_dtype='float8_e8m0fnu')
    """
    return Recipe([Rule("**", weights=QSpec("mxfp4"), lookup=int8())], "mxfp4")
