"""Variables in training: extracts those that an optimizer trains, and puts updates back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jaxquant.linen.collection import NAME
from jaxquant.linen.state import parted


def trainable(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the variables that an optimizer trains: `params`, and `learned` of `quant`.

    Both are trees of floats, nested as in `variables`, so that `updated` puts them back; a `quant`
    collection without learned values is left out.

    Raises:
      ValueError: `variables` is not a mapping.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
    >>> fmodel = jq.linen.fake_quantized(nn.Dense(8), jq.w8a8())
    >>> trainable(fmodel.init(jax.random.key(0), jnp.ones((2, 32)))).keys()
    dict_keys(['params'])
    """
    plain, quant = parted(variables, "linen.trainable")
    trained = {"params": plain["params"]} if "params" in plain else {}
    if quant is not None and jax.tree.leaves(quant["learned"]):
        trained[NAME] = {"learned": quant["learned"]}
    return trained


def updated(variables: Mapping[str, Any], *updates: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces collections in variables by those of `updates`; later updates take precedence.

    In the `quant` collection only the fields of an update are replaced: `learned` after
    `trainable`, all fields after `apply`.

    >>> updated({"params": 1, "batch_stats": 2}, {"batch_stats": 3}, {"params": 4})
    {'params': 4, 'batch_stats': 3}
    """
    out = dict(variables)
    for update in updates:
        for name, collection in update.items():
            out[name] = {**out[name], **collection} if name == NAME and name in out else collection
    return out
