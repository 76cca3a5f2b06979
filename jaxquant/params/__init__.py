"""Params trees: quantize by a recipe, dequantize, split for training."""

from jaxquant.params.leaf import Encoded, encode_leaf
from jaxquant.params.placement import derive
from jaxquant.params.plan import Plan, identity, make_plans
from jaxquant.params.quantize import apply_recipe, check_finite, quantize_params
from jaxquant.params.trees import combine, dequantize_params, partition

__all__ = [
    "Encoded",
    "Plan",
    "apply_recipe",
    "check_finite",
    "combine",
    "dequantize_params",
    "derive",
    "encode_leaf",
    "identity",
    "make_plans",
    "partition",
    "quantize_params",
]
