"""Functions on all variables of a model: `ptq`, `capture`, `fold_batchnorm`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import flax.linen as nn

from jaxquant.capture import CaptureKeywords, Statistics
from jaxquant.capture import capture as capture_function
from jaxquant.linen.collection import parted
from jaxquant.linen.model import quantized, require_module
from jaxquant.observers import Observer
from jaxquant.ptq import PTQKeywords
from jaxquant.ptq import ptq as ptq_function
from jaxquant.recipe import RecipeLike
from jaxquant.report import Report
from jaxquant.rewrites import FoldReport
from jaxquant.rewrites import fold_batchnorm as fold_function


def ptq(
    model: nn.Module,
    variables: Mapping[str, Any],
    recipe: RecipeLike,
    *args: Any,
    **options: Unpack[PTQKeywords],
) -> tuple[Any, Report]:
    """Quantizes variables by a recipe: `jaxquant.ptq(model.apply, variables, recipe, ...)`.

    Args:
      model: an unbound Linen module.
      variables: float variables; collections that no contraction uses stay as they are. A `quant`
        collection that `quantized(model, recipe).apply` recorded is removed; it serves as `stats=`
        unless `stats=` or `batches=` is given.
      recipe: rules on key paths, which begin with the collection.
      *args: the other arguments of `model.apply`.
      **options: `kwargs`, its keyword arguments, and all other keywords of `jaxquant.ptq`.

    Raises:
      ValueError: `model` is not a Linen module, or as `jaxquant.ptq`.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
    >>> model, x = nn.Dense(8), jnp.ones((2, 32))
    >>> variables = model.init(jax.random.key(0), x)
    >>> qvariables, _ = jq.linen.ptq(model, variables, jq.w4a16(group=16), x)
    >>> qvariables["params"]["kernel"].bits_per_weight
    6.0
    """
    require_module(model, "linen.ptq", "jaxquant.ptq")
    plain, collection = parted(variables)
    calibration = [options.get("stats"), options.get("batches")]
    if collection is not None and all(x is None for x in calibration):
        qmodel = quantized(model, recipe)
        options["stats"] = qmodel.statistics(variables, *args, **(options.get("kwargs") or {}))
    return ptq_function(model.apply, plain, recipe, *args, **options)


def capture(
    model: nn.Module,
    variables: Mapping[str, Any],
    recipe: RecipeLike | Observer,
    **options: Unpack[CaptureKeywords],
) -> Statistics:
    """Runs `model.apply(variables, *batch)` for every batch: see `jaxquant.capture`.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
    >>> model, x = nn.Dense(8), jnp.linspace(-1, 3, 64).reshape(2, 32)
    >>> variables = model.init(jax.random.key(0), x)
    >>> print(jq.linen.capture(model, variables, jq.observers.minmax(), batches=[x]))
    site           operand  observer  range    updates
    params/kernel  lhs      minmax()  -1 .. 3  1
    """
    require_module(model, "linen.capture", "jaxquant.capture")
    return capture_function(model.apply, variables, recipe, **options)


def fold_batchnorm(
    model: nn.Module,
    variables: Mapping[str, Any],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[Any, FoldReport]:
    """Moves the scale of every BatchNorm into the kernel before it: see `jaxquant.fold_batchnorm`.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
    >>> model = nn.Sequential([nn.Dense(8), nn.BatchNorm(use_running_average=True)])
    >>> x = jnp.ones((2, 4))
    >>> _, info = jq.linen.fold_batchnorm(model, model.init(jax.random.key(0), x), x)
    >>> print(info)
    BatchNorm        kernel                  folded
    -----------------------------------------------
    params/layers_1  params/layers_0/kernel  yes
    """
    require_module(model, "linen.fold_batchnorm", "jaxquant.fold_batchnorm")
    return fold_function(model.apply, variables, *args, kwargs=kwargs)
