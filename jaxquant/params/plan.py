"""The plan for every leaf, decided and checked before any array is computed."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.encoders import Encoder
from jaxquant.interpret.sites import Site, Sites
from jaxquant.observers import Inputs
from jaxquant.params.axes import localize
from jaxquant.qtensor import PerBlock, PerChannel, PerGroup, PerTensor, QSpec, is_qtensor
from jaxquant.recipe import Recipe, Rewrite, Rule
from jaxquant.report import shown


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan for one leaf.

    Attributes:
      path: key path.
      rule: the rule that decides; `None` if none matches.
      action: in words, as reports print it.
      spec: the spec to encode with, axes named within the core; `None` keeps the leaf.
      storage_last_axes: core axes to store last.
      batch_axes: number of leading batch axes; core arrays are encoded one by one.
      sites: the sites that use the leaf.
      notes: remarks for the report.
      table: whether `spec` is the rule's `lookup`, for tables; the rule's encoder and rewrite are
        for `weights` and do not apply.
    """

    path: str
    rule: Rule | None
    action: str
    spec: QSpec | None = None
    storage_last_axes: tuple[int, ...] = ()
    batch_axes: int = 0
    sites: tuple[Site, ...] = ()
    notes: tuple[str, ...] = ()
    table: bool = False

    @property
    def encoder(self) -> Encoder | None:
        """The encoder of the leaf; `None` rounds to nearest."""
        return None if self.rule is None or self.table else self.rule.encoder

    @property
    def rewrite(self) -> Rewrite | None:
        """The rewrite that is applied before encoding."""
        return None if self.rule is None or self.table else self.rule.rewrite

    @property
    def gathers(self) -> Inputs | None:
        """The observer of the leaf's inputs; `None` if no statistics are needed."""
        return None if self.rule is None or self.table else self.rule.gathers


def make_plans(
    leaves: Sequence[tuple[str, Any]], recipe: Recipe, sites: Sites | None, *, again: bool = False
) -> tuple[list[Plan], list[str]]:
    """A plan for every leaf, and notes for the report.

    With `again`, a tree in which everything is already quantized is no error.

    Raises:
      ValueError: sites of another model; a rule that matches nothing, or only leaves that are not
        float arrays; an axis unknown or out of range; nothing to quantize.
    """
    if sites is not None:
        _check_sites(leaves, sites)
    _check_rules(leaves, recipe, sites)
    uses = _uses(leaves, sites)
    plans = [_plan(path, leaf, recipe.match(path), sites, uses[path]) for path, leaf in leaves]
    quantized = [path for path, leaf in leaves if is_qtensor(leaf)]
    if not any(p.spec is not None for p in plans) and not (again and quantized):
        words = "quantizes no parameter"
        if quantized:
            words = "quantizes nothing: every leaf it could quantize is quantized already"
        if quantized and len(quantized) == len(leaves):
            words = "quantizes nothing: all leaves are quantized already"
        reasons = "; ".join(f"{shown(p.path)}: {p.action}" for p in plans[:8])
        more = f"; and {len(plans) - 8} more" if len(plans) > 8 else ""
        raise ValueError(f"{recipe!r} {words}. {reasons or 'there are no leaves'}{more}")
    first = {id(plan.rule) for plan in plans}
    notes = [
        f"rule {rule.key!r} decides no leaf: earlier rules take all that it matches"
        for rule in recipe.rules
        if id(rule) not in first and rule.attention is None
        if any(rule.matches(path) for path, _ in leaves)
    ]
    return plans, notes


def _check_sites(leaves: Sequence[tuple[str, Any]], sites: Sites) -> None:
    paths = {path for path, _ in leaves}
    for path in sites.leaves:
        if path not in paths:
            raise ValueError(
                f"{shown(path)}: the sites were traced with this parameter, and params lack it"
                f"{_nearest(path, paths)}; trace again with these params"
            )
    for path, leaf in leaves:
        if path not in sites.leaves and not hasattr(leaf, "dtype"):
            continue  # a Python scalar, static in a trace
        if path not in sites.leaves:
            raise ValueError(
                f"{shown(path)}: not a parameter that the sites were traced with"
                f"{_nearest(path, sites.leaves)}; trace again with these params"
            )
        expected, got = tuple(sites.leaves[path][0]), tuple(np.shape(leaf))
        if expected != got:
            raise ValueError(
                f"{shown(path)}: expected shape {list(expected)} as traced, got {list(got)}; "
                "trace again with these params"
            )


def _check_rules(leaves: Sequence[tuple[str, Any]], recipe: Recipe, sites: Sites | None) -> None:
    paths = [path for path, _ in leaves]
    keys = list(dict.fromkeys([*paths, *(sites or ())]))
    free = [site.key for site in sites.sites if site.param is None] if sites is not None else []
    for rule in recipe.rules:
        matched = [(path, leaf) for path, leaf in leaves if rule.matches(path)]
        if not matched:
            by_site = rule.attention is not None and (sites is None or any(map(rule.matches, free)))
            by_site |= rule.skip and any(map(rule.matches, keys))
            if not by_site:
                if rule.attention is not None and rule.weights is None and rule.lookup is None:
                    raise ValueError(
                        f"{rule!r} matches no contraction of two activations"
                        f"{_nearest(rule.key, free, 'such contractions')}"
                    )
                raise ValueError(f"{rule!r} matches no parameter{_nearest(rule.key, keys)}")
        elif rule.weights is not None and not any(_is_float(leaf) for _, leaf in matched):
            wrong = ", ".join(
                f"{shown(p)} {_dtype(x)}" for p, x in matched[:4] if not is_qtensor(x)
            )
            if wrong:
                raise ValueError(
                    f"{rule!r}: expected float arrays to quantize, got {wrong}; "
                    "leave them out or use skip=True"
                )


def _uses(leaves: Sequence[tuple[str, Any]], sites: Sites | None) -> Mapping[str, tuple[Site, ...]]:
    """Sites by path; an array at several paths (tied leaves) has the sites of all of them."""
    if sites is None:
        return {path: () for path, _ in leaves}
    by_array: dict[Any, list[Site]] = {}
    for path, leaf in leaves:
        by_array.setdefault(identity(path, leaf), []).extend(sites.of(path))
    return {path: tuple(by_array[identity(path, leaf)]) for path, leaf in leaves}


def identity(path: str, leaf: Any) -> Any:
    """A key that is equal for tied leaves, which are one array."""
    return id(leaf) if isinstance(leaf, (jax.Array, np.ndarray)) else path


def _plan(
    path: str, leaf: Any, rule: Rule | None, sites: Sites | None, uses: tuple[Site, ...]
) -> Plan:
    def kept(reason: str) -> Plan:
        return Plan(path, rule, f"kept: {reason}", sites=uses)

    if is_qtensor(leaf):
        return kept(f"already quantized ({leaf.spec.format.name})")
    if rule is None:
        return kept("no rule matches")
    if rule.skip:
        return kept("rule says skip")
    if not _is_float(leaf):
        return kept(f"not a float array ({_dtype(leaf)})")
    if jnp.dtype(leaf.dtype).itemsize == 1:
        return kept(f"{_dtype(leaf)} is narrow already")
    if not leaf.shape:
        return kept("a scalar")
    lookups = [site for site in uses if site.primitive == "gather"]
    contractions = [site for site in uses if site.primitive != "gather"]
    if sites is not None and not uses:
        met = sites.met.get(path)
        return kept("no contraction" + (f" (met {met})" if met else ""))
    table = bool(lookups) and rule.lookup is not None
    spec = rule.lookup if table else rule.weights
    if spec is None:
        return kept("the rule sets no weights")

    ordered = (*contractions, *lookups)
    notes: tuple[str, ...] = ()
    if len({site.contracted for site in contractions}) > 1:
        notes = (f"contracted over axes {_say(contractions)} at its sites; scales fit the first",)
    ndim = len(leaf.shape)
    contracted = ordered[0].contracted if ordered else None
    batch = min((_prefix(site.scanned) for site in uses), default=0)
    where = f"{shown(path)} (float array of shape {list(leaf.shape)}), {rule!r}"
    local = localize(spec, contracted, ndim, batch, where)
    core = leaf.shape[batch:]
    try:
        blocks = local.resolve(core).blocks
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if local != spec and math.prod(blocks) == 1 and math.prod(core) > 0 and _is_open(spec):
        return kept("every value would need its own scale")
    conv = bool(ordered) and ordered[0].primitive == "conv_general_dilated"
    storage_last_axes = () if conv else tuple(a - batch for a in contracted or () if a >= batch)
    words = describe(spec)
    words += (
        f", activations {_short(rule.activations)}" + (" static" if rule.observer else "")
        if rule.activations and (contractions or not uses)
        else ""
    )
    words += " (looked up)" if lookups and not contractions else ""
    return Plan(path, rule, words, local, storage_last_axes, batch, uses, notes, table)


def _is_open(spec: QSpec) -> bool:
    gran = spec.granularity
    return (isinstance(gran, PerChannel) and gran.axes is None) or (
        isinstance(gran, PerGroup) and gran.axis is None and gran.size > 1
    )


def _say(sites: Sequence[Site]) -> str:
    return " and ".join(str(list(c)) for c in dict.fromkeys(site.contracted for site in sites))


def _prefix(scanned: tuple[int, ...]) -> int:
    """The number of leading axes that are all scanned over."""
    count = 0
    while count in scanned:
        count += 1
    return count


def _is_float(leaf: Any) -> bool:
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return False
    return not is_qtensor(leaf) and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _dtype(leaf: Any) -> str:
    dtype = getattr(leaf, "dtype", None)
    return type(leaf).__name__ if dtype is None else str(dtype)


def _nearest(key: str, keys: Iterable[str], kind: str = "parameters") -> str:
    """The keys nearest to an unmatched one, for an error message.

    Takes the keys that share most of its parts, ordered by similar spelling.

    >>> _nearest("**/mlp/kernels", ["kernel", "head/kernel", "a/mlp/kernel", "a/mlp/bias"])
    '; nearest: a/mlp/kernel, a/mlp/bias'
    """
    parts = {part for part in key.split("/") if part.strip("*")}
    shared: dict[int, list[str]] = {}
    for k in keys:
        shared.setdefault(len(parts & set(k.split("/"))), []).append(k)
    if not shared:
        return f"; there are no {kind}"
    near = difflib.get_close_matches(key, shared[max(shared)], n=3, cutoff=0.0)
    return f"; nearest: {', '.join(map(shown, near))}"


def describe(spec: QSpec) -> str:
    """A spec in words.

    >>> describe(QSpec("int4", PerGroup(64))), describe(QSpec("mxfp4"))
    ('int4 in groups of 64', 'mxfp4 in groups of 32')
    """
    name, gran = _short(spec), spec.granularity
    if isinstance(gran, PerTensor):
        words = f"{name} per tensor"
    elif isinstance(gran, PerChannel):
        words = f"{name} per channel" if gran.size == 1 else f"{name} per {gran.size} channels"
    elif isinstance(gran, PerGroup):
        words = f"{name} in groups of {gran.size}"
    else:
        assert isinstance(gran, PerBlock)
        words = f"{name} in blocks of {gran.rows} x {gran.cols}"
    words += ", scales quantized" if spec.double else ""
    return words if spec.symmetric else f"{words}, asymmetric"


def _short(spec: QSpec) -> str:
    return spec.name.removeprefix("float8_")
