"""Rewrites of parameters that leave the float function as it is: mathematics on arrays."""

from jaxquant.rewrites.batchnorm import BatchNormSite, Folded, fold, fold_site

__all__ = ["BatchNormSite", "Folded", "fold", "fold_site"]
