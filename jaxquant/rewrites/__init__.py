"""Rewrites of float params that do not change the function: SmoothQuant, AWQ, BatchNorm.

One file per method; `graph.py` and the files that read it find by tracing where factors can go.
"""

from jaxquant.rewrites.absorb import Absorbed, Absorber, scaled_leaf
from jaxquant.rewrites.awq import ActivationAware, awq
from jaxquant.rewrites.fold_batchnorm import BatchNormFold, FoldReport, fold_batchnorm
from jaxquant.rewrites.graph import Graph, graph_of
from jaxquant.rewrites.producers import absorbers
from jaxquant.rewrites.rescale import rescale
from jaxquant.rewrites.smoothquant import SmoothQuant, smoothquant

__all__ = [
    "Absorbed",
    "Absorber",
    "ActivationAware",
    "BatchNormFold",
    "FoldReport",
    "Graph",
    "SmoothQuant",
    "absorbers",
    "awq",
    "fold_batchnorm",
    "graph_of",
    "rescale",
    "scaled_leaf",
    "smoothquant",
]
