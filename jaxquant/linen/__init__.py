"""The API for Flax Linen: the functions of `jaxquant`, with a model in place of the function.

`quantized` wraps a model for inference, `fake_quantized` for training; `interceptor` works in
place. All trace the model as a pure function of its variables and evaluate that, as
`jaxquant.quantized` does; the model is neither edited nor subclassed. Key paths begin with the
collection: `params/encoder/layer_0/kernel` (patterns match with or without `params/`).
"""

from jaxquant.linen.batchnorm import freeze_batchnorm
from jaxquant.linen.doors import capture, fold_batchnorm, ptq
from jaxquant.linen.intercept import interceptor
from jaxquant.linen.model import QuantizedModel, quantized
from jaxquant.linen.training import FakeQuantizedModel, convert, fake_quantized
from jaxquant.linen.variables import trainable, updated

__all__ = [
    "FakeQuantizedModel",
    "QuantizedModel",
    "capture",
    "convert",
    "fake_quantized",
    "fold_batchnorm",
    "freeze_batchnorm",
    "interceptor",
    "ptq",
    "quantized",
    "trainable",
    "updated",
]
