"""A `QTensor` as named arrays and JSON, for files: nothing is pickled."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.qtensor.export import NODES, static_from_json, static_to_json
from jaxquant.qtensor.tensor import QTensor


def serialize(q: QTensor) -> tuple[str, dict[str, np.ndarray]]:
    """JSON and arrays that `deserialize` restores the same QTensor from, bit for bit.

    Returns:
      JSON, and arrays by name: raw bytes as uint8, for any dtype.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> text, arrays = serialize(jq.quantize(jnp.eye(2), jq.QSpec("int8", jq.PerTensor())))
    >>> sorted(arrays), deserialize(text, arrays).codes.dtype.name
    (['0', '1'], 'int8')
    """
    arrays: dict[str, np.ndarray] = {}

    def node(x: Any) -> Any:
        if type(x).__name__ in NODES:
            return {
                "node": type(x).__name__,
                "fields": {f.name: node(getattr(x, f.name)) for f in dataclasses.fields(x)},
            }
        if hasattr(x, "shape") and hasattr(x, "dtype"):
            host = np.asarray(x)
            name = str(len(arrays))
            arrays[name] = np.frombuffer(host.tobytes(), np.uint8)
            return {"array": name, "dtype": host.dtype.name, "shape": list(host.shape)}
        return {"static": static_to_json(x)}

    return json.dumps(node(q)), arrays


def deserialize(text: str, arrays: Mapping[str, np.ndarray]) -> QTensor:
    """The QTensor that was passed to `serialize`."""

    def restore(x: Any) -> Any:
        if "node" in x:
            return NODES[x["node"]](**{name: restore(field) for name, field in x["fields"].items()})
        if "array" in x:
            dtype = jnp.dtype(x["dtype"])
            return jnp.asarray(
                np.frombuffer(arrays[x["array"]].tobytes(), dtype).reshape(x["shape"])
            )
        return static_from_json(x["static"])

    q: QTensor = restore(json.loads(text))
    return q
