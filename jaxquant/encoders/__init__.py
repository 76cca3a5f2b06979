"""Encoders: values that turn one float array into a `QTensor` and say how well."""

from jaxquant.encoders.base import Encoder, Info, measure
from jaxquant.encoders.rtn import RoundToNearest, rtn

__all__ = ["Encoder", "Info", "RoundToNearest", "measure", "rtn"]
