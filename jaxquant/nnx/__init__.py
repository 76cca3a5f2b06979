"""The API for Flax NNX: `ptq` quantizes a copy, `capture` observes, `fold_batchnorm` folds.

`fake_quantized` makes a copy for training, and `convert` a quantized model from that copy.
"""

from jaxquant.nnx.doors import capture, fold_batchnorm, ptq
from jaxquant.nnx.model import Quantized
from jaxquant.nnx.state import LearnedParam, QuantStat, QuantVariables
from jaxquant.nnx.training import FakeQuantized, convert, fake_quantized

__all__ = [
    "FakeQuantized",
    "LearnedParam",
    "QuantStat",
    "QuantVariables",
    "Quantized",
    "capture",
    "convert",
    "fake_quantized",
    "fold_batchnorm",
    "ptq",
]
