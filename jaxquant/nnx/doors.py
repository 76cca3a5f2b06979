"""Functions on whole models: `ptq`, `capture`, `fold_batchnorm`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from flax import nnx

from jaxquant.capture import CaptureKeywords, Statistics, arguments, capture_with
from jaxquant.capture.batches import require_iterable
from jaxquant.nnx.model import Quantized
from jaxquant.nnx.parts import arrays_of, parts_of
from jaxquant.observers import Observer
from jaxquant.ptq import PTQKeywords
from jaxquant.ptq import ptq as ptq_function
from jaxquant.recipe import RecipeLike, as_recipe
from jaxquant.report import Report
from jaxquant.rewrites import FoldReport
from jaxquant.rewrites import fold_batchnorm as fold_function


def ptq(
    model: nnx.Module,
    recipe: RecipeLike,
    *args: Any,
    method: str = "__call__",
    **options: Unpack[PTQKeywords],
) -> tuple[Quantized, Report]:
    """Quantizes the parameters of an NNX model by a recipe, into a new model.

    As `jaxquant.ptq`: sites come from tracing `model(*args)` once, nothing is run, and
    `args` may be `jax.ShapeDtypeStruct`s. Parameters are the `nnx.Param`s; their key paths are the
    model's attributes, such as `layers/0/attn/query/kernel`. The model itself, with its
    statistics and random states, is not changed.

    With `requantize`, biases and BatchNorms that follow a contraction are folded into its integers
    with their current values; do not change these afterwards.

    Args:
      model: the float model, or a partly quantized one.
      recipe: rules on key paths, such as `jaxquant.w8a8()`; or one rule, or a sequence of rules.
      *args: arguments to trace the method with.
      method: name of the method to trace; parameters that it does not use stay float.
      **options: `kwargs`, keyword arguments of the method; `batches`, each the tuple of its
        arguments (or the one argument); and all other keywords of `jaxquant.ptq`.

    Returns:
      The quantized model, see `Quantized`, and a report on every parameter.

    Raises:
      ValueError: `recipe` is not a recipe; `model` is not an NNX module, lacks the method or has
        variables that are references; a rule matches nothing, nothing is quantized, or a parameter
        is not finite or its rule does not apply to it.

    >>> import jax, jax.numpy as jnp, jaxquant.nnx, jaxquant as jq
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), nnx.relu)
    >>> qmodel, report = jq.nnx.ptq(model, jq.w8a8(), jnp.ones((1, 64)))
    >>> report["layers/0/kernel"].action
    'int8 per channel, activations int8'
    >>> x = jax.random.normal(jax.random.key(1), (4, 64))
    >>> bool(abs(nnx.jit(qmodel)(x) - model(x)).max() < 0.03)
    True
    """
    recipe = as_recipe(recipe, "nnx.ptq", model)
    graphdef, params, moving, rest = parts_of(_inner(model), method, "nnx.ptq")

    def call(params: Any, moving: Any, /, *args: Any, **kwargs: Any) -> Any:
        copy = nnx.merge(graphdef, params, *moving, *rest, copy=True)
        return arrays_of(getattr(copy, method)(*args, **kwargs))[0]

    batches = options.pop("batches", None)
    if batches is not None:
        require_iterable(batches, "nnx.ptq")
        options["batches"] = ((moving, *arguments(b)) for b in batches)
    trace_args = (moving, *args) if args or batches is None else ()
    qparams, report = ptq_function(call, params, recipe, *trace_args, **options)
    return Quantized(nnx.merge(graphdef, qparams, *moving, *rest, copy=True)), report


def capture(
    model: nnx.Module,
    recipe: RecipeLike | Observer,
    *,
    method: str = "__call__",
    **options: Unpack[CaptureKeywords],
) -> Statistics:
    """Runs `model(*batch)` for every batch and gathers statistics of its activations.

    As `jaxquant.capture`, with the key paths of `ptq`. The model is not changed: each batch starts
    from the same batch statistics and random states, so call `model.eval()` first.

    Args:
      model: the model, float or quantized.
      recipe: rules with `observer=`; or one observer, for all contractions.
      method: name of the method to run.
      **options: `batches`, any iterable of tuples of the method's arguments, or of single ones;
        and all other keywords of `jaxquant.capture`.

    Raises:
      ValueError: as `jaxquant.capture`; `model` is not an NNX module, lacks the method or has
        variables that are references.

    >>> import jax.numpy as jnp, jaxquant.nnx, jaxquant as jq
    >>> from flax import nnx
    >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    >>> print(jq.nnx.capture(model, jq.observers.minmax(), batches=[jnp.ones((3, 4))]))
    site    operand  observer  range   updates
    kernel  lhs      minmax()  0 .. 1  1
    """
    where = "nnx.capture"
    graphdef, params, moving, rest = parts_of(_inner(model), method, where)

    def call(params: Any, moving: Any, /, *args: Any, **kwargs: Any) -> Any:
        copy = nnx.merge(graphdef, params, *moving, *rest, copy=True)
        return arrays_of(getattr(copy, method)(*args, **kwargs))[0]

    return capture_with(where, call, params, (moving,), recipe, **options)


def fold_batchnorm(
    model: nnx.Module,
    *args: Any,
    method: str = "__call__",
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[Any, FoldReport]:
    """Moves the scale of every BatchNorm into the kernel before it, if there is exactly one.

    As `jaxquant.fold_batchnorm`, for a model: `a = scale / sqrt(var + eps)` multiplies the kernel,
    and the BatchNorm becomes the identity plus a shift. Call it after `model.eval()` and before
    `ptq`.

    Args:
      model: the float model; it is not changed.
      *args: arguments to trace the method with, arrays or `jax.ShapeDtypeStruct`s.
      method: name of the method to trace.
      kwargs: its keyword arguments.

    Returns:
      The folded model, of the same class, and a record on each BatchNorm.

    Raises:
      ValueError: as `jaxquant.fold_batchnorm`; `model` is not an NNX module or is quantized, lacks
        the method or has variables that are references.

    >>> import jax.numpy as jnp, jaxquant.nnx, jaxquant as jq
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs))
    >>> model.eval()
    >>> folded, info = jq.nnx.fold_batchnorm(model, jnp.ones((1, 4)))
    >>> print(info)
    BatchNorm  kernel           folded
    ----------------------------------
    layers/1   layers/0/kernel  yes
    """
    where = "nnx.fold_batchnorm"
    if isinstance(model, Quantized):
        raise ValueError(f"{where}: the model is quantized already; fold first, then call ptq")
    parts_of(_inner(model), method, where)
    graphdef, state = nnx.split(model)

    def call(state: Any, /, *args: Any, **kwargs: Any) -> Any:
        copy = nnx.merge(graphdef, state, copy=True)
        return arrays_of(getattr(copy, method)(*args, **kwargs))[0]

    state, info = fold_function(call, state, *args, kwargs=kwargs)
    return nnx.merge(graphdef, state, copy=True), info


def _inner(model: Any) -> Any:
    return model.model if isinstance(model, Quantized) else model
