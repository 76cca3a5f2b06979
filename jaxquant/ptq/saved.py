"""What a long quantization keeps on disk after each step, so that it goes on after a kill."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.encoders import Info
from jaxquant.params import Encoded
from jaxquant.qtensor import deserialize, serialize
from jaxquant.report import Found

Path = str | os.PathLike[str]

_META, _FORMAT = "meta.json", 2


class Folder:
    """A folder with one file for each step, written whole or not at all.

    Args:
      save: the folder to write to, made if it is not there; `None` writes nothing.
      resume: the folder to read from; `None` reads nothing.
      about: what the run is of, as JSON values by name; the same for a run and its continuation.

    Raises:
      ValueError: `resume` is of another run; `save` is a file, or in a folder that does not exist,
        or holds another run that is not to be continued.
    """

    def __init__(self, save: Path | None, resume: Path | None, about: Mapping[str, Any]) -> None:
        self.save = None if save is None else os.fspath(save)
        self.resume = None if resume is None else os.fspath(resume)
        self.about = dict(about)
        same = (
            self.save and self.resume and os.path.abspath(self.save) == os.path.abspath(self.resume)
        )
        if self.resume is not None and not (same and _fresh(self.resume)):
            _require_same(self.resume, self.about)
        elif same:
            self.resume = None  # one command begins a run and goes on with it
        if self.save is not None:
            self._open(self.save, bool(same))

    def _open(self, folder: str, again: bool) -> None:
        above = os.path.dirname(os.path.abspath(folder))
        if not os.path.isdir(above):
            raise ValueError(f"ptq: save: there is no folder {above!r} for {folder!r}")
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise ValueError(f"ptq: save: expected a folder, got the file {folder!r}")
        os.makedirs(folder, exist_ok=True)
        if os.listdir(folder) and not again:
            raise ValueError(
                f"ptq: save: the folder {folder!r} is not empty; go on with the run in it by "
                f"resume={folder!r}, or take another"
            )
        if not os.path.exists(os.path.join(folder, _META)):
            text = json.dumps({"format": _FORMAT, **self.about}).encode()
            _write(os.path.join(folder, _META), lambda file: file.write(text))

    def read(self, step: str) -> dict[str, Encoded] | None:
        """What was kept of a step, by name, or `None`."""
        for folder in dict.fromkeys((self.save, self.resume)):
            path = "" if folder is None else os.path.join(folder, f"{step}.npz")
            if folder is not None and os.path.exists(path):
                done = _read(path)
                if folder != self.save:
                    self.write(step, done)
                return done
        return None

    def write(self, step: str, done: Mapping[str, Encoded]) -> None:
        """Keeps the results of a step, by name."""
        if self.save is None:
            return
        arrays: dict[str, Any] = {}
        entries = []
        for n, (name, one) in enumerate(done.items()):
            text, parts = serialize(one.q)
            arrays |= {f"{n}/{part}": a for part, a in parts.items()}
            info = None
            if one.info is not None:
                info = [float(one.info.error), float(one.info.signal)]
            told = [_note(note) for note in one.notes]
            entries.append({"name": name, "q": text, "info": info, "notes": told})
        arrays[_META] = np.frombuffer(json.dumps(entries).encode(), np.uint8)
        _write(os.path.join(self.save, f"{step}.npz"), lambda file: np.savez(file, **arrays))


def _note(note: str | Found) -> Any:
    return note if isinstance(note, str) else list(note)


def _read(path: str) -> dict[str, Encoded]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        entries = json.loads(arrays.pop(_META).tobytes())
        done = {}
        for n, entry in enumerate(entries):
            start = f"{n}/"
            own = {k.removeprefix(start): a for k, a in arrays.items() if k.startswith(start)}
            info = None
            if entry["info"] is not None:
                error, signal = map(jnp.float32, entry["info"])
                info = Info(error, signal)
            notes = tuple(n if isinstance(n, str) else Found(*n) for n in entry["notes"])
            done[entry["name"]] = Encoded(deserialize(entry["q"], own), info, notes)
        return done
    except (KeyError, TypeError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"ptq: resume: {path!r} is damaged; delete it to redo its step") from error


def _fresh(folder: str) -> bool:
    """Whether nothing was begun in a folder: it is not there, or nothing is in it."""
    return not os.path.exists(folder) or (os.path.isdir(folder) and not os.listdir(folder))


def _require_same(folder: str, about: Mapping[str, Any]) -> None:
    path = os.path.join(folder, _META)
    try:
        with open(path, "rb") as file:
            meta = json.loads(file.read())
    except (OSError, ValueError):
        raise ValueError(
            f"ptq: resume: {folder!r} holds no run that was saved by ptq(..., save=...)"
        ) from None
    for name, expected in {"format": _FORMAT, **about}.items():
        if meta.get(name) != expected:
            raise ValueError(
                f"ptq: resume: the run in {folder!r} was of other {name}: expected {expected!r}, "
                f"got {meta.get(name)!r}"
            )


def _write(path: str, write: Any) -> None:
    folder, name = os.path.split(path)
    handle, aside = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
