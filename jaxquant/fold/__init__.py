"""BatchNorm folding: finds producers and BatchNorms by tracing, rewrites the params."""

from jaxquant.fold.batchnorm import BatchNormFold, fold_batchnorm

__all__ = ["BatchNormFold", "fold_batchnorm"]
