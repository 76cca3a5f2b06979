"""Says once where a quantized model is slower than float, and which preset is known to be faster.

What contractions take is added up over the model: the float time of each, estimated from its shape,
times what was measured for its kind (`jaxquant.ops.speed`). What is not known counts as float's
time, so that nothing is said of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant.interpret.evaluate import Interpreter
from jaxquant.interpret.loops import Scope, scan
from jaxquant.interpret.policy import Contraction, param_first
from jaxquant.interpret.record import Recorder, dimensions
from jaxquant.interpret.sites import Sites, path_str
from jaxquant.interpret.values import Value
from jaxquant.ops.speed import Load, Op, kind_of, ratio
from jaxquant.qtensor import QTensor, is_qtensor
from jaxquant.recipe import (
    Recipe,
    as_recipe,
    fp4,
    mxfp4,
    nf4,
    w4a8,
    w4a16,
    w8a8,
    w8a8_fp8,
    w8a16,
)
from jaxquant.report import Report

SLOWER, FASTER = 1.15, 0.9  # figures are good to a digit

# Those that need nothing but the params.
_CHOICES = (w8a8, w8a16, w4a8, w4a16, nf4, fp4, w8a8_fp8, mxfp4)


def _counted(
    ip: Interpreter, eqn: Any, operands: list[Value], positive: list[bool], scope: Scope
) -> list[Value]:
    """A loop whose length is known."""
    assert isinstance(ip.policy, Meter)
    ip.policy.lengths.append(eqn.params["length"])
    try:
        return scan(ip, eqn, operands, positive, scope)
    finally:
        ip.policy.lengths.pop()


class Meter(Recorder):
    """Records sites, and how much each of those with a parameter computes.

    Attributes:
      loads: how much, by key of the site.
      lengths: of the scans around the equation that is recorded.

    >>> from jaxquant.interpret.calls import trace_call
    >>> from jaxquant.interpret.record import sites_of
    >>> meter = Meter()
    >>> call = trace_call(lambda w, x: x @ w, jnp.ones((3, 2)), (jnp.ones((4, 3)),), {})
    >>> _ = sites_of(call, meter)
    >>> meter.loads[""]
    Load(op='dense', rows=4, summed=3, weights=6, calls=1)
    """

    rules: ClassVar = {"scan": _counted}

    def __init__(self) -> None:
        super().__init__()
        self.loads: dict[str, Load] = {}
        self.lengths: list[int] = []

    def contract(self, ip: Interpreter, site: Contraction) -> Any:
        """Notes the site and its load."""
        result = super().contract(ip, site)
        for key in site.keys:
            found = self.sites.get(key)
            if found is not None and found.param is not None:
                weight = [n for a, n in enumerate(found.shape) if a not in found.scanned]
                load = _load(site, weight, math.prod(self.lengths))
                if load is not None:
                    self.loads[key] = load
        return result


def _load(site: Contraction, weight: Sequence[int], calls: int) -> Load | None:
    """The load of one contraction with a weight of this shape; `None` where sizes are symbolic."""
    eqn, side = site.eqn, "lhs" if param_first(site.lhs, site.rhs)[0] is site.lhs else "rhs"
    shape = jnp.shape((site.lhs if side == "lhs" else site.rhs).data)
    result = eqn.outvars[0].aval.shape
    if not all(isinstance(n, int) for n in (*shape, *result, calls)):
        return None
    contracted, batched = dimensions(eqn, side)
    summed = math.prod(shape[a] for a in contracted)
    kept = math.prod(n for a, n in enumerate(shape) if a not in contracted)  # batch axes too
    rows = math.prod(result) // kept if kept else 0
    op = None if batched else _op(eqn, side, shape)
    # an operand may be a slice of its parameter, or several parameters side by side
    return Load(op, rows, summed, min(math.prod(shape), math.prod(weight)), calls)


def _op(eqn: Any, side: str, shape: Sequence[int]) -> Op | None:
    """Which of the contractions that were measured an equation is."""
    p = eqn.params
    if eqn.primitive.name == "dot_general":
        return "dense"
    if eqn.primitive.name != "conv_general_dilated" or side == "lhs":
        return None
    if p["batch_group_count"] > 1 or any(n > 1 for n in p["lhs_dilation"]):
        return None
    groups, inputs = p["feature_group_count"], shape[p["dimension_numbers"].rhs_spec[1]]
    if groups == 1:
        return "conv"
    return "depthwise" if inputs == 1 else None


Ratios = tuple[float, float]
"""Time over float's, on the machine where it is least and where it is most."""

FLOAT: Ratios = (1.0, 1.0)


class _Part(NamedTuple):
    """One contraction with a parameter: its load, its time as it is, its parameter."""

    load: Load
    ratios: Ratios
    path: str
    q: QTensor | None


def speed_notes(
    meter: Meter, sites: Sites, qparams: Any, report: Report, platforms: Iterable[str]
) -> tuple[str, ...]:
    """At most one note for each platform: that contractions take longer than float's.

    With `t` the float time of a site and `r` what was measured for its kind, the figure is
    `sum t r / sum t` over all sites with a parameter. Slower is what is slower on every machine
    that was measured, and faster likewise. The preset that is named is, of those that are faster,
    nearest in bits to the weights that lose most, and of these the fastest.

    Args:
      meter: what recorded the sites.
      sites: those it recorded.
      qparams: the quantized params.
      report: on what was done to them.
      platforms: names of JAX's platforms.

    >>> import jaxquant as jq
    >>> w, x = (jax.ShapeDtypeStruct((n, 2048), "float32") for n in (2048, 1))
    >>> jq.ptq(lambda w, x: x @ w, w, jq.w8a8(), x, platforms="cpu")[1].notes
    ()
    """
    flat, _ = jax.tree.flatten_with_path(qparams, is_leaf=is_qtensor)
    leaves = {path_str(path): leaf for path, leaf in flat if is_qtensor(leaf)}
    notes = []
    for platform in platforms:
        parts = [
            _part(platform, load, sites[key].param or "", leaves, sites[key].dtype)
            for key, load in meter.loads.items()
        ]
        figure = _mean(parts, [part.ratios for part in parts])
        if figure[0] >= SLOWER:
            tables = {site.param for site in sites.sites if site.primitive == "gather"}
            notes.append(_words(platform, figure, parts, report, _faster(platform, parts, tables)))
    return tuple(notes)


def _mean(parts: Sequence[_Part], ratios: Sequence[Ratios]) -> Ratios:
    """Time of all contractions over float's, if each takes so much."""
    total = sum(part.load.time for part in parts)
    if not total:
        return FLOAT
    low, high = (
        sum(part.load.time * r[end] for part, r in zip(parts, ratios, strict=True)) / total
        for end in (0, 1)
    )
    return low, high


def _part(platform: str, load: Load, path: str, leaves: Mapping[str, QTensor], dtype: str) -> _Part:
    q = leaves.get(path) if dtype == "float32" else None  # other floats were not measured
    known = None
    if q is not None:
        kind = kind_of(q.spec, q.contraction.activations, q.contraction.outliers, load.summed)
        known = ratio(platform, load, kind)
    return _Part(load, known or FLOAT, path, q)


def _lost(part: _Part) -> float:
    """Time that a contraction takes beyond float's, at the least."""
    return part.load.time * (part.ratios[0] - 1)


def _faster(
    platform: str, parts: Sequence[_Part], tables: set[str | None]
) -> tuple[Ratios, str] | None:
    """The preset to name, and its time over float's."""
    slowest = max(parts, key=_lost).q
    assert slowest is not None
    bits = slowest.spec.format.bits
    found: list[tuple[int, float, Ratios, str]] = []
    for make in _CHOICES:
        recipe = as_recipe(make(), "ptq")
        spec = recipe.rules[0].weights
        figure = _mean(parts, [_by(recipe, platform, part, tables) for part in parts])
        if spec is not None and figure[1] <= FASTER:
            found.append((abs(spec.format.bits - bits), sum(figure), figure, recipe.title))
    if not found:
        return None
    _, _, figure, name = min(found)
    return figure, name


def _by(recipe: Recipe, platform: str, part: _Part, tables: set[str | None]) -> Ratios:
    """The time of one contraction by a preset; what is in float stays there."""
    rule = recipe.rules[0]
    spec = rule.lookup if rule.lookup is not None and part.path in tables else rule.weights
    if part.q is None or spec is None:
        return FLOAT
    kind = kind_of(spec, rule.activations, None, part.load.summed)
    return ratio(platform, part.load, kind) or FLOAT


def _words(
    platform: str,
    figure: Ratios,
    parts: Sequence[_Part],
    report: Report,
    instead: tuple[Ratios, str] | None,
) -> str:
    lost: dict[str, float] = {}
    slow = [part for part in parts if part.ratios[0] > 1]
    for part in slow:
        what = _what(part, report)
        lost[what] = lost.get(what, 0.0) + _lost(part)
    worst = max(lost, key=lambda what: lost[what])
    of = [part.load for part in slow if _what(part, report) == worst]
    text = (
        f"speed: on a {platform.upper()}, {worst} {_rows(of)} saves memory, not time: "
        f"the layers take about {_times(figure)} float's time"
    )
    if instead is None:
        return f"{text}, and no preset is known to be faster than float here"
    return f"{text}; {instead[1]}() takes about {_times(instead[0])}"


def _what(part: _Part, report: Report) -> str:
    """How a parameter is quantized, in words."""
    assert part.q is not None
    row = report[part.path]
    return row.action if row.quantized else part.q.spec.format.name  # that one was before


def _times(ratios: Ratios) -> str:
    """Times in words, as good as they are.

    >>> _times((0.31, 0.34)), _times((1.26, 2.7)), _times((12.3, 12.4))
    ('0.3 times', '1.3 to 2.7 times', '12 times')
    """
    low, high = (f"{r:.1f}" if r < 9.95 else f"{r:.0f}" for r in ratios)
    return f"{low} times" if low == high else f"{low} to {high} times"


def _rows(loads: Sequence[Load]) -> str:
    """At how many rows, or in which kind of convolutions."""
    ops = {load.op for load in loads}
    if "dense" not in ops:
        return f"in {'depthwise ' if ops == {'depthwise'} else ''}convolutions"
    rows = [load.rows for load in loads if load.op == "dense"]
    low, high = min(rows), max(rows)
    text = f"{low} to {high} rows" if low < high else f"{low} row{'' if low == 1 else 's'}"
    text = f"at {text}"
    return text + (" and in convolutions" if len(ops) > 1 else "")
