"""The policies of `capture`: find the activations that are contracted, then observe them.

`Finder` walks a call abstractly and records every operand that is an activation, with the slot of
its statistics. `Observe` evaluates the call and updates the statistics in these slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.interpret.calls import Call
from jaxquant.interpret.evaluate import Interpreter, abstract
from jaxquant.interpret.policy import Contraction, Policy, param_first
from jaxquant.interpret.reading import Reading
from jaxquant.interpret.record import both_live
from jaxquant.interpret.slots import Frame, Slot
from jaxquant.interpret.values import Facts, Value
from jaxquant.observers import Histogram, Observer
from jaxquant.ops import is_integers, over_divisor
from jaxquant.qtensor import dequantize, is_qtensor


@dataclasses.dataclass(frozen=True)
class Place:
    """An activation as an operand of one contraction.

    Attributes:
      slot: where its values live; `slot.name` is the operand, `lhs` or `rhs`.
      keys: the site's key; several where parameters were concatenated.
      params: paths of these parameters; `()` for a contraction without one.
      aval: shape and dtype of the operand as the contraction sees it, inside all loops.
      lead: lengths of the scans that `slot` is stacked over.
      array: places with equal numbers see the same array equally often.
      shut: why no value can leave the equation around it, or `None`.
      reading: how a parameter reads the activation; `None` for a contraction without one.
      rest: shapes and dtypes of the contraction's further operands.
    """

    slot: Slot
    keys: tuple[str, ...]
    params: tuple[str, ...]
    aval: jax.ShapeDtypeStruct
    lead: tuple[int, ...]
    array: int
    shut: str | None
    reading: Reading | None = None
    rest: tuple[jax.ShapeDtypeStruct, ...] = ()

    def seen(self, observer: Observer) -> jax.ShapeDtypeStruct:
        """Shape and dtype of what an observer is updated with: the array, or its rows."""
        if not observer.sees_rows:
            return self.aval
        if self.reading is None:
            key = self.keys[0]
            raise ValueError(f"{key!r}: {observer} needs a contraction with a parameter, got none")
        return self.reading.aval(self.aval, self.rest)


def places_of(call: Call) -> tuple[Place, ...]:
    """The activations that contractions of a traced call take, in execution order.

    A slot is stacked over each `scan` that slices the site's parameter; without a parameter, over
    each `scan` that slices any parameter contracted in it. Such a scan runs over layers. Any other
    one runs over time, and its steps share one value.
    """
    finder = Finder()
    interpreter = Interpreter(finder, call.param_paths)

    def run(*leaves: Any) -> None:
        call.run(interpreter, list(leaves))

    jax.eval_shape(run, *(abstract(leaf) for leaf in call.leaves))
    entries = list(finder.found.values())
    layers = {p.slot.path[: f.at + 1] for p, frames in entries for f in _over_layers(p, frames)}
    return tuple(_stacked(place, frames, layers) for place, frames in entries)


def _over_layers(place: Place, frames: tuple[Frame, ...]) -> list[Frame]:
    return [f for f in frames if f.params & set(place.params)]


def _stacked(place: Place, frames: tuple[Frame, ...], layers: set[tuple[int, ...]]) -> Place:
    over = _over_layers(place, frames)
    if not place.params:
        over = [f for f in frames if f.length is not None and place.slot.path[: f.at + 1] in layers]
    slot = Slot(place.slot.path, place.slot.name, tuple(f.at for f in over))
    return dataclasses.replace(place, slot=slot, lead=tuple(f.length or 0 for f in over))


def statistics_slot(slot: Slot) -> Slot:
    """The slot of an operand's statistics, apart from that of its other values."""
    return dataclasses.replace(slot, name=f"{slot.name} statistics")


class Finder(Policy):
    """The policy that records every activation that is contracted.

    Attributes:
      found: place and frames by slot. A loop that is traced again finds the same slots.
    """

    def __init__(self) -> None:
        self.found: dict[Slot, tuple[Place, tuple[Frame, ...]]] = {}
        self._arrays: dict[Any, tuple[int, Any]] = {}

    def contract(self, ip: Interpreter, site: Contraction) -> Any:
        """Records the operands; contracts as the function did."""
        lhs, rhs = site.lhs, site.rhs
        params = param_first(lhs, rhs)
        origin = params[0].facts.origin if params else None
        if origin is not None:
            other = ("rhs", rhs) if params[0] is lhs else ("lhs", lhs)
            self._note(ip, site, *other, tuple(part.path for part in origin.parts))
        elif site.eqn.primitive.name == "dot_general" and both_live(lhs, rhs):
            self._note(ip, site, "lhs", lhs, ())
            self._note(ip, site, "rhs", rhs, ())
        return super().contract(ip, site)

    def _note(
        self, ip: Interpreter, site: Contraction, name: str, value: Value, params: tuple[str, ...]
    ) -> None:
        slot = Slot(ip.call_path, name)
        if slot in self.found or not jnp.issubdtype(value.data.dtype, jnp.floating):
            return
        frames = ip.slots.frames
        # numbers an array within its frames; keeps it alive, so that its id stays unique
        array, _ = self._arrays.setdefault(
            (id(value.data), frames), (len(self._arrays), value.data)
        )
        aval = jax.ShapeDtypeStruct(value.data.shape, value.data.dtype)
        reading = None
        if params:
            weight = site.lhs if name == "rhs" else site.rhs
            shape = tuple(jnp.shape(weight.data))
            reading = Reading(site.eqn.primitive.name, site.eqn.params, name, shape)
        rest = tuple(jax.ShapeDtypeStruct(v.data.shape, v.data.dtype) for v in site.rest)
        place = Place(slot, site.keys, params, aval, (), array, ip.slots.shut, reading, rest)
        self.found[slot] = place, frames

    def jit_key(self, ip: Interpreter, facts: list[Facts], scope: tuple[str, ...]) -> tuple | None:
        """Helpers are evaluated in place, so that arrays keep their identity within them."""
        return None

    def enters_rules(self, ip: Interpreter, jaxpr: Any, operands: list[Value]) -> bool:
        """Custom rules are entered to find the sites inside."""
        return True


class Observe(Policy):
    """The policy that updates statistics, and contracts as another policy does.

    Attributes:
      inner: the policy that contracts; `Serve` if params are quantized.
      observers: the observer of each `statistics_slot`; `Interpreter.slots` holds their states.
    """

    def __init__(self, inner: Policy, observers: Mapping[Slot, Observer]) -> None:
        self.inner = inner
        self.observers = observers
        self.inline_rules, self.keeps_rules = inner.inline_rules, inner.keeps_rules

    def contract(self, ip: Interpreter, site: Contraction) -> Any:
        """Updates the states of the operands, and contracts."""
        operands = {"lhs": site.lhs, "rhs": site.rhs}
        for name, value in list(operands.items()):
            slot = statistics_slot(Slot(ip.call_path, name))
            observer = self.observers.get(slot)
            if observer is None:
                continue
            x = value.data
            if is_integers(x):
                x = x.floats()
            elif is_qtensor(x):
                x = dequantize(x)
            elif isinstance(observer, Histogram):
                # it reads x twice: XLA would fuse the producer of x into both readers and compute
                # it twice. For one reduction the barrier costs more than it saves
                x = lax.optimization_barrier(x)
                operands[name] = dataclasses.replace(value, data=x)
            weight = operands["rhs" if name == "lhs" else "lhs"].data
            if is_qtensor(weight) and site.eqn.primitive.name == "dot_general":
                over = site.eqn.params["dimension_numbers"][0]
                x = over_divisor(x, weight, *(over if name == "lhs" else over[::-1]))
            if observer.sees_rows:
                shape = tuple(jnp.shape(weight))
                reading = Reading(site.eqn.primitive.name, site.eqn.params, name, shape)
                x = reading.rows(x, [v.data for v in site.rest])
            state = ip.slots.values[slot]
            new = observer.update(state, x)
            # a loop requires the dtype of a carry to stay the same
            ip.slots.values[slot] = {
                k: lax.convert_element_type(new[k], v.dtype) for k, v in state.items()
            }
        site = dataclasses.replace(site, lhs=operands["lhs"], rhs=operands["rhs"])
        return self.inner.contract(ip, site)

    def lookup(self, eqn: Any, key: str, operand: Value) -> None:
        """As the inner policy."""
        self.inner.lookup(eqn, key, operand)

    def meets(self, eqn: Any, operand: Value) -> None:
        """As the inner policy."""
        self.inner.meets(eqn, operand)

    def kept(self, ip: Interpreter, eqn: Any, operands: list[Value], results: list[Any]) -> None:
        """As the inner policy."""
        self.inner.kept(ip, eqn, operands, results)

    def leaves(self, ip: Interpreter, data: Any, where: str | None, reason: str) -> None:
        """As the inner policy."""
        self.inner.leaves(ip, data, where, reason)

    def jit_key(self, ip: Interpreter, facts: list[Facts], scope: tuple[str, ...]) -> tuple | None:
        """Calls of a helper can share a transform only if their observers are equal."""
        key = self.inner.jit_key(ip, facts, scope)
        inside = tuple(self.observers.get(slot) for slot in ip.slots.inside(ip.call_path))
        return None if key is None else (*key, inside)

    def enters_rules(self, ip: Interpreter, jaxpr: Any, operands: list[Value]) -> bool:
        """Also enters where an observed site is inside."""
        if any(slot in self.observers for slot in ip.slots.inside(ip.call_path)):
            return True
        return self.inner.enters_rules(ip, jaxpr, operands)
