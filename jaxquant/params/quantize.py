"""`quantize_params`: a recipe applied to a params tree, leaf by leaf."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxquant.encoders import Info, rtn
from jaxquant.interpret.sites import Sites, path_str
from jaxquant.params.leaf import Encoded, encode_leaf
from jaxquant.params.plan import Plan, identity, make_plans
from jaxquant.qtensor import Use, is_qtensor, with_use
from jaxquant.recipe import Recipe, Rule, as_recipe
from jaxquant.report import LeafReport, Report, shown


def quantize_params(
    params: Any,
    recipe: Recipe | Rule | Iterable[Rule],
    *,
    sites: Sites | None = None,
    key: Array | None = None,
    use: bool = True,
) -> tuple[Any, Report]:
    """Quantizes the leaves of a params tree that a recipe's rules match.

    The first rule that matches a leaf's key path decides. Which axes share a scale follows from
    the contractions that the leaf takes part in, or from the axes that a rule names. The tree
    keeps its structure and types; leaves become `QTensor`s, laid out over devices as they were.

    Args:
      params: a tree of arrays, or of `jax.ShapeDtypeStruct`s to learn the structure only.
      recipe: the rules: a `Recipe`, or what one is made of.
      sites: what `jaxquant.trace` found.
      key: PRNG key for encoders that draw; a leaf's own key is folded from it by its path.
      use: put into each `QTensor` what the recipe says of activations and attention, so that
        `jaxquant.quantized` contracts accordingly. Without, weights are dequantized values only.

    Returns:
      `(qparams, report)`; the report tells for every leaf what was done, or why not.

    Raises:
      ValueError: before any work, naming leaf or rule: a rule that matches nothing; a recipe that
        quantizes nothing; axes neither named nor known from `sites`; sites of another model;
        non-finite values.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> params = {"dense": {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}}
    >>> rule = jq.Rule("**/kernel", weights=jq.QSpec("int8", jq.PerChannel(axes=1)))
    >>> qparams, report = jq.quantize_params(params, jq.Recipe([rule]))
    >>> qparams["dense"]["kernel"].codes.dtype.name, report["dense/bias"].action
    ('int8', 'kept: no rule matches')
    """
    recipe = as_recipe(recipe, "quantize_params", params)
    return apply_recipe(params, recipe, sites=sites, key=key, use=use)


def apply_recipe(
    params: Any,
    recipe: Recipe,
    *,
    sites: Sites | None,
    key: Array | None = None,
    use: bool = True,
    again: bool = False,
    encoded: Mapping[str, Encoded] | None = None,
) -> tuple[Any, Report]:
    """`quantize_params`; with `again`, a tree in which nothing is left to quantize is no error.

    What is in `encoded`, by path, is done already.
    """
    flat, tree = jax.tree.flatten_with_path(params, is_leaf=is_qtensor)
    leaves = [(path_str(path), leaf) for path, leaf in flat]
    plans, notes = make_plans(leaves, recipe, sites, again=again)
    check_finite([(p.path, x) for p, (_, x) in zip(plans, leaves, strict=True) if p.spec])

    done: dict[Any, tuple[str, Encoded]] = {}
    seen: dict[Any, str] = {}
    out, infos, reports = [], [], []
    for plan, (path, leaf) in zip(plans, leaves, strict=True):
        array = identity(path, leaf)
        info, shared = None, None
        if plan.spec is None or plan.rule is None:
            out.append(leaf)
            shared = seen.get(array)
        else:
            how = (array, plan.spec, plan.minor, plan.batch_axes, plan.rule)
            rule, given = plan.rule, (encoded or {}).get(path)
            if how not in done:
                if given is None:
                    _require_no_inputs(plan)
                    given = encode_leaf(leaf, plan, plan.encoder or rtn(), key)
                if use:
                    how_used = Use(rule.activations, recipe.attention, outliers=rule.outliers)
                    given = given._replace(q=with_use(given.q, how_used))
                done[how] = (path, given)
            else:
                shared = done[how][0]
            first = done[how][1]
            info, notes_of = first.info, map(str, first.notes)
            plan = dataclasses.replace(plan, notes=(*plan.notes, *notes_of))
            out.append(first.q)
        seen.setdefault(array, path)
        infos.append(info)
        reports.append((plan, leaf, out[-1], shared))
    measured = ratios(infos)
    report = Report(
        leaves=tuple(leaf_report(*r, sqnr) for r, sqnr in zip(reports, measured, strict=True)),
        recipe=recipe.name,
        notes=tuple(notes),
    )
    return jax.tree.unflatten(tree, out), report


def _require_no_inputs(plan: Plan) -> None:
    if plan.gathers is not None:
        what = plan.encoder if plan.rewrite is None else plan.rewrite
        raise ValueError(
            f"{shown(plan.path)}: {what!r} needs statistics of what the parameter is contracted "
            "with, and there are none; use jaxquant.ptq(fn, params, recipe, batches=...)"
        )


def check_finite(leaves: list[tuple[str, Any]]) -> None:
    """One pass over all arrays, then one wait for the answers."""
    concrete = [
        (p, x) for p, x in leaves if not isinstance(x, (jax.ShapeDtypeStruct, jax.core.Tracer))
    ]
    with jax.ensure_compile_time_eval():  # concrete, whatever is being traced
        answers = jax.device_get([_count_bad(x) for _, x in concrete])
    bad = [(p, x, int(n)) for (p, x), n in zip(concrete, answers, strict=True) if n]
    if bad:
        found = ", ".join(f"{shown(p)} ({n} of {math.prod(x.shape)} values)" for p, x, n in bad[:5])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(f"expected finite weights, got NaN or infinity in {found}{more}")


@jax.jit
def _count_bad(x: Array) -> Array:
    return jnp.sum(~jnp.isfinite(x), dtype=jnp.uint32)


def ratios(infos: list[Info | None]) -> list[float | None]:
    """All SQNR, in decibels, after one wait for the device."""
    sums = jax.device_get([None if i is None else (i.error, i.signal) for i in infos])
    return [None if s is None else Info(*s).sqnr_db for s in sums]


def leaf_report(
    plan: Plan, before: Any, after: Any, shared: str | None, sqnr: float | None
) -> LeafReport:
    """What became of one leaf; `shared` is the path of the leaf that it is tied to."""
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
