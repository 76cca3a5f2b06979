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
from jaxquant.qtensor import Calibration, Grid, QTensor, is_qtensor
from jaxquant.recipe import Recipe

_ANY = "?"


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
      exits: `(source, where)` of results that become float, and why.
      chains: for each site, what is done to its sums, where that is known beforehand: where it
        follows from the params alone, outside of loops and jitted helpers.
    """

    ahead = True

    def __init__(self, recipe: Recipe, as_it_is: bool = False) -> None:
        super().__init__(recipe.attention)
        self.as_it_is = as_it_is
        self.uniform = False
        self.edges: dict[tuple[str, str], bool] = {}
        self.exits: dict[tuple[str, str], str] = {}
        self.chains: dict[str, Chain] = {}

    def on_grid(self, x: ops.Activation, q: QTensor) -> bool:
        """Any integers will do: grids are chosen once it is known who takes what."""
        return not self.as_it_is or super().on_grid(x, q)

    def edge(self, x: ops.Activation, target: str) -> None:
        """Notes where a result stays integer."""
        for source in x.source:
            self.edges[source, target] = True
        for source in x.added:
            self.edges.setdefault((source, target), False)

    def leaves(self, data: Any, where: str, reason: str) -> None:
        """Notes where a result becomes float."""
        if where.startswith("the result"):
            return  # as it should
        held = (*data.source, *data.added) if isinstance(data, ops.Activation) else (data.key,)
        for source in held:
            self.exits[source, where] = reason

    def summed(self, data: Any) -> None:
        """Notes what has been done to sums so far."""
        if isinstance(data, ops.Accumulator):
            vectors = data.gain, data.bias
            if not any(isinstance(v, jax.core.Tracer) for v in vectors):
                self.chains[data.key] = Chain(*vectors, data.chain, data.channels)


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
    if not is_qtensor(leaf) or leaf.use.requantize is None or leaf.calibration is None:
        return leaf
    held: Calibration = leaf.calibration
    assert held.input is not None
    anything = Grid(jnp.ones_like(held.input.scale), jnp.zeros_like(held.input.scale, jnp.int32))
    return dataclasses.replace(
        leaf,
        use=dataclasses.replace(leaf.use, output=_ANY),
        calibration=dataclasses.replace(held, output=anything),
    )
