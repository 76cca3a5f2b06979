"""How one array is quantized: a format, a granularity, and how the range becomes a scale."""

from jaxquant.spec.gradients import Gradients
from jaxquant.spec.granularity import (
    Blocks,
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
)
from jaxquant.spec.qspec import QSpec, Range

__all__ = [
    "Blocks",
    "Gradients",
    "Granularity",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "QSpec",
    "Range",
]
