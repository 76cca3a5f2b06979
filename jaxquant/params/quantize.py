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

    The first rule that matches a leaf's key path decides. Which axes share a scale follows from
    the contractions that the leaf takes part in, or from the axes that a rule names. The tree
    keeps its structure and types; leaves become `QTensor`s, laid out over devices as they were.
    One leaf is encoded after the other: beside params and result, memory holds what one needs.

    Args:
      params: a tree of arrays, or of `jax.ShapeDtypeStruct`s to learn the structure only.
      recipe: the rules: a `Recipe`, or what one is made of.
      sites: what `jaxquant.trace` found.
      key: PRNG key for encoders that draw; a leaf's own key is folded from it by its path.
      use: put into each `QTensor` what the recipe says of activations and attention, so that
        `jaxquant.quantized` contracts accordingly. Without, weights are dequantized values only.
      donate: delete each `jax.Array` that is quantized as soon as its codes are there, so that
        memory never holds the model twice: its peak is params and what one leaf needs. Leaves that
        are kept, and NumPy arrays, are not touched. What is found to be wrong before any work
        leaves all arrays as they were; what fails later leaves those that were not yet quantized.

    Returns:
      `(qparams, report)`; the report tells for every leaf what was done, or why not.

    Raises:
      ValueError: before any work, naming leaf or rule: a rule that matches nothing; a recipe that
        quantizes nothing; axes neither named nor known from `sites`; sites of another model;
        non-finite values, which without `donate` are found on the way where leaves are rounded to
        nearest; traced arrays to `donate`.

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
    """`quantize_params`; with `again`, a tree in which nothing is left to quantize is no error.

    What is in `encoded`, by path, is done already; `planned` is what `make_plans` returned.
    """
    flat, tree = jax.tree.flatten_with_path(params, is_leaf=is_qtensor)
    leaves = [(path_str(path), leaf) for path, leaf in flat]
    plans, notes = planned or make_plans(leaves, recipe, sites, again=again)
    given = dict(encoded or {})
    chosen = [(p, x) for p, (_, x) in zip(plans, leaves, strict=True) if p.spec is not None]
    # rounding to nearest sees by its sums what is not finite, and needs no pass to look for it
    late = {p.path for p, _ in chosen if not donate and p.path not in given and _rounds(p)}
    check_finite([(p.path, x) for p, x in chosen if p.path not in late])
    if donate:
        rehearse([(p, x) for p, x in chosen if p.path not in given], key)
    ends = last_uses(plans, leaves) if donate else {}

    done: dict[Any, tuple[str, Encoded]] = {}
    seen: dict[Any, str] = {}
    out, reports = list[Any](), list[tuple[Plan, Any, Any, str | None]]()
    infos: list[Info | None] = []
    for n, (plan, (path, leaf)) in enumerate(zip(plans, leaves, strict=True)):
        array = identity(path, leaf)
        info, shared = None, None
        if plan.spec is None or plan.rule is None:
            out.append(leaf)
            shared = seen.get(array)
        else:
            how = (array, plan.spec, plan.storage_last_axes, plan.batch_axes, plan.rule)
            rule, made = plan.rule, given.get(path)
            if how not in done:
                if made is None:
                    require_no_inputs(plan)
                    wait_for(infos)  # or what several leaves need would be in memory together
                    made = encode_leaf(leaf, plan, plan.encoder or rtn(), key)
                if use:
                    how_used = ContractionConfig(
                        rule.activations, recipe.attention, outliers=rule.outliers
                    )
                    made = made._replace(q=with_contraction(made.q, how_used))
                done[how] = (path, made)
            else:
                shared = done[how][0]
            first = done[how][1]
            info, notes_of = first.info, map(str, first.notes)
            plan = dataclasses.replace(plan, notes=(*plan.notes, *notes_of))
            out.append(first.q)
            if ends.get(array) == n:
                consume(leaf, [made.q for how, (_, made) in done.items() if how[0] == array])
        seen.setdefault(array, path)
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
    """Looks at the leaves whose sums are not finite, which those of finite values are."""
    found = [(p.path, x, infos[p.path]) for p, x in chosen if p.path in late]
    known = [None if i is None or isinstance(i.signal, jax.core.Tracer) else i for *_, i in found]
    sums = jax.device_get([None if i is None else i.signal for i in known])
    check_finite([(p, x) for (p, x, _), s in zip(found, sums, strict=True) if s is None or s != s])


def check_finite(leaves: list[tuple[str, Any]]) -> None:
    """One pass over all arrays, then one wait for the answers.

    Raises:
      ValueError: the leaves that hold NaN or infinity, and how many values of each.
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
        found = ", ".join(f"{shown(p)} ({n} of {math.prod(x.shape)} values)" for p, x, n in bad[:5])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(f"expected finite weights, got NaN or infinity in {found}{more}")


@jax.jit
def _sum_of_zeros(x: Array) -> Array:
    """NaN if any value is not finite: on a CPU in a quarter of the time that counting takes."""
    return jnp.sum(x * jnp.zeros((), x.dtype))


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
