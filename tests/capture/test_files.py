"""Files of statistics, batches that are lists, and what is told of both."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.capture import CaptureError, Statistics, capture
from jaxquant.observers import absmax, mse
from tests.capture.programs import PROGRAMS, dense

PARAMS = PROGRAMS["dense"].params
X = jnp.ones((4, 8))


def test_a_missing_folder_is_told_before_any_batch(tmp_path: Any) -> None:
    taken = []

    def batches() -> Any:
        taken.append(1)
        yield X

    path = tmp_path / "none" / "stats.npz"
    with pytest.raises(ValueError, match=r"capture: save: there is no folder '.*none' for"):
        capture(dense, PARAMS, absmax(), batches=batches(), save=path)
    with pytest.raises(ValueError, match=r"capture: save: expected a file, got the folder"):
        capture(dense, PARAMS, absmax(), batches=batches(), save=tmp_path)
    assert not taken


def test_one_command_starts_and_goes_on(tmp_path: Any) -> None:
    path, given = tmp_path / "stats.npz", [X, 2 * X]
    interrupted = [given[0], jnp.nan * X]
    with pytest.raises(CaptureError, match=r"; the statistics of 1 batch are kept in"):
        capture(dense, PARAMS, absmax(), batches=interrupted, resume=path, save=path)
    stats = capture(dense, PARAMS, absmax(), batches=given, resume=str(path), save=path)
    assert stats.batches == 2
    np.testing.assert_array_equal(stats.finish("a", "lhs", jq.int8()).high, 2.0)
    with pytest.raises(ValueError, match="there is no such file"):
        capture(dense, PARAMS, absmax(), batches=given, resume=tmp_path / "other.npz", save=path)
    with pytest.raises(ValueError, match=r"resume holds .* 2 batches, and there is only 1"):
        capture(dense, PARAMS, absmax(), batches=[X], resume=path)


def test_what_is_written_aside_lies_beside_the_file(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a rename is atomic; the working directory may be elsewhere, or be gone."""
    folder, gone = tmp_path / "folder", tmp_path / "gone"
    folder.mkdir()
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    stats = capture(dense, PARAMS, absmax(), batches=[X], save=folder / "stats.npz")
    assert Statistics.load(folder / "stats.npz").batches == stats.batches
    monkeypatch.chdir(folder)
    stats.save("here.npz")
    assert sorted(f.name for f in folder.iterdir()) == ["here.npz", "stats.npz"]


def test_other_and_damaged_files(tmp_path: Any) -> None:
    good = tmp_path / "stats.npz"
    capture(dense, PARAMS, absmax(), batches=[X], save=good)
    data = good.read_bytes()
    middle = len(data) // 2
    files = {
        "text": b"hello",
        "cut": data[:middle],
        "flipped": data[:60] + bytes(255 - b for b in data[60:100]) + data[100:],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "other.npz", a=np.ones(2))
    for name in (*files, "other.npz"):
        with pytest.raises(
            ValueError, match=r"expected a file that Statistics\.save wrote"
        ) as told:
            Statistics.load(tmp_path / name)
        assert "pickle" not in str(told.value)
    with pytest.raises(ValueError, match="another, or damaged"):
        Statistics.load(tmp_path)


def test_a_list_is_one_argument() -> None:
    def fn(p: Any, x: Any, y: Any) -> Any:
        return (x + y) @ p["a"]

    pair = [X, X]
    with pytest.raises(ValueError, match=r"only a tuple is several: expected \(x, y\), not \[x"):
        capture(fn, PARAMS, absmax(), batches=[pair])
    rule = jq.w8a8_static(absmax())
    with pytest.raises(ValueError, match="only a tuple is several"):
        jq.ptq(fn, PARAMS, rule, batches=[pair])
    whole = capture(lambda p, xs: fn(p, *xs), PARAMS, absmax(), batches=[pair])
    assert whole.batches == 1


def test_none_is_named() -> None:
    def fn(p: Any, x: Any, flag: Any) -> Any:
        return x @ p["a"]

    with pytest.raises(ValueError, match=r"batch 1: argument 1: expected False .*, got None"):
        capture(fn, PARAMS, absmax(), batches=[(X, False), (X, None)])


def test_observers_are_called_from_their_room() -> None:
    with pytest.raises(ValueError, match=r"call it: jq\.observers\.mse\(\)"):
        capture(dense, PARAMS, mse, batches=[X])
