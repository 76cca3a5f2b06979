"""Folding: what can go into other parameters is found by tracing, and the params rewritten."""

from jaxquant.fold.absorb import Absorbed, Absorber, scaled_leaf
from jaxquant.fold.batchnorm import BatchNormFold, FoldReport, fold_batchnorm
from jaxquant.fold.graph import Graph, graph_of
from jaxquant.fold.producers import absorbers
from jaxquant.fold.rescale import rescale

__all__ = [
    "Absorbed",
    "Absorber",
    "BatchNormFold",
    "FoldReport",
    "Graph",
    "absorbers",
    "fold_batchnorm",
    "graph_of",
    "rescale",
    "scaled_leaf",
]
