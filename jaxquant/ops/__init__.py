"""Contractions and lookups with the signatures of `jax.lax`, whose operands may be quantized."""

from jaxquant.ops.activations import fake, quantize_activation
from jaxquant.ops.backward import constant
from jaxquant.ops.conv import conv_general_dilated
from jaxquant.ops.dot_general import dot_general
from jaxquant.ops.dynamic import dot_general_dynamic
from jaxquant.ops.ragged import ragged_dot_general
from jaxquant.ops.take import gather

__all__ = [
    "constant",
    "conv_general_dilated",
    "dot_general",
    "dot_general_dynamic",
    "fake",
    "gather",
    "quantize_activation",
    "ragged_dot_general",
]
