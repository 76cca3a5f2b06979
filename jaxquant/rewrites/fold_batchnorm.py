"""`fold_batchnorm`: finds BatchNorms and the kernels before them by tracing, and folds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import linen, nnx

from jaxquant.interpret.calls import trace_call
from jaxquant.interpret.sites import path_str
from jaxquant.qtensor import is_qtensor
from jaxquant.report import shown
from jaxquant.report.text import table
from jaxquant.rewrites.batchnorm import BatchNormSite, fold_site
from jaxquant.rewrites.forms import Form, form_of, opaque
from jaxquant.rewrites.graph import Node, graph_of
from jaxquant.rewrites.match import elsewhere, producer_of, roles_of, site_of


@dataclasses.dataclass(frozen=True)
class BatchNormFold:
    """Whether and where one BatchNorm was folded.

    Attributes:
      path: key path of the BatchNorm: that of its scale, or else of its variance, without the
        last part.
      folded: whether its scale was moved into a kernel.
      reason: why not; empty if folded.
      kernel: key path of the kernel that feeds it, if any.
    """

    path: str
    folded: bool
    reason: str = ""
    kernel: str | None = None


class FoldReport(tuple[BatchNormFold, ...]):
    """A tuple of records, one for each BatchNorm in the order of execution; prints as a table.

    >>> print(FoldReport([BatchNormFold("bn", True, kernel="w"), BatchNormFold("b", False, "why")]))
    BatchNorm  kernel  folded
    --------------------------
    bn         w       yes
    b          -       no: why
    """

    __slots__ = ()

    def __str__(self) -> str:
        rows = [
            (shown(r.path), "-" if r.kernel is None else shown(r.kernel), _folded(r)) for r in self
        ]
        return "\n".join(table(("BatchNorm", "kernel", "folded"), rows, 3))


def _folded(record: BatchNormFold) -> str:
    return "yes" if record.folded else f"no: {record.reason}"


def fold_batchnorm(
    fn: Callable[..., Any], params: Any, *args: Any, kwargs: Mapping[str, Any] | None = None
) -> tuple[Any, FoldReport]:
    """Moves the scale of every BatchNorm into the kernel before it, if there is just one.

    With `a = scale / sqrt(var + eps)`, per channel, the kernel becomes `a kernel` and the
    BatchNorm the identity plus a shift:

        var = 1 - eps,  mean = 0,  scale = 1,  bias = (kernel_bias - mean) a + bias,

    and `kernel_bias = 0`; without a bias, the mean takes the shift. The new params give
    the same results but for rounding, and the tree keeps its structure, shapes and dtypes.

    BatchNorms are found by tracing `fn` once, not by names: a `dot_general` or convolution whose
    kernel is a parameter, an optional bias, layout operations, then any arithmetic equal to
    `(y - mean) / sqrt(var + eps) * scale + bias` with parameters for all but `y` and `eps`, with
    or without scale and bias: Linen, NNX or written by hand. In a `scan` over layers, kernel and
    BatchNorm are folded layer by layer. A BatchNorm is not folded if it is fed by anything else (a
    sum, an activation) or by a kernel that is computed or used more than once, if its input or
    parameters are used or returned elsewhere, or if it normalises by batch statistics.

    An NNX model is folded by `jaxquant.nnx.fold_batchnorm`.

    Args:
      fn: any traceable function whose first argument is a params pytree, for Linen
        `model.apply` with all variables; in inference mode.
      params: its float parameters, including running statistics; not changed.
      *args: the other arguments to trace with, arrays or `jax.ShapeDtypeStruct`s.
      kwargs: keyword arguments of `fn`, likewise.

    Returns:
      The new params, and a record for each BatchNorm in the order of execution.

    Raises:
      ValueError: nothing can be folded, with the reasons; a variance plus `eps` is not positive;
        or `fn` cannot be traced with `params`.

    Source: Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, section 3.2.

    >>> import jax.numpy as jnp
    >>> def fn(p, x):
    ...     y = (x @ p["w"] - p["mean"][None]) / jnp.sqrt(p["var"][None] + 0.5)
    ...     return y + p["bias"][None]
    >>> stats = {"mean": jnp.ones(2), "var": jnp.full(2, 3.5), "bias": jnp.zeros(2)}
    >>> params, info = fold_batchnorm(fn, {"w": jnp.eye(2), **stats}, jnp.ones((1, 2)))
    >>> params["w"].tolist(), params["bias"].tolist(), params["var"].tolist()
    ([[0.5, 0.0], [0.0, 0.5]], [-0.5, -0.5], [0.5, 0.5])
    """
    _require_function(fn)
    if not callable(fn):
        raise ValueError(
            f"fold_batchnorm: expected a function of params first, got a {type(fn).__name__}"
        )
    flat = jax.tree.leaves_with_path(params, is_leaf=is_qtensor)
    leaves = {path_str(path): leaf for path, leaf in flat}
    sites, info = find_batchnorms(fn, params, args, kwargs)
    if not sites:
        raise ValueError(f"fold_batchnorm: {_nothing(info)}")
    new: dict[str, Any] = {}
    for site in sites:
        new.update(fold_site(leaves, site))
    params = jax.tree.map_with_path(
        lambda path, leaf: new.get(path_str(path), leaf), params, is_leaf=is_qtensor
    )
    return params, FoldReport(info)


def _require_function(fn: Any) -> None:
    kind = type(fn).__name__
    if isinstance(fn, linen.Module):
        raise ValueError(
            f"fold_batchnorm: expected a function of params first, got the Linen module {kind}; "
            "pass its apply, with all variables: fold_batchnorm(model.apply, variables, x)"
        )
    if isinstance(fn, nnx.Module):
        raise ValueError(
            f"fold_batchnorm: expected a function of params first, got the NNX module {kind}; "
            "call jaxquant.nnx.fold_batchnorm(model, x)"
        )


def find_batchnorms(
    fn: Callable[..., Any], params: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> tuple[tuple[BatchNormSite, ...], tuple[BatchNormFold, ...]]:
    """The sites that `fold_batchnorm` folds, and a record for every BatchNorm."""
    call = trace_call(fn, params, args, kwargs)
    quantized = {p for p, leaf in zip(call.paths, call.leaves, strict=True) if is_qtensor(leaf)}
    nodes = graph_of(call).nodes
    order = {id(node): n for n, node in enumerate(nodes)}
    done: set[int] = set()  # values inside a BatchNorm that was found
    ends: dict[int, _Match] = {}
    while True:
        # a BatchNorm may feed another, which then has the first one's result as its base
        candidates = _matches(nodes, ends, quantized)
        fresh = [m for m in candidates if not done & m.chain]
        fresh.sort(key=lambda m: (m.reason == "", order[id(m.end)]), reverse=True)
        if not fresh:
            break
        for match in fresh:
            if not done & match.chain:
                ends[id(match.end)] = match
                done |= match.chain
    matches = sorted(ends.values(), key=lambda m: order[id(m.end)])
    records = [(order[id(m.end)], m.record) for m in matches]
    records += [(order[id(n)], r) for n, r in _of_batches(nodes)]
    info = tuple(dict.fromkeys(r for _, r in sorted(records, key=lambda r: r[0])))
    return tuple(m.site for m in matches if m.site is not None and not m.reason), info


@dataclasses.dataclass(frozen=True)
class _Match:
    """A value that is a BatchNorm of its base."""

    end: Node
    chain: frozenset[int]  # the values after the base, to the end
    record: BatchNormFold
    site: BatchNormSite | None

    @property
    def reason(self) -> str:
        return self.record.reason


def _matches(
    nodes: Sequence[Node], ends: Mapping[int, _Match], quantized: set[str | None]
) -> list[_Match]:
    """Every value that is a BatchNorm of its base, including prefixes of longer ones."""
    forms: dict[Node, Form] = {}
    chains: dict[Node, frozenset[int]] = {}
    shapes = {node.detail: node.shape for node in nodes if node.op == "leaf"}
    matches = []
    for node in nodes:
        forms[node] = form = opaque(node) if id(node) in ends else form_of(node, forms)
        if form.base is None or form.base is node:
            continue
        before = [p for p in node.parents if p in forms and forms[p].base is form.base]
        chains[node] = chains.get(before[0], frozenset()) | {id(node)} if before else frozenset()
        roles = roles_of(form.factor, form.shift)
        if roles is None:
            continue
        kernel, reason = producer_of(form.base, forms)
        if id(form.base) in ends:
            reason = "it is fed by another BatchNorm, not by a contraction with a kernel"
        site = None
        if kernel is not None:
            site, reason = site_of(roles, form, kernel, shapes)
            reason = reason or elsewhere(node, form.base, kernel)
            if quantized & {kernel.path, *roles.paths}:
                reason = "its parameters are quantized already"
        path = kernel.path if kernel is not None else None
        where = _above(roles.scale or roles.var)
        record = BatchNormFold(where, not reason, reason, path)
        matches.append(_Match(node, chains[node], record, site))
    return matches


def _of_batches(nodes: Iterable[Node]) -> list[tuple[Node, BatchNormFold]]:
    """BatchNorms in training mode: per channel, a scale times a root of computed values."""
    forms: dict[Node, Form] = {}
    records = []
    for node in nodes:
        forms[node] = form_of(node, forms)
        if node.op not in ("mul", "div"):
            continue
        for root, scale in (node.parents, node.parents[::-1]):
            base, path = forms[root].base, forms[scale].leaf
            per_channel = root.shape == scale.shape and any(n > 1 for n in root.shape)
            if base is not None and base.op in ("rsqrt", "sqrt") and path and per_channel:
                reason = "it normalises by statistics of its batch (training mode)"
                records.append((node, BatchNormFold(_above(path), False, reason)))
    return records


def _above(path: str) -> str:
    return path.rpartition("/")[0] or path


def _nothing(info: Iterable[BatchNormFold]) -> str:
    reasons = [f"{record.path}: {record.reason}" for record in info]
    if not reasons:
        return (
            "no BatchNorm with running statistics among the params was found; expected "
            "(y - mean) / sqrt(var + eps) * scale + bias of a contraction y, all others params"
        )
    return "nothing can be folded; " + "; ".join(reasons)
