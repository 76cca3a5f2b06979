"""Serialization of the `QTensor` pytree structure in `jax.export` artifacts."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import jax.export

from jaxquant.numerics import Format
from jaxquant.qtensor.calibration import Calibration, Folded, QuantParams
from jaxquant.qtensor.granularity import PerBlock, PerChannel, PerGroup, PerTensor
from jaxquant.qtensor.nested import Nested
from jaxquant.qtensor.outliers import Outliers
from jaxquant.qtensor.qspec import QSpec
from jaxquant.qtensor.tensor import ContractionConfig, QTensor

# Artifacts contain the pytree structure of arguments. Static data are written as JSON: reading an
# artifact must run no code, as unpickling would.
_STATIC = {
    c.__name__: c
    for c in (Format, PerTensor, PerChannel, PerGroup, PerBlock, QSpec, ContractionConfig, Outliers)
}


def static_to_json(x: Any) -> Any:
    """Static data of a `QTensor` as JSON values."""
    if isinstance(x, tuple):
        return [static_to_json(item) for item in x]
    if isinstance(x, re.Pattern):
        return {"regex": x.pattern, "flags": x.flags}
    if type(x) in _STATIC.values():
        fields = {f.name: static_to_json(getattr(x, f.name)) for f in dataclasses.fields(x)}
        return {"type": type(x).__name__, **fields}
    return x


def static_from_json(x: Any) -> Any:
    """Inverse of `static_to_json`."""
    if isinstance(x, list):
        return tuple(static_from_json(item) for item in x)
    if isinstance(x, dict):
        if "regex" in x:
            return re.compile(x["regex"], x["flags"])
        fields = {name: static_from_json(value) for name, value in x.items() if name != "type"}
        return _STATIC[x["type"]](**fields)
    return x


NODES: dict[str, Any] = {c.__name__: c for c in (QTensor, Calibration, Folded, QuantParams, Nested)}

for _node in NODES.values():
    jax.export.register_pytree_node_serialization(
        _node,
        serialized_name=f"jaxquant.{_node.__name__}",
        serialize_auxdata=lambda aux: json.dumps(static_to_json(aux)).encode(),
        deserialize_auxdata=lambda data: static_from_json(json.loads(data)),
    )
