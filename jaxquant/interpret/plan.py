"""Planning of integer inference: which contraction hands its result to which, as integers.

One abstract evaluation of the quantized call in which every result has an output grid, so that it
stays integer as far as operations allow.
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
    """What is done to the sums of a contraction before they become codes.

    Attributes:
      gain: float32, laid out to broadcast with the sums; `None` is 1.
      bias: float32 likewise; `None` is 0.
      steps: the primitives, as `Accumulator.chain` has them.
      channels: axes of the result that the weight gives it.
    """

    gain: Any
    bias: Any
    steps: tuple[str, ...]
    channels: tuple[int, ...]


class Planner(Serve):
    """The policy that notes where results of contractions go.

    Attributes:
      edges: `(source, target)` of results that are the next contraction's input as integers, and
        whether they have to be on its grid: they have not if added to what is.
      arrays: for those that have to be, which array it is that is taken.
      exits: `(source, where)` of results that become float, and why.
      ends: for each site, its sums wherever they are used, by call path: with what was done to
        them up to there, or `None` where that depends on more than concrete params.
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
        """Any integers will do: grids are chosen once it is known who takes what."""
        return not self.as_it_is or super().on_grid(x, q)

    def edge(self, ip: Interpreter, given: Any, x: ops.Activation, target: str) -> None:
        """Notes where a result stays integer."""
        for source in x.source:
            self.edges[source, target] = True
            self.arrays[source, target] = id(x.codes)
        for source in x.added:
            self.edges.setdefault((source, target), False)
        if isinstance(given, ops.Accumulator):
            self._end(ip, given, coded=True)
        else:
            self._taken[id(x.codes)] = x

    def leaves(self, ip: Interpreter, data: Any, where: str | None, reason: str) -> None:
        """Notes where a result becomes float."""
        if isinstance(data, ops.Activation):
            held = (*data.source, *data.added)
            self._other.append((data.source, data))
        else:
            held = (data.key,)
            self._end(ip, data, coded=False)
        if where is not None:  # the function's results are float, as they should
            for source in held:
                self.exits[source, where] = reason

    def kept(self, ip: Interpreter, eqn: Any, operands: list[Value], results: list[Any]) -> None:
        """Notes where sums become codes, and where codes are added to sums."""
        if any(isinstance(r, ops.Accumulator) for r in results):
            return
        given = [v.data for v in operands if ops.is_integers(v.data)]
        for x in given:
            if isinstance(x, ops.Accumulator):
                self._end(ip, x, coded=True)
            elif any(isinstance(y, ops.Accumulator) for y in given):
                self._other.append((x.source, x))

    def jit_key(self, ip: Interpreter, facts: list[Facts], scope: tuple[str, ...]) -> tuple | None:
        """Helpers are walked in place: what is known stays known, arrays keep their identity."""
        return None

    def _end(self, ip: Interpreter, sums: ops.Accumulator, coded: bool) -> None:
        traced = any(isinstance(v, jax.core.Tracer) for v in (sums.gain, sums.bias))
        chain = None if traced else Chain(sums.gain, sums.bias, sums.chain, sums.channels)
        self.ends.setdefault(sums.key, {})[ip.call_path] = chain
        if coded:
            self._coded.setdefault(sums.key, set()).add(ip.call_path)

    def chain(self, key: str) -> Chain | None:
        """What is done to the sums of a site, if it is one thing and known beforehand."""
        ends = list(self.ends.get(key, {}).values())
        return ends[0] if len(ends) == 1 else None

    def clips(self, key: str) -> bool:
        """Whether some use of a site's results would miss what is beyond the grid of another.

        The grid has the range of what a contraction takes, and nothing else is sure to lie within.
        So the sums may become codes in one place only, and what else is done with the codes has to
        be done with the very array that a contraction takes.
        """
        if len(self._coded.get(key, ())) > 1:
            return True
        return any(key in source and id(x.codes) not in self._taken for source, x in self._other)


def plan(call: Call, recipe: Recipe, *, as_it_is: bool = False) -> Planner:
    """Walks a call whose params are quantized, without computing anything of its inputs.

    With `as_it_is`, by the grids that the params have, to see what really stays integer.
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
    """A leaf whose results may stay integers, whoever takes them."""
    if not is_qtensor(leaf) or leaf.contraction.requantize is None or leaf.calibration is None:
        return leaf
    held: Calibration = leaf.calibration
    assert held.input is not None
    like = held.input.scale
    anything = QuantParams(jnp.ones_like(like), jnp.zeros_like(like, jnp.int32), QSpec("int8"), "?")
    return dataclasses.replace(leaf, calibration=dataclasses.replace(held, output=anything))
