"""The doors for Flax Linen: those of functions, with a model in place of the function.

`quantized` and `fake_quantized` wrap a model; `interceptor` works in place.
Both trace the model as a pure function of its variables and evaluate that, as `jaxquant.quantized`
does; the model itself is neither edited nor subclassed. `fake_quantized` wraps a model for
training in the same way. Key paths begin with the collection: `params/encoder/layer_0/kernel`
(patterns match with or without `params/`).
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
