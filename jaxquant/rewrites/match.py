"""Recognizes a BatchNorm by the form of a value, and finds the kernel that feeds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxquant.rewrites.batchnorm import BatchNormSite
from jaxquant.rewrites.forms import ONE, Form, Monomial, Polynomial, product
from jaxquant.rewrites.graph import Node


@dataclasses.dataclass(frozen=True)
class Roles:
    """The role of each leaf in `(base + kernel_bias - mean) rsqrt(var + eps) scale + bias`."""

    var: str
    eps: float
    mean: str
    scale: str | None
    bias: str | None
    kernel_bias: str | None

    @property
    def paths(self) -> list[str]:
        """Key paths of all leaves."""
        named = (self.mean, self.var, self.scale, self.bias, self.kernel_bias)
        return [path for path in named if path is not None]


def roles_of(factor: Polynomial, shift: Polynomial) -> Roles | None:
    """The roles of the leaves of a BatchNorm; `None` if the polynomials are not those of one."""
    if list(factor.values()) != [1.0]:
        return None
    [a] = factor
    roots = [path_eps for path_eps, power in a if path_eps[1] is not None and power == 1]
    scales = [path for (path, eps), power in a if eps is None and power == 1]
    if len(roots) != 1 or len(scales) > 1 or len(a) != len(roots) + len(scales):
        return None
    rest: dict[str, str | None] = dict.fromkeys(("mean", "bias", "kernel_bias"))
    for monomial, times in shift.items():
        # a leaf alone, or a leaf times the factor
        for role, sign, by in (("bias", 1.0, ONE), ("mean", -1.0, a), ("kernel_bias", 1.0, a)):
            leaf = _quotient(monomial, by)
            if leaf is not None and times == sign and rest[role] is None:
                rest[role] = leaf
                break
        else:
            return None
    [(var, eps)] = roots
    if rest["mean"] is None or eps is None:
        return None
    scale = scales[0] if scales else None
    roles = Roles(var, eps, rest["mean"], scale, rest["bias"], rest["kernel_bias"])
    return roles if len(set(roles.paths)) == len(roles.paths) else None


def _quotient(monomial: Monomial, by: Monomial) -> str | None:
    """The leaf whose product with `by` is the monomial, or `None`."""
    inverse = {frozenset((v, -power) for v, power in by): 1.0}
    quotient = product({monomial: 1.0}, inverse)
    [variables] = quotient
    if len(variables) != 1:
        return None
    [((path, eps), power)] = variables
    return path if eps is None and power == 1 else None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The parameter that a contraction contracts.

    Attributes:
      path: its key path.
      shape: its shape.
      node: the operand: the parameter, possibly moved.
      axes: for each axis of the contraction's result, the same axis of the kernel, or `None`.
      loops: for each loop that slices the kernel, the axis that it slices.
    """

    path: str
    shape: tuple[int, ...]
    node: Node
    axes: tuple[int | None, ...]
    loops: Mapping[int, int]


def producer_of(base: Node, forms: Mapping[Node, Form]) -> tuple[Kernel | None, str]:
    """The kernel of the contraction that computes `base`, or why there is none."""
    if base.op not in ("dot_general", "conv_general_dilated"):
        return None, f"it is fed by `{base.op}`, not by a contraction with a kernel"
    leaves = [(n, x) for n, x in enumerate(base.parents[:2]) if forms[x].leaf is not None]
    if len(leaves) != 1:
        computed = any(forms[node].base is None for node in base.parents[:2])
        if computed:
            return None, "the kernel of the contraction that feeds it is computed"
        return None, "it is fed by a contraction that has no parameter as its kernel"
    [(at, node)] = leaves
    path = forms[node].leaf
    assert path is not None
    leaf = node
    while leaf.op != "leaf":
        leaf = leaf.parents[0]
    axis_at = {place: axis for axis, place in enumerate(forms[node].places[path])}
    outputs = _outputs(base, at, len(node.shape))
    axes = tuple(None if axis is None else axis_at.get(axis) for axis in outputs)
    loops = dict(forms[node].sliced.get(path, ()))
    return Kernel(path, leaf.shape, node, axes, loops), ""


def _outputs(contraction: Node, at: int, rank: int) -> list[int | None]:
    """For each axis of a contraction's result, the axis of operand `at` that it is, or `None`."""
    out: list[int | None] = [None] * len(contraction.shape)
    numbers = contraction.params["dimension_numbers"]
    if contraction.op == "conv_general_dilated":
        if at == 1:
            # specs are (batch, feature, *spatial), a kernel's (out, in, *spatial)
            out[numbers.out_spec[1]] = numbers.rhs_spec[0]
        return out
    summed, batch = numbers[0][at], numbers[1][at]
    free = [a for a in range(rank) if a not in (*summed, *batch)]
    first = len(batch) if at == 0 else len(out) - len(free)
    out[: len(batch)] = batch
    out[first : first + len(free)] = free
    return out


def site_of(
    roles: Roles, form: Form, kernel: Kernel, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[BatchNormSite | None, str]:
    """The site, if all leaves have the same axes of the kernel; else why not."""
    along: dict[str, tuple[int, ...]] = {}
    for path in roles.paths:
        loop_of = {axis: loop for loop, axis in form.sliced.get(path, ())}
        if set(loop_of.values()) != set(kernel.loops):
            return None, f"{path} and {kernel.path} are not scanned together"
        axes = []
        for axis, (size, place) in enumerate(zip(shapes[path], form.places[path], strict=True)):
            at: int | None = None
            if axis in loop_of:
                at = kernel.loops[loop_of[axis]]
            elif place is not None and (axis_of := form.axes[place]) is not None:
                at = kernel.axes[axis_of]
            if at is not None and kernel.shape[at] == size:
                axes.append(at)
            elif size != 1:
                return None, f"axis {axis} of {path} is no output axis of {kernel.path}"
        along[path] = tuple(axes)
    if len(set(along.values())) != 1:
        return None, f"{', '.join(along)} differ in shape or in the order of their axes"
    return BatchNormSite(kernel.path, along[roles.mean], **dataclasses.asdict(roles)), ""


def elsewhere(end: Node, base: Node, kernel: Kernel) -> str:
    """Another use of a value that a BatchNorm and its contraction read or compute, or empty."""
    inside: dict[int, Node] = {}
    stack = [end]
    while stack:
        node = stack.pop()
        if id(node) not in inside:
            inside[id(node)] = node
            stack += [kernel.node] if node is base else node.parents
    for node in inside.values():
        for reader in node.consumers:
            if node is end or node.op == "const" or id(reader) in inside:
                continue
            if node.op == "leaf":
                name = node.detail
            elif node is base:
                name = f"the output of {kernel.path}"
            else:
                name = "a part of it"
            use = "returned" if reader.op == "result" else f"used by another `{reader.op}`"
            return f"{name} is also {use}"
    return ""
