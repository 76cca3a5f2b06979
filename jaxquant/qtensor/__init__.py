"""The quantized array, a pytree of codes and scales, and `QSpec`: how an array is quantized."""

from jaxquant.qtensor import export as _export  # noqa: F401 - registers QTensor with jax.export
from jaxquant.qtensor.calibration import Calibration, Folded, QuantParams, along
from jaxquant.qtensor.encode import (
    encode_array,
    encode_given,
    encode_measured,
    encode_products,
    encode_stacked,
    storage_layout,
)
from jaxquant.qtensor.gradients import Gradients
from jaxquant.qtensor.granularity import (
    Blocks,
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
)
from jaxquant.qtensor.nested import Nested, nest, read_back, with_plain_scales
from jaxquant.qtensor.outliers import Outliers
from jaxquant.qtensor.qspec import QSpec, Range
from jaxquant.qtensor.quantize import check_quantizable, dequantize, quantize
from jaxquant.qtensor.scales import (
    largest_magnitude,
    magnitude,
    scaled_codes,
    scales_of_range,
    scales_over,
    store_scale,
)
from jaxquant.qtensor.serialize import deserialize, serialize
from jaxquant.qtensor.storage import (
    blocked,
    from_storage,
    pad_to,
    spread,
    storage_codes,
    storage_scale,
    storage_values,
    to_storage,
    unblocked,
)
from jaxquant.qtensor.tensor import ContractionConfig, QTensor, is_qtensor, with_contraction
from jaxquant.qtensor.trained import FakeQuantTensor, is_fake_quant

__all__ = [
    "Blocks",
    "Calibration",
    "ContractionConfig",
    "FakeQuantTensor",
    "Folded",
    "Gradients",
    "Granularity",
    "Nested",
    "Outliers",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "QSpec",
    "QTensor",
    "QuantParams",
    "Range",
    "along",
    "blocked",
    "check_quantizable",
    "dequantize",
    "deserialize",
    "encode_array",
    "encode_given",
    "encode_measured",
    "encode_products",
    "encode_stacked",
    "from_storage",
    "is_fake_quant",
    "is_qtensor",
    "largest_magnitude",
    "magnitude",
    "nest",
    "pad_to",
    "quantize",
    "read_back",
    "scaled_codes",
    "scales_of_range",
    "scales_over",
    "serialize",
    "spread",
    "storage_codes",
    "storage_layout",
    "storage_scale",
    "storage_values",
    "store_scale",
    "to_storage",
    "unblocked",
    "with_contraction",
    "with_plain_scales",
]
