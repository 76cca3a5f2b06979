"""Rewrites of parameters that leave the float function as it is: mathematics on arrays."""

from jaxquant.rewrites.awq import ActivationAware, awq
from jaxquant.rewrites.batchnorm import BatchNormSite, Folded, fold, fold_site
from jaxquant.rewrites.scaling import Rewrite
from jaxquant.rewrites.smooth import SmoothQuant, smoothquant

__all__ = [
    "ActivationAware",
    "BatchNormSite",
    "Folded",
    "Rewrite",
    "SmoothQuant",
    "awq",
    "fold",
    "fold_site",
    "smoothquant",
]
