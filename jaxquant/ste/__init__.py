"""Straight-through estimators, for training quantized arrays."""

from jaxquant.ste.base import Estimator, Moments
from jaxquant.ste.kmeans import KMeans, kmeans
from jaxquant.ste.lsq import LSQ, LSQPlus, lsq, lsq_plus
from jaxquant.ste.pact import PACT, pact
from jaxquant.ste.through import StraightThrough, straight_through

__all__ = [
    "LSQ",
    "PACT",
    "Estimator",
    "KMeans",
    "LSQPlus",
    "Moments",
    "StraightThrough",
    "kmeans",
    "lsq",
    "lsq_plus",
    "pact",
    "straight_through",
]
