"""Quantization after training: encode weights, calibrate activations, keep results integers."""

from jaxquant.ptq.apply import ptq

__all__ = ["ptq"]
