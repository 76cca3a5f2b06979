"""Plans integer inference: which contraction passes its result to which as integers.

The quantized call is evaluated once, abstractly. Every result has an output grid, so that it stays
integer as far as operations allow.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant import ops
from jaxquant.interpret.calls import Call
from jaxquant.interpret.evaluate import Interpreter
from jaxquant.interpret.serve import Serve
from jaxquant.interpret.values import Facts, Value
from jaxquant.qtensor import Calibration, QSpec, QTensor, QuantParams, is_qtensor
from jaxquant.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Chain:
    """The operations on a contraction's sums before they become codes.

    Attributes:
      gain: float32, broadcasts with the sums; `None` is 1.
      bias: float32 likewise; `None` is 0.
      steps: names of the operations, as in `Accumulator.chain`.
      channels: axes of the result that come from the weight.
    """

    gain: Any
    bias: Any
    steps: tuple[str, ...]
    channels: tuple[int, ...]


class Planner(Serve):
    """The policy that records where results of contractions go.

    Attributes:
      edges: `(source, target)` of results that reach the next contraction as integers -> whether
        they must be on its grid: not if they are added to a result that is.
      arrays: for edges that must be, the id of the codes that the target contracts.
      exits: `(source, where)` of results that become float -> the reason.
      ends: for each site, by the call path of each use of its sums, the chain up to there; `None`
        if that depends on more than concrete params.
    """

    ahead = True

    def __init__(self, recipe: Recipe, as_it_is: bool = False) -> None:
        super().__init__(recipe.attention)
        self.as_it_is = as_it_is
        self.uniform = False
        self.edges: dict[tuple[str, str], bool] = {}
        self.arrays: dict[tuple[str, str], int] = {}
        self.exits: dict[tuple[str, str], str] = {}
        self.ends: dict[str, dict[tuple[int, ...], Chain | None]] = {}
        self._coded: dict[str, set[tuple[int, ...]]] = {}
        self._taken: dict[int, Any] = {}
        self._other: list[tuple[tuple[str, ...], Any]] = []

    def on_grid(self, x: ops.Activation, q: QTensor) -> bool:
        """Accepts any grid: grids are chosen after the walk."""
        return not self.as_it_is or super().on_grid(x, q)

    def edge(self, ip: Interpreter, operand: Any, x: ops.Activation, target: str) -> None:
        """Records where a result stays integer."""
        for source in x.source:
            self.edges[source, target] = True
            self.arrays[source, target] = id(x.codes)
        for source in x.added:
            self.edges.setdefault((source, target), False)
        if isinstance(operand, ops.Accumulator):
            self._end(ip, operand, coded=True)
        else:
            self._taken[id(x.codes)] = x

    def leaves(self, ip: Interpreter, data: Any, where: str | None, reason: str) -> None:
        """Records where a result becomes float."""
        if isinstance(data, ops.Activation):
            keys = (*data.source, *data.added)
            self._other.append((data.source, data))
        else:
            keys = (data.key,)
            self._end(ip, data, coded=False)
        if where is not None:  # the function's own results are to be float
            for source in keys:
                self.exits[source, where] = reason

    def kept(self, ip: Interpreter, eqn: Any, operands: list[Value], results: list[Any]) -> None:
        """Records where sums become codes, and where codes are added to sums."""
        if any(isinstance(r, ops.Accumulator) for r in results):
            return
        integers = [v.data for v in operands if ops.is_integers(v.data)]
        for x in integers:
            if isinstance(x, ops.Accumulator):
                self._end(ip, x, coded=True)
            elif any(isinstance(y, ops.Accumulator) for y in integers):
                self._other.append((x.source, x))

    def jit_key(self, ip: Interpreter, facts: list[Facts], scope: tuple[str, ...]) -> tuple | None:
        """Helpers are evaluated in place: values stay concrete, arrays keep their identity."""
        return None

    def _end(self, ip: Interpreter, sums: ops.Accumulator, coded: bool) -> None:
        traced = any(isinstance(v, jax.core.Tracer) for v in (sums.gain, sums.bias))
        chain = None if traced else Chain(sums.gain, sums.bias, sums.chain, sums.channels)
        self.ends.setdefault(sums.key, {})[ip.call_path] = chain
        if coded:
            self._coded.setdefault(sums.key, set()).add(ip.call_path)

    def chain(self, key: str) -> Chain | None:
        """The chain of a site's sums, if they have one use and it is known; else `None`."""
        ends = list(self.ends.get(key, {}).values())
        return ends[0] if len(ends) == 1 else None

    def clips(self, key: str) -> bool:
        """Whether the grid of one use of a site's results would clip values that another needs.

        The grid covers the range of a contraction's input; only that input is sure to be within.
        So the sums may become codes in one place only, and every other use of the codes must read
        the same array as the contraction.
        """
        if len(self._coded.get(key, ())) > 1:
            return True
        return any(key in source and id(x.codes) not in self._taken for source, x in self._other)


def plan(call: Call, recipe: Recipe, *, as_it_is: bool = False) -> Planner:
    """Walks a call with quantized params; nothing that depends on its inputs is computed.

    With `as_it_is`, by the grids that the params have, to see which results do stay integer.
    """
    planner = Planner(recipe, as_it_is)
    interpreter = Interpreter(planner, call.param_paths)
    inputs = [leaf for leaf, path in zip(call.leaves, call.paths, strict=True) if path is None]

    def run(inputs: list[Any]) -> None:
        rest = iter(inputs)
        leaves = [
            next(rest) if path is None else leaf if as_it_is else _open(leaf)
            for leaf, path in zip(call.leaves, call.paths, strict=True)
        ]
        call.run(interpreter, leaves)

    jax.eval_shape(run, inputs)
    return planner


def _open(leaf: Any) -> Any:
    """The leaf with a placeholder output grid, so that its results may stay integer."""
    if not is_qtensor(leaf) or leaf.contraction.requantize is None or leaf.calibration is None:
        return leaf
    calibration: Calibration = leaf.calibration
    assert calibration.input is not None
    like = calibration.input.scale
    grid = QuantParams(jnp.ones_like(like), jnp.zeros_like(like, jnp.int32), QSpec("int8"), "?")
    return dataclasses.replace(leaf, calibration=dataclasses.replace(calibration, output=grid))
