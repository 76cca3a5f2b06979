"""Params trees: quantized by a recipe, dequantized, split for training."""

from jaxquant.params.plan import Plan, identity, make_plans
from jaxquant.params.quantize import (
    Encoded,
    Found,
    apply_recipe,
    check_finite,
    encode_leaf,
    quantize_params,
)
from jaxquant.params.trees import combine, dequantize_params, partition

__all__ = [
    "Encoded",
    "Found",
    "Plan",
    "apply_recipe",
    "check_finite",
    "combine",
    "dequantize_params",
    "encode_leaf",
    "identity",
    "make_plans",
    "partition",
    "quantize_params",
]
