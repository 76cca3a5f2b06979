"""Fingerprints a run, so that it is resumed only with the same function, params and samples."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxquant.interpret.calls import Call
from jaxquant.interpret.evaluate import Interpreter, abstract
from jaxquant.interpret.policy import Policy
from jaxquant.recipe import Recipe


def run_of(
    call: Call,
    leaves: Mapping[str, Any],
    recipe: Recipe,
    batches: Sequence[Any] | None,
    key: Array | None,
) -> dict[str, Any]:
    """Returns versions and checksums of function, params, samples, recipe and key, as JSON."""
    specs = [s for rule in recipe for s in (rule.weights, rule.lookup, rule.activations)]
    return {
        "versions": {name: version(name) for name in ("jaxquant", "jax", "jaxlib")},
        "recipe": repr(list(recipe.rules)),
        # the repr of a recipe leaves out the values of codebooks
        "formats": checksum([repr(spec.format) for spec in specs if spec is not None]),
        "function": checksum([_program(call), *call.consts]),
        "params": checksum(list(leaves.values())),
        "batches": checksum(batches),
        "key": checksum(key),
    }


def _program(call: Call) -> str:
    """Returns the lowered text of a call on floats, which is the same in every process."""

    def run(leaves: list[Any]) -> Any:
        return call.run(Interpreter(Policy(), call.param_paths), leaves)

    return jax.jit(run).lower([abstract(leaf) for leaf in call.leaves]).as_text()


def checksum(tree: Any) -> int:
    """CRC-32 of all arrays, with their shapes and dtypes, and of the `repr` of other leaves.

    >>> checksum([jnp.zeros(2)]) == checksum([jnp.zeros(1)])
    False
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(jnp.asarray(leaf))
            kind = f"{leaf.dtype}{leaf.shape}".encode()
            total = zlib.crc32(np.asarray(leaf).tobytes(), zlib.crc32(kind, total))
        else:
            total = zlib.crc32(repr(leaf).encode(), total)
    return total
