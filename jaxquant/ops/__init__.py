"""Contractions and lookups with the signatures of `jax.lax`, whose operands may be quantized."""

from jaxquant.ops.activations import (
    fake,
    fake_on_grid,
    grid_of,
    on_grid,
    own_zero_point,
    quantize_activation,
)
from jaxquant.ops.backward import constant, inference_only
from jaxquant.ops.conv import conv_general_dilated
from jaxquant.ops.convolve import conv_of
from jaxquant.ops.dot_general import dot_general, over_divisor
from jaxquant.ops.dynamic import dot_general_dynamic
from jaxquant.ops.integer.fused import conv_integer, dot_integer, folded
from jaxquant.ops.integer.static import with_fine_scales, zero_offset
from jaxquant.ops.integer.values import Accumulator, Activation, Integers, added, is_integers
from jaxquant.ops.pallas.dot_packed import dot_general_packed
from jaxquant.ops.ragged import ragged_dot_general
from jaxquant.ops.take import gather
from jaxquant.ops.training import dot_trained, with_gradients_of, with_rounded_gradient
from jaxquant.ops.unfold import unfold

__all__ = [
    "Accumulator",
    "Activation",
    "Integers",
    "added",
    "constant",
    "conv_general_dilated",
    "conv_integer",
    "conv_of",
    "dot_general",
    "dot_general_dynamic",
    "dot_general_packed",
    "dot_integer",
    "dot_trained",
    "fake",
    "fake_on_grid",
    "folded",
    "gather",
    "grid_of",
    "inference_only",
    "is_integers",
    "on_grid",
    "over_divisor",
    "own_zero_point",
    "quantize_activation",
    "ragged_dot_general",
    "unfold",
    "with_fine_scales",
    "with_gradients_of",
    "with_rounded_gradient",
    "zero_offset",
]
