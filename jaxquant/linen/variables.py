"""Variables in training: what an optimizer takes out of them, and what a step puts back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jaxquant.linen.collection import NAME
from jaxquant.linen.state import parted


def trainable(variables: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimizer trains: `params`, and `learned` of the `quant` collection.

    Both are trees of floats in their places within `variables`, so that `updated` puts them back;
    a `quant` collection without anything learned is left out.

    Raises:
      ValueError: `variables` are none.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
    >>> fmodel = jq.linen.fake_quantized(nn.Dense(8), jq.w8a8())
    >>> trainable(fmodel.init(jax.random.key(0), jnp.ones((2, 32)))).keys()
    dict_keys(['params'])
    """
    plain, held = parted(variables, "linen.trainable")
    trained = {"params": plain["params"]} if "params" in plain else {}
    if held is not None and jax.tree.leaves(held["learned"]):
        trained[NAME] = {"learned": held["learned"]}
    return trained


def updated(variables: Mapping[str, Any], *updates: Mapping[str, Any]) -> dict[str, Any]:
    """Variables with collections replaced by those of `updates`, the last of which counts.

    Of the `quant` collection only the fields that an update has are replaced: `learned` by what
    `trainable` took out, all by what `apply` returns.

    >>> updated({"params": 1, "batch_stats": 2}, {"batch_stats": 3}, {"params": 4})
    {'params': 4, 'batch_stats': 3}
    """
    out = dict(variables)
    for update in updates:
        for name, held in update.items():
            out[name] = {**out[name], **held} if name == NAME and name in out else held
    return out
