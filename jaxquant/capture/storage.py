"""Statistics in a file: an `.npz` of arrays, all else as JSON in it; nothing is pickled."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import zipfile
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from jaxquant import observers
from jaxquant.observers import Observer

if TYPE_CHECKING:
    from jaxquant.capture.statistics import Statistics

Path = str | os.PathLike[str]

_META, _FORMAT = "statistics.json", 1


class _Unknown(Exception):
    """The file has content of another version."""


def save(stats: Statistics, path: str | os.PathLike[str]) -> None:
    """See `Statistics.save`."""
    path = os.fspath(path)
    entries: list[dict[str, Any]] = []
    arrays: dict[str, Any] = {}
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
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder or ".")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def load(path: str | os.PathLike[str]) -> tuple[dict[str, tuple[Any, ...]], int, tuple[Any, ...]]:
    """Reads the fields of `Statistics` from a file, entries as the fields of `Observed`.

    Raises:
      ValueError: see `Statistics.load`.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise ValueError(f"no statistics at {path!r}: there is no such file")
    other = f"no statistics at {path!r}: expected a file that Statistics.save wrote; this is "
    if os.path.isdir(path) or not zipfile.is_zipfile(path):
        raise ValueError(f"{other}another, or damaged")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        meta = json.loads(arrays.pop(_META).tobytes())
        if meta["format"] != _FORMAT:
            raise _Unknown(f"in format {meta['format']}, and this version reads {_FORMAT}")
        entries = {}
        for number, entry in enumerate(meta["entries"]):
            start = f"{number}/"
            entries[entry["name"]] = (
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
    except _Unknown as error:
        raise ValueError(f"{other}{error}") from None
    except KeyError as error:
        raise ValueError(f"{other}another: it has no {error}") from error
    except (TypeError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{other}damaged") from error
    return entries, meta["batches"], sites


def require_folder(save: Path, where: str) -> None:
    """Raises early, before the work, if `save` cannot be written."""
    folder = os.path.dirname(os.fspath(save)) or "."
    if not os.path.isdir(folder):
        raise ValueError(f"{where}: save: there is no folder {folder!r} for {os.fspath(save)!r}")
    if os.path.isdir(save):
        raise ValueError(f"{where}: save: expected a file, got the folder {os.fspath(save)!r}")


def described(observer: Observer) -> dict[str, Any]:
    """Returns the name of an observer's class and its fields as JSON values.

    Raises:
      ValueError: the observer is not one of `jaxquant.observers`.
    """
    name = type(observer).__name__
    if getattr(observers, name, None) is not type(observer) or name not in observers.__all__:
        raise ValueError(
            f"only observers of jaxquant.observers can be written to a file, got {observer!r}"
        )
    instance: Any = observer  # a dataclass, as all of these are
    fields = dataclasses.fields(instance)
    return {"class": name, "fields": {f.name: getattr(observer, f.name) for f in fields}}


def _observer(meta: dict[str, Any]) -> Observer:
    name = meta["class"]
    kind = getattr(observers, name, None) if name in observers.__all__ else None
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
        raise _Unknown(f"of the observer {name!r}, which this version does not have")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["fields"].items()}
    observer: Any = kind(**fields)
    return observer
