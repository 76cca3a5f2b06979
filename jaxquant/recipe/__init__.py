"""Recipes: rules over key paths that define what is quantized and how."""

from jaxquant.recipe.patterns import pattern_matches
from jaxquant.recipe.presets import (
    int8_training,
    llm_int8,
    w4a8,
    w4a16,
    w8a8,
    w8a8_fp8,
    w8a8_integer,
    w8a8_static,
    w8a16,
)
from jaxquant.recipe.recipe import Recipe, RecipeLike, as_recipe, attention_spec
from jaxquant.recipe.rewrite import Rewrite
from jaxquant.recipe.rules import Rule
from jaxquant.recipe.specs import (
    fp4,
    fp8,
    int2,
    int3,
    int4,
    int5,
    int6,
    int7,
    int8,
    mxfp4,
    nf4,
    nvfp4,
    palette,
    uint4,
    uint8,
)

__all__ = [
    "Recipe",
    "RecipeLike",
    "Rewrite",
    "Rule",
    "as_recipe",
    "attention_spec",
    "fp4",
    "fp8",
    "int2",
    "int3",
    "int4",
    "int5",
    "int6",
    "int7",
    "int8",
    "int8_training",
    "llm_int8",
    "mxfp4",
    "nf4",
    "nvfp4",
    "palette",
    "pattern_matches",
    "uint4",
    "uint8",
    "w4a8",
    "w4a16",
    "w8a8",
    "w8a8_fp8",
    "w8a8_integer",
    "w8a8_static",
    "w8a16",
]
