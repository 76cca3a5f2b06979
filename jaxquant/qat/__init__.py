"""Quantization-aware training: float params, rounded in each step as they will be served."""

from jaxquant.qat.convert import convert
from jaxquant.qat.fake import fake_quantized
from jaxquant.qat.init import init_quant_state
from jaxquant.qat.params import fake_quant_params
from jaxquant.qat.schedule import Schedule
from jaxquant.qat.state import QuantState

__all__ = [
    "QuantState",
    "Schedule",
    "convert",
    "fake_quant_params",
    "fake_quantized",
    "init_quant_state",
]
