"""The function transform: trace a function once, evaluate it with quantized parameters."""

from jaxquant.interpret.record import trace
from jaxquant.interpret.serve import quantized
from jaxquant.interpret.sites import Site, Sites

__all__ = ["Site", "Sites", "quantized", "trace"]
