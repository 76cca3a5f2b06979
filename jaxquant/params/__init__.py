"""Params trees: quantized by a recipe, dequantized, split for training."""

from jaxquant.params.quantize import quantize_params
from jaxquant.params.trees import combine, dequantize_params, partition

__all__ = ["combine", "dequantize_params", "partition", "quantize_params"]
