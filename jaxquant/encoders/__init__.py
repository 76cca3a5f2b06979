"""Encoders: values that turn one float array into a `QTensor` and say how well."""

from jaxquant.encoders.base import Encoder, Info, measure
from jaxquant.encoders.clip import Clip, clip
from jaxquant.encoders.clustering import kmeans_codebook
from jaxquant.encoders.gptq import GPTQ, gptq
from jaxquant.encoders.huffman import huffman_bits
from jaxquant.encoders.kmeans import KMeans, kmeans
from jaxquant.encoders.matrix import from_matrix, matrix_spec, to_matrix
from jaxquant.encoders.rtn import RoundToNearest, rtn

__all__ = [
    "GPTQ",
    "Clip",
    "Encoder",
    "Info",
    "KMeans",
    "RoundToNearest",
    "clip",
    "from_matrix",
    "gptq",
    "huffman_bits",
    "kmeans",
    "kmeans_codebook",
    "matrix_spec",
    "measure",
    "rtn",
    "to_matrix",
]
