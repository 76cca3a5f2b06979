"""The doors for Flax Linen: `quantized` wraps a model, `interceptor` works in place.

Both trace the model as a pure function of its variables and evaluate that, as `jaxquant.quantized`
does; the model itself is neither edited nor subclassed. `fake_quantized` wraps a model for
training in the same way. Key paths begin with the collection: `params/encoder/layer_0/kernel`
(patterns match with or without `params/`).
"""

from jaxquant.linen.batchnorm import freeze_batchnorm
from jaxquant.linen.intercept import interceptor
from jaxquant.linen.model import QuantizedModel, quantized
from jaxquant.linen.training import FakeQuantizedModel, fake_quantized
from jaxquant.linen.variables import trainable, updated

__all__ = [
    "FakeQuantizedModel",
    "QuantizedModel",
    "fake_quantized",
    "freeze_batchnorm",
    "interceptor",
    "quantized",
    "trainable",
    "updated",
]
