"""Statistics in a file: arrays as `.npz`, all else as JSON in it; nothing is pickled."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import zipfile
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant import observers
from jaxquant.capture.statistics import Observed, Statistics
from jaxquant.observers import Observer

_META, _FORMAT = "statistics.json", 1


def save(stats: Statistics, path: str | os.PathLike[str]) -> None:
    """See `Statistics.save`."""
    path = os.fspath(path)
    entries: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {}
    for number, (name, seen) in enumerate(stats.entries.items()):
        entries.append(
            {
                "name": name,
                "observer": described(seen.observer),
                "shape": seen.shape,
                "dtype": seen.dtype,
                "lead": seen.lead,
            }
        )
        arrays |= {f"{number}/{k}": np.asarray(v) for k, v in seen.state.items()}
    meta = {
        "format": _FORMAT,
        "batches": int(stats.batches),
        "sites": stats.sites,
        "entries": entries,
    }
    arrays[_META] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    folder, name = os.path.split(path)
    handle, aside = tempfile.mkstemp(prefix=f".{name}.", dir=folder or ".")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # NumPy types these as an option
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise


def load(path: str | os.PathLike[str]) -> Statistics:
    """See `Statistics.load`."""
    path = os.fspath(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        meta = json.loads(arrays.pop(_META).tobytes())
        if meta["format"] != _FORMAT:
            raise ValueError(f"written in format {meta['format']}, and this one reads {_FORMAT}")
        entries = {}
        for number, entry in enumerate(meta["entries"]):
            start = f"{number}/"
            entries[entry["name"]] = Observed(
                {
                    k.removeprefix(start): jnp.asarray(v)
                    for k, v in arrays.items()
                    if k.startswith(start)
                },
                _observer(entry["observer"]),
                tuple(entry["shape"]),
                entry["dtype"],
                tuple(entry["lead"]),
            )
        sites = tuple((key, tuple(map(tuple, operands))) for key, operands in meta["sites"])
    except FileNotFoundError:
        raise ValueError(f"no statistics at {path!r}: there is no such file") from None
    except (KeyError, TypeError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"no statistics at {path!r}: {error}") from error
    return Statistics(entries, meta["batches"], sites)


def described(observer: Observer) -> dict[str, Any]:
    """The name of an observer's class and its fields, as JSON has them.

    Raises:
      ValueError: an observer that is not of `jaxquant.observers`.
    """
    name = type(observer).__name__
    if getattr(observers, name, None) is not type(observer) or name not in observers.__all__:
        raise ValueError(
            f"only observers of jaxquant.observers can be written to a file, got {observer!r}"
        )
    fields = dataclasses.fields(observer)  # type: ignore[arg-type]  # all of these are dataclasses
    return {"class": name, "fields": {f.name: getattr(observer, f.name) for f in fields}}


def _observer(meta: dict[str, Any]) -> Observer:
    name = meta["class"]
    kind = getattr(observers, name, None) if name in observers.__all__ else None
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
        raise ValueError(f"unknown observer {name!r}")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["fields"].items()}
    made: Any = kind(**fields)
    return made
