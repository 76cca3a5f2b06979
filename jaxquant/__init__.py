"""Quantization for JAX and Flax, as pure functions.

`quantized(fn)` computes `fn` with params whose leaves may be `QTensor`s; `ptq` makes such params
from float ones by a recipe. See the README for five-line examples.
"""

from jaxquant import linen, nnx, observers, optim, ste
from jaxquant.capture import Statistics, activation_report, capture
from jaxquant.encoders import clip, gptq, hqq, huffman_bits, kmeans, rtn, vectorwise
from jaxquant.fold import fold_batchnorm
from jaxquant.interpret import Site, Sites, quantized, trace
from jaxquant.numerics import BlockFormat, Format, codebook_format
from jaxquant.numerics.table import formats
from jaxquant.params import combine, dequantize_params, partition, quantize_params
from jaxquant.ptq import ptq
from jaxquant.qat import (
    QuantState,
    Schedule,
    convert,
    fake_quant_params,
    fake_quantized,
    init_quant_state,
)
from jaxquant.qtensor import Outliers, QTensor, dequantize, quantize
from jaxquant.recipe import (
    Recipe,
    Rule,
    fp4,
    fp8,
    int2,
    int3,
    int4,
    int5,
    int6,
    int7,
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
from jaxquant.report import ActivationReport, Edge, Event, LeafReport, Report, SiteReport
from jaxquant.rewrites import awq, smoothquant
from jaxquant.spec import Gradients, PerBlock, PerChannel, PerGroup, PerTensor, QSpec

__version__ = "0.1.0"

__all__ = [
    "ActivationReport",
    "BlockFormat",
    "Edge",
    "Event",
    "Format",
    "Gradients",
    "LeafReport",
    "Outliers",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "QSpec",
    "QTensor",
    "QuantState",
    "Recipe",
    "Report",
    "Rule",
    "Schedule",
    "Site",
    "SiteReport",
    "Sites",
    "Statistics",
    "activation_report",
    "awq",
    "capture",
    "clip",
    "codebook_format",
    "combine",
    "convert",
    "dequantize",
    "dequantize_params",
    "fake_quant_params",
    "fake_quantized",
    "fold_batchnorm",
    "formats",
    "fp4",
    "fp8",
    "gptq",
    "hqq",
    "huffman_bits",
    "init_quant_state",
    "int2",
    "int3",
    "int4",
    "int5",
    "int6",
    "int7",
    "int8",
    "int8_training",
    "kmeans",
    "linen",
    "llm_int8",
    "mxfp4",
    "nf4",
    "nnx",
    "nvfp4",
    "observers",
    "optim",
    "palette",
    "partition",
    "ptq",
    "quantize",
    "quantize_params",
    "quantized",
    "rtn",
    "smoothquant",
    "ste",
    "trace",
    "uint4",
    "uint8",
    "vectorwise",
    "w4a8",
    "w4a16",
    "w8a8",
    "w8a8_fp8",
    "w8a8_integer",
    "w8a8_static",
    "w8a16",
]
