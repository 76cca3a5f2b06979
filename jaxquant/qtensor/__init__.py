"""The quantized array: a pytree of codes and scales, and how arrays become one and come back."""

from jaxquant.qtensor import export as _export  # noqa: F401 - registers QTensor with jax.export
from jaxquant.qtensor.calibration import Calibration, Folded, Grid, along
from jaxquant.qtensor.encode import (
    encode_array,
    encode_given,
    encode_measured,
    encode_products,
    encode_stacked,
    storage_layout,
)
from jaxquant.qtensor.nested import Nested, nest, read_back, with_plain_scales
from jaxquant.qtensor.outliers import Outliers
from jaxquant.qtensor.quantize import check_quantizable, dequantize, quantize
from jaxquant.qtensor.scales import (
    largest_magnitude,
    magnitude,
    scaled_codes,
    scales_of_range,
    scales_over,
    store_scale,
)
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
from jaxquant.qtensor.tensor import QTensor, Use, is_qtensor, with_use
from jaxquant.qtensor.trained import Trained, is_trained
from jaxquant.qtensor.written import read, written

__all__ = [
    "Calibration",
    "Folded",
    "Grid",
    "Nested",
    "Outliers",
    "QTensor",
    "Trained",
    "Use",
    "along",
    "blocked",
    "check_quantizable",
    "dequantize",
    "encode_array",
    "encode_given",
    "encode_measured",
    "encode_products",
    "encode_stacked",
    "from_storage",
    "is_qtensor",
    "is_trained",
    "largest_magnitude",
    "magnitude",
    "nest",
    "pad_to",
    "quantize",
    "read",
    "read_back",
    "scaled_codes",
    "scales_of_range",
    "scales_over",
    "spread",
    "storage_codes",
    "storage_layout",
    "storage_scale",
    "storage_values",
    "store_scale",
    "to_storage",
    "unblocked",
    "with_plain_scales",
    "with_use",
    "written",
]
