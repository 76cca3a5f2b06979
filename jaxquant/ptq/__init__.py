"""Post-training quantization: encode weights, calibrate activations, keep results integers."""

from jaxquant.ptq.apply import ptq
from jaxquant.ptq.state import PTQKeywords

__all__ = ["PTQKeywords", "ptq"]
