"""The door for Flax NNX: `ptq` quantizes a copy, `capture` observes, `fold_batchnorm` folds."""

from jaxquant.nnx.doors import capture, fold_batchnorm, ptq
from jaxquant.nnx.model import Quantized

__all__ = ["Quantized", "capture", "fold_batchnorm", "ptq"]
