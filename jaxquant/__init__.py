"""Quantization for JAX and Flax, as pure functions.

`quantized(fn)` computes `fn` with params whose leaves may be `QTensor`s; `ptq` makes such params
from float ones by a recipe. See the README for five-line examples. Here are the names of a first
week; the rest is in `jaxquant.encoders`, `.interpret`, `.numerics`, `.observers`, `.optim`, `.qat`,
`.qtensor`, `.recipe`, `.report` and `.ste`.
"""

from jaxquant import encoders, linen, nnx, numerics, observers, optim, ste
from jaxquant.capture import Statistics, activation_report, capture
from jaxquant.encoders import gptq, hqq, kmeans
from jaxquant.interpret import quantized, trace
from jaxquant.numerics.table import formats
from jaxquant.params import combine, dequantize_params, partition, quantize_params
from jaxquant.ptq import ptq
from jaxquant.qat import Schedule, convert, fake_quantized, init_quant_state
from jaxquant.qtensor import (
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    QSpec,
    QTensor,
    dequantize,
    quantize,
)
from jaxquant.recipe import (
    Recipe,
    Rule,
    fp4,
    fp8,
    int2,
    int3,
    int4,
    int8,
    int8_training,
    llm_int8,
    mxfp4,
    nf4,
    nvfp4,
    palette,
    uint4,
    uint8,
    w4a8,
    w4a16,
    w8a8,
    w8a8_fp8,
    w8a8_integer,
    w8a8_static,
    w8a16,
)
from jaxquant.rewrites import awq, fold_batchnorm, smoothquant

__version__ = "0.1.0"

__all__ = [
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "QSpec",
    "QTensor",
    "Recipe",
    "Rule",
    "Schedule",
    "Statistics",
    "activation_report",
    "awq",
    "capture",
    "combine",
    "convert",
    "dequantize",
    "dequantize_params",
    "encoders",
    "fake_quantized",
    "fold_batchnorm",
    "formats",
    "fp4",
    "fp8",
    "gptq",
    "hqq",
    "init_quant_state",
    "int2",
    "int3",
    "int4",
    "int8",
    "int8_training",
    "kmeans",
    "linen",
    "llm_int8",
    "mxfp4",
    "nf4",
    "nnx",
    "numerics",
    "nvfp4",
    "observers",
    "optim",
    "palette",
    "partition",
    "ptq",
    "quantize",
    "quantize_params",
    "quantized",
    "smoothquant",
    "ste",
    "trace",
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
