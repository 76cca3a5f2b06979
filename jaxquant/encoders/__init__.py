"""Encoders: hashable values that turn one float array into a `QTensor` and measure its error."""

from jaxquant.encoders.base import Encoder, Info, measure
from jaxquant.encoders.clip import Clip, clip
from jaxquant.encoders.clustering import kmeans_codebook
from jaxquant.encoders.gptq import GPTQ, gptq
from jaxquant.encoders.hqq import HQQ, hqq
from jaxquant.encoders.huffman import huffman_bits
from jaxquant.encoders.kmeans import KMeans, kmeans
from jaxquant.encoders.matrix import from_matrix, matrix_spec, to_matrix
from jaxquant.encoders.rtn import RoundToNearest, rtn
from jaxquant.encoders.vectorwise import Vectorwise, outlier_columns, vectorwise

__all__ = [
    "GPTQ",
    "HQQ",
    "Clip",
    "Encoder",
    "Info",
    "KMeans",
    "RoundToNearest",
    "Vectorwise",
    "clip",
    "from_matrix",
    "gptq",
    "hqq",
    "huffman_bits",
    "kmeans",
    "kmeans_codebook",
    "matrix_spec",
    "measure",
    "outlier_columns",
    "rtn",
    "to_matrix",
    "vectorwise",
]
