"""`Statistics`: states of observers by site."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxquant.capture import storage
from jaxquant.observers import Observer, Range, finish_stacked
from jaxquant.qtensor import QSpec

Sites = tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observed:
    """The state of one observer of one activation.

    Attributes:
      state: the observer's state; its arrays have the leading axes `lead`.
      observer: the observer.
      shape: shape of the activation at each update.
      dtype: name of its dtype.
      lead: numbers of layers, for a site in a `scan` over layers; else `()`.
    """

    state: dict[str, Any]
    observer: Observer = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})
    lead: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    def finish(self, spec: QSpec) -> Range:
        """Returns the range for quantization by `spec`, `[*lead, *channels]`; not traceable.

        Raises:
          ValueError: there was no update, or one was not finite.
        """
        return finish_stacked(self.observer, self.state, spec, len(self.lead))

    @property
    def static(self) -> tuple[Any, ...]:
        """All fields but the state; they must be equal to merge statistics."""
        return self.observer, self.shape, self.dtype, self.lead


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics(Mapping[str, Mapping[str, Observed]]):
    """Statistics of activations by site key, then by operand (`"lhs"`, `"rhs"`).

    A contraction with a parameter has an entry for its other operand, one without has entries for
    both. Sites that contract the same array share an entry. A pytree whose leaves are the
    observers' states and the number of batches.

    Attributes:
      entries: one per observed activation, by name.
      batches: number of batches seen.
      sites: for each site key, its operands and their entry names.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> from jaxquant.capture import capture
    >>> from jaxquant.observers import minmax
    >>> stats = capture(lambda p, x: x @ p["w"], {"w": jnp.eye(2)}, minmax(), batches=[jnp.eye(2)])
    >>> print(stats)
    site  operand  observer  range   updates
    w     lhs      minmax()  0 .. 1  1
    >>> stats.finish("w", "lhs", jq.int8()).high
    Array(1., dtype=float32)
    """

    entries: dict[str, Observed]
    batches: Any
    sites: Sites = dataclasses.field(metadata={"static": True})

    def __getitem__(self, key: str) -> dict[str, Observed]:
        for name, operands in self.sites:
            if name == key:
                return {operand: self.entries[entry] for operand, entry in operands}
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return (key for key, _ in self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def finish(self, key: str, operand: str, spec: QSpec) -> Range:
        """Returns the range of one operand of a site, `[*layers, *channels]`; not traceable.

        Raises:
          ValueError: the operand has no statistics, or they are not finite.
        """
        operands = self.get(key, {})
        if operand not in operands:
            known = ", ".join(f"{k} {o}" for k, ops in self.sites for o, _ in ops)
            raise ValueError(f"no statistics of {key!r}, operand {operand!r}; there are: {known}")
        try:
            return operands[operand].finish(spec)
        except ValueError as error:
            raise ValueError(f"{key}, {operand}: {error}") from error

    def merge(self, other: Statistics) -> Statistics:
        """Returns the statistics of the batches of both, those of `other` last.

        Raises:
          ValueError: their sites or observers differ.
        """
        check_same(self, other, "merge")
        return _merged(self, other)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file that `load` reads: an `.npz` of arrays, all else as JSON in it.

        The file is written atomically, so a reader never sees an incomplete one.

        Raises:
          ValueError: an observer is not one of `jaxquant.observers`.
        """
        storage.save(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Statistics:
        """Reads statistics that `save` wrote.

        Raises:
          ValueError: there is no such file, or `save` did not write it.
        """
        entries, batches, sites = storage.load(path)
        return Statistics({n: Observed(*fields) for n, fields in entries.items()}, batches, sites)

    def unseen(self) -> list[str]:
        """Lists the sites with a layer that was never updated."""
        return [name for name, seen in self._named() if not np.asarray(seen.state["updates"]).all()]

    def _named(self) -> list[tuple[str, Observed]]:
        """Returns each entry with its first site."""
        first: dict[str, str] = {}
        for key, operands in self.sites:
            for operand, entry in operands:
                first.setdefault(entry, f"{key} ({operand})")
        return [(first[name], seen) for name, seen in self.entries.items()]

    def __str__(self) -> str:
        rows = [("site", "operand", "observer", "range", "updates")]
        for key, operands in self.sites:
            for operand, entry in operands:
                seen = self.entries[entry]
                updates = np.asarray(seen.state["updates"])
                rows.append((key, operand, repr(seen.observer), _range(seen), _span(updates)))
        width = [max(len(row[i]) for row in rows) for i in range(5)]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(r, width, strict=True)).rstrip() for r in rows
        )


def _range(seen: Observed) -> str:
    try:
        low, high = seen.finish(QSpec("int8", symmetric=False))
    except ValueError as error:
        return str(error)
    return f"{np.min(low):.4g} .. {np.max(high):.4g}"


def _span(counts: np.ndarray) -> str:
    low, high = counts.min(), counts.max()
    return str(low) if low == high else f"{low} to {high}"


@jax.jit
def _merged(a: Statistics, b: Statistics) -> Statistics:
    entries = {
        name: dataclasses.replace(seen, state=seen.observer.merge(seen.state, other.state))
        for (name, seen), other in zip(a.entries.items(), b.entries.values(), strict=True)
    }
    return Statistics(entries, a.batches + b.batches, a.sites)


def check_same(here: Statistics, other: Statistics, where: str) -> None:
    """Raises unless both are statistics of the same sites, by the same observers."""
    if not isinstance(other, Statistics):
        raise ValueError(f"{where}: expected Statistics, got {type(other).__name__}")
    differences = []
    for key in here:
        if key not in other:
            differences.append(f"{key!r} is missing")
    for key in other:
        if key not in here:
            differences.append(f"{key!r} is unknown")
    for key in (key for key in here if key in other):
        mine, theirs = here[key], other[key]
        if mine.keys() != theirs.keys():
            differences.append(f"{key!r}: expected {' '.join(mine)}, got {' '.join(theirs)}")
            continue
        for operand, seen in mine.items():
            named = ("observer", "shape", "dtype", "layers")
            for name, a, b in zip(named, seen.static, theirs[operand].static, strict=True):
                if a != b:
                    differences.append(f"{key!r} {operand}: expected {name} {a}, got {b}")
    if not differences and here.sites != other.sites:
        differences.append("sites that share an activation, or their order, differ")
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        kind = "of other arrays"
        if set(here) != set(other):
            kind = "of other sites"
        elif any("expected observer" in d for d in differences):
            kind = "by another observer"
        raise ValueError(
            f"{where}: these are statistics {kind}: {'; '.join(differences[:3])}{more}"
        )
