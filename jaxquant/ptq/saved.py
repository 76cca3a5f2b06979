"""Stores each step of a long quantization on disk, so that an interrupted run can resume."""

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
    """A folder with one file per step; each file is written atomically.

    Args:
      save: the folder to write to, created if missing; `None` writes nothing.
      resume: the folder to read from; `None` reads nothing.
      about: JSON values by name that identify the run; a resumed run must have the same.

    Raises:
      ValueError: `resume` is of another run; `save` is a file, its parent folder does not exist,
        or it is not empty and not the folder of `resume`.
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
            self.resume = None  # the same command starts a run and later resumes it
        if self.save is not None:
            self._open(self.save, bool(same))

    def _open(self, folder: str, resumed: bool) -> None:
        parent = os.path.dirname(os.path.abspath(folder))
        if not os.path.isdir(parent):
            raise ValueError(f"ptq: save: there is no folder {parent!r} for {folder!r}")
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise ValueError(f"ptq: save: expected a folder, got the file {folder!r}")
        os.makedirs(folder, exist_ok=True)
        if os.listdir(folder) and not resumed:
            raise ValueError(
                f"ptq: save: the folder {folder!r} is not empty; continue the run in it by "
                f"resume={folder!r}, or use another"
            )
        if not os.path.exists(os.path.join(folder, _META)):
            text = json.dumps({"format": _FORMAT, **self.about}).encode()
            _write(os.path.join(folder, _META), lambda file: file.write(text))

    def read(self, step: str) -> dict[str, Encoded] | None:
        """Returns the stored results of a step, by name, or `None`."""
        for folder in dict.fromkeys((self.save, self.resume)):
            path = "" if folder is None else os.path.join(folder, f"{step}.npz")
            if folder is not None and os.path.exists(path):
                done = _read(path)
                if folder != self.save:
                    self.write(step, done)
                return done
        return None

    def write(self, step: str, done: Mapping[str, Encoded]) -> None:
        """Stores the results of a step, by name."""
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
            notes = [_note(note) for note in one.notes]
            entries.append({"name": name, "q": text, "info": info, "notes": notes})
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
            parts = {k.removeprefix(start): a for k, a in arrays.items() if k.startswith(start)}
            info = None
            if entry["info"] is not None:
                error, signal = map(jnp.float32, entry["info"])
                info = Info(error, signal)
            notes = tuple(n if isinstance(n, str) else Found(*n) for n in entry["notes"])
            done[entry["name"]] = Encoded(deserialize(entry["q"], parts), info, notes)
        return done
    except (KeyError, TypeError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"ptq: resume: {path!r} is damaged; delete it to redo its step") from error


def _fresh(folder: str) -> bool:
    """Whether a folder does not exist or is empty."""
    return not os.path.exists(folder) or (os.path.isdir(folder) and not os.listdir(folder))


def _require_same(folder: str, about: Mapping[str, Any]) -> None:
    path = os.path.join(folder, _META)
    try:
        with open(path, "rb") as file:
            meta = json.loads(file.read())
    except (OSError, ValueError):
        raise ValueError(
            f"ptq: resume: {folder!r} holds no run that ptq(..., save=...) wrote"
        ) from None
    for name, expected in {"format": _FORMAT, **about}.items():
        if meta.get(name) != expected:
            raise ValueError(
                f"ptq: resume: the run in {folder!r} differs in {name}: expected {expected!r}, "
                f"got {meta.get(name)!r}"
            )


def _write(path: str, write: Any) -> None:
    folder, name = os.path.split(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
