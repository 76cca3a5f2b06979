"""BatchNorm folding: finds producers and BatchNorms by tracing, rewrites the params."""

from jaxquant.fold.batchnorm import BatchNormFold, FoldReport, fold_batchnorm

__all__ = ["BatchNormFold", "FoldReport", "fold_batchnorm"]
