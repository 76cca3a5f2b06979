"""The doors for Flax Linen: `quantized` wraps a model, `interceptor` works in place.

Both trace the model as a pure function of its variables and evaluate that, as `jaxquant.quantized`
does; the model itself is neither edited nor subclassed. Key paths begin with the collection:
`params/encoder/layer_0/kernel` (patterns match with or without `params/`).
"""

from jaxquant.linen.intercept import interceptor
from jaxquant.linen.model import QuantizedModel, quantized

__all__ = ["QuantizedModel", "interceptor", "quantized"]
