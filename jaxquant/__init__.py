"""jaxquant: quantization for JAX and Flax, as pure functions."""
from jaxquant.interpret import Site, Sites, quantized, trace
from jaxquant.numerics import formats
from jaxquant.qtensor import QTensor, dequantize, quantize
from jaxquant.recipe import *
from jaxquant.recipe import Recipe, Rule
from jaxquant.spec import PerBlock, PerChannel, PerGroup, PerTensor, QSpec
