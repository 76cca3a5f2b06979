"""`quantize_params`: a recipe applied to a params tree, leaf by leaf."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxquant.encoders import Info, RoundToNearest, rtn
from jaxquant.interpret.sites import Sites, path_str
from jaxquant.params.donated import consume, last_uses, rehearse, wait_for
from jaxquant.params.leaf import Encoded, encode_leaf, require_no_inputs
from jaxquant.params.plan import Plan, identity, make_plans
from jaxquant.qtensor import ContractionConfig, is_qtensor, with_contraction
from jaxquant.recipe import Recipe, RecipeLike, as_recipe
from jaxquant.report import LeafReport, Report, shown


def quantize_params(
    params: Any,
    recipe: RecipeLike,
    *,
    sites: Sites | None = None,
    key: Array | None = None,
    use: bool = True,
    donate: bool = False,
) -> tuple[Any, Report]:
    """Quantizes the leaves of a params tree that a recipe's rules match.

    The first rule that matches a leaf's key path decides. The axes that share a scale follow from
    the contractions of the leaf, or from the axes that a rule names. The tree keeps its structure
    and types; leaves become `QTensor`s with the sharding of the leaf. Leaves are encoded one by
    one: beside params and result, memory holds the temporaries of one leaf.

    Args:
      params: a tree of arrays, or of `jax.ShapeDtypeStruct`s to learn the structure only.
      recipe: the rules: a `Recipe`, or anything that makes one.
      sites: the result of `jaxquant.trace`.
      key: PRNG key for encoders that draw random numbers; each leaf folds in its path.
      use: store the recipe's activation and attention specs in each `QTensor`, so that
        `jaxquant.quantized` contracts by them. If false, weights are only dequantized.
      donate: delete each quantized `jax.Array` as soon as its codes exist, so that memory never
        holds the model twice: peak memory is params and the temporaries of one leaf. Kept leaves
        and NumPy arrays are not deleted. An error before any work deletes nothing; a later one
        leaves the arrays that were not yet quantized.

    Returns:
      `(qparams, report)`; the report says for every leaf what was done, or why it was kept.

    Raises:
      ValueError: before any work, naming leaf or rule: a rule that matches nothing; a recipe that
        quantizes nothing; axes neither named nor known from `sites`; sites of another model;
        non-finite values (without `donate`, raised after encoding for leaves rounded to nearest);
        traced arrays with `donate`.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> params = {"dense": {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}}
    >>> rule = jq.Rule("**/kernel", weights=jq.QSpec("int8", jq.PerChannel(axes=1)))
    >>> qparams, report = jq.quantize_params(params, jq.Recipe([rule]))
    >>> qparams["dense"]["kernel"].codes.dtype.name, report["dense/bias"].action
    ('int8', 'kept: no rule matches')
    """
    recipe = as_recipe(recipe, "quantize_params", params)
    return apply_recipe(params, recipe, sites=sites, key=key, use=use, donate=donate)


def apply_recipe(
    params: Any,
    recipe: Recipe,
    *,
    sites: Sites | None,
    key: Array | None = None,
    use: bool = True,
    again: bool = False,
    encoded: Mapping[str, Encoded] | None = None,
    planned: tuple[list[Plan], list[str]] | None = None,
    donate: bool = False,
) -> tuple[Any, Report]:
    """`quantize_params`; with `again`, a tree with nothing left to quantize is no error.

    `encoded` has finished leaves by path; `planned` is the result of `make_plans`.
    """
    flat, tree = jax.tree.flatten_with_path(params, is_leaf=is_qtensor)
    leaves = [(path_str(path), leaf) for path, leaf in flat]
    plans, notes = planned or make_plans(leaves, recipe, sites, again=again)
    finished = dict(encoded or {})
    chosen = [(p, x) for p, (_, x) in zip(plans, leaves, strict=True) if p.spec is not None]
    # sums of round-to-nearest show non-finite values, without a separate pass
    late = {p.path for p, _ in chosen if not donate and p.path not in finished and _rounds(p)}
    check_finite([(p.path, x) for p, x in chosen if p.path not in late])
    if donate:
        rehearse([(p, x) for p, x in chosen if p.path not in finished], key)
    ends = last_uses(plans, leaves) if donate else {}

    done: dict[Any, tuple[str, Encoded]] = {}
    first_paths: dict[Any, str] = {}
    out, reports = list[Any](), list[tuple[Plan, Any, Any, str | None]]()
    infos: list[Info | None] = []
    for n, (plan, (path, leaf)) in enumerate(zip(plans, leaves, strict=True)):
        array = identity(path, leaf)
        info, shared = None, None
        if plan.spec is None or plan.rule is None:
            out.append(leaf)
            shared = first_paths.get(array)
        else:
            how = (array, plan.spec, plan.storage_last_axes, plan.batch_axes, plan.rule)
            rule, result = plan.rule, finished.get(path)
            if how not in done:
                if result is None:
                    require_no_inputs(plan)
                    wait_for(infos)  # else memory would hold the temporaries of several leaves
                    result = encode_leaf(leaf, plan, plan.encoder or rtn(), key)
                if use:
                    how_used = ContractionConfig(
                        rule.activations, recipe.attention, outliers=rule.outliers
                    )
                    result = result._replace(q=with_contraction(result.q, how_used))
                done[how] = (path, result)
            else:
                shared = done[how][0]
            first = done[how][1]
            info, notes_of = first.info, map(str, first.notes)
            plan = dataclasses.replace(plan, notes=(*plan.notes, *notes_of))
            out.append(first.q)
            if ends.get(array) == n:
                consume(leaf, [result.q for how, (_, result) in done.items() if how[0] == array])
        first_paths.setdefault(array, path)
        infos.append(info)
        reports.append((plan, leaf, out[-1], shared))
    measured = ratios(infos)
    _check_late(late, chosen, dict(zip((p.path for p in plans), infos, strict=True)))
    report = Report(
        leaves=tuple(leaf_report(*r, sqnr) for r, sqnr in zip(reports, measured, strict=True)),
        recipe=recipe.title,
        notes=tuple(notes),
    )
    return jax.tree.unflatten(tree, out), report


def _rounds(plan: Plan) -> bool:
    return plan.encoder is None or type(plan.encoder) is RoundToNearest


def _check_late(
    late: set[str], chosen: list[tuple[Plan, Any]], infos: Mapping[str, Info | None]
) -> None:
    """Checks the leaves with unknown or NaN sums for non-finite values."""
    leaves = [(p.path, x, infos[p.path]) for p, x in chosen if p.path in late]
    known = [None if i is None or isinstance(i.signal, jax.core.Tracer) else i for *_, i in leaves]
    sums = jax.device_get([None if i is None else i.signal for i in known])
    check_finite([(p, x) for (p, x, _), s in zip(leaves, sums, strict=True) if s is None or s != s])


def check_finite(leaves: list[tuple[str, Any]]) -> None:
    """Checks all arrays for non-finite values, with one wait for the device.

    Raises:
      ValueError: naming the leaves with NaN or infinity, and the number of such values.
    """
    concrete = [
        (p, x) for p, x in leaves if not isinstance(x, (jax.ShapeDtypeStruct, jax.core.Tracer))
    ]
    with jax.ensure_compile_time_eval():  # concrete, whatever is being traced
        sums = jax.device_get([_sum_of_zeros(x) for _, x in concrete])
        suspects = [px for px, s in zip(concrete, sums, strict=True) if s != 0]
        answers = jax.device_get([_count_bad(x) for _, x in suspects])
    bad = [(p, x, int(n)) for (p, x), n in zip(suspects, answers, strict=True) if n]
    if bad:
        names = ", ".join(f"{shown(p)} ({n} of {math.prod(x.shape)} values)" for p, x, n in bad[:5])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(f"expected finite weights, got NaN or infinity in {names}{more}")


@jax.jit
def _sum_of_zeros(x: Array) -> Array:
    """NaN if any value is not finite; on a CPU four times as fast as counting."""
    return jnp.sum(x * jnp.zeros((), x.dtype))


@jax.jit
def _count_bad(x: Array) -> Array:
    return jnp.sum(~jnp.isfinite(x), dtype=jnp.uint32)


def ratios(infos: list[Info | None]) -> list[float | None]:
    """The SQNR of all leaves in decibels, with one wait for the device."""
    sums = jax.device_get([None if i is None else (i.error, i.signal) for i in infos])
    return [None if s is None else Info(*s).sqnr_db for s in sums]


def leaf_report(
    plan: Plan, before: Any, after: Any, shared: str | None, sqnr: float | None
) -> LeafReport:
    """The report on one leaf; `shared` is the path of the leaf it is tied to."""
    notes = plan.notes + (() if shared is None else (f"tied: stored once, at {shown(shared)}",))
    if sqnr is not None and math.isnan(sqnr):
        sqnr, notes = None, (*notes, "SQNR not measured: its sums are not finite in float32")
    dtype = before.dtype if hasattr(before, "dtype") else type(before).__name__
    return LeafReport(
        path=plan.path,
        shape=tuple(np.shape(before)),
        dtype=str(dtype),
        action=plan.action,
        quantized=plan.spec is not None,
        bytes_before=_nbytes(before),
        bytes_after=_nbytes(after),
        sqnr_db=sqnr,
        sites=tuple(site.key for site in plan.sites),
        notes=notes,
        shared=shared is not None,
    )


def _nbytes(leaf: Any) -> int:
    if is_qtensor(leaf):
        return leaf.nbytes
    if not hasattr(leaf, "dtype"):
        return 0  # a Python scalar
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
