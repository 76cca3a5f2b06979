"""Packages of Debian: downloaded by apt, opened without dpkg; and the data files of R in them."""

from __future__ import annotations

import io
import pathlib
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator

AR = b"!<arch>\n"
_STRINGS, _STRING = 16, 9  # types in R's serialization: a vector of strings, a string


def download(package: str, folder: pathlib.Path) -> str:
    """Lets apt put a package's archive into a folder; what went wrong, empty if nothing did."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run = subprocess.run(
            ["apt-get", "download", "-qq", package],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return "apt-get: not found; this takes a Debian or Ubuntu"
    return run.stderr.strip() if run.returncode else ""


def members(data: bytes) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Pairs of a member's name and a function that reads it, of an `ar` archive, as a .deb is.

    Each member has a header of 60 bytes (name in 16, size in 10 from byte 48, in decimal) and is
    padded to an even size.
    """
    file = io.BytesIO(data)
    file.seek(len(AR))
    while len(header := file.read(60)) == 60:
        content = file.read(int(header[48:58]))
        file.seek(len(content) % 2, io.SEEK_CUR)
        yield header[:16].decode("ascii").rstrip(" /"), lambda content=content: content


def r_strings(data: bytes) -> list[list[str]]:
    """The vectors of strings in an `.rdb` file of R: one compressed object after another.

    Each object is its size, four bytes with the high one first, and a zlib stream of that size.

    Raises:
      ValueError: an object is something else.
    """
    found = []
    while data:
        stream = zlib.decompressobj()
        content = stream.decompress(data[4:])
        if len(content) != struct.unpack(">I", data[:4])[0]:
            raise ValueError("not a file of objects that R compressed by zlib")
        found.append(_strings(content))
        data = stream.unused_data
    return found


def _strings(content: bytes) -> list[str]:
    """R's serialization, format 3 (XDR), of a vector of strings without attributes."""
    file = io.BytesIO(content)

    def integer() -> int:
        return struct.unpack(">i", file.read(4))[0]

    magic, version = file.read(2), integer()
    if (magic, version) != (b"X\n", 3):
        raise ValueError(f"expected R's format X 3, got {magic!r} {version}")
    file.seek(8, io.SEEK_CUR)  # the versions of R that wrote it and that can read it
    encoding = file.read(integer()).decode("ascii")
    kind, count = integer(), integer()
    if kind != _STRINGS:
        raise ValueError(f"expected a vector of strings (type {_STRINGS}), got {kind}")
    found = []
    for _ in range(count):
        if (flags := integer()) & 0xFF != _STRING:
            raise ValueError(f"expected a string (type {_STRING}), got {flags & 0xFF}")
        size = integer()
        found.append(file.read(max(size, 0)).decode(encoding))
    return found
