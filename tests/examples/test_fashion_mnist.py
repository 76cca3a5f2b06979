"""The Fashion-MNIST example, but for its training: files, model, rows and table."""

import gzip
import io
import pathlib
import sys

import jax
import numpy as np
import pytest
from rich.console import Console

# Examples are scripts beside each other, not a package.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

pytest.importorskip("tokenizers")  # of minilm_measure, which lends its progress bar

import fashion_mnist_data
import fashion_mnist_ptq
from fashion_mnist_measure import BATCH, Row, Variant, as_dict, predictions, table
from fashion_mnist_model import ResNet

from jaxquant.rewrites import fold_batchnorm


def idx(array, kind=8):
    header = bytes((0, 0, kind, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data set of the same files, of few images."""
    files = {
        name: (shape[0] // 2500, *shape[1:]) for name, shape in fashion_mnist_data.FILES.items()
    }
    monkeypatch.setattr(fashion_mnist_data, "FILES", files)
    rng = np.random.default_rng(0)
    for name, shape in files.items():
        values = rng.integers(0, 10 if "labels" in name else 256, shape)
        (tmp_path / name).write_bytes(idx(values))
    return tmp_path


def test_images_are_read(folder):
    images = fashion_mnist_data.fashion_mnist(folder)
    assert images.train_x.shape == (24, 28, 28, 1) and images.test_x.shape == (4, 28, 28, 1)
    raw = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    np.testing.assert_array_equal(
        np.round(images.test_x * 255).ravel(), np.frombuffer(raw, np.uint8)
    )
    labels = gzip.decompress((folder / "train-labels-idx1-ubyte.gz").read_bytes())[8:]
    np.testing.assert_array_equal(images.train_y, np.frombuffer(labels, np.uint8))
    assert images.train_x.dtype == np.float32 and images.train_y.dtype == np.int32
    assert len(images.first(5, 3).train_x) == 5 and len(images.first(5, 3).test_y) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (idx(np.zeros((24, 28, 27))), r"expected shape \[24, 28, 28\], got \[24, 28, 27\]"),
        (idx(np.zeros((24, 28))), "with 3 axes, got a header of 00 00 08 02"),
        (idx(np.zeros((24, 28, 28)), kind=13), "unsigned bytes"),
        (gzip.compress(b""), "got a header of nothing"),
        (gzip.compress(gzip.decompress(idx(np.zeros((24, 28, 28))))[:-1]), "and 18815 bytes"),
        (idx(np.zeros((24, 28, 28)))[:-9], "not a whole gzip file"),
        (b"<html>", "not a whole gzip file"),
    ],
    ids=("shape", "axes", "dtype", "empty", "short", "truncated", "no gzip"),
)
def test_broken_files_are_named(folder, content, said):
    name = "train-images-idx3-ubyte.gz"
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: .*{said}"):
        fashion_mnist_data.fashion_mnist(folder)


def test_missing_files_say_how_to_get_them(folder, capsys):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    said = r"no t10k-labels-idx1-ubyte.gz in .*\n.*apt-get install dataset-fashion-mnist"
    with pytest.raises(FileNotFoundError, match=said):
        fashion_mnist_data.fashion_mnist(folder)
    assert fashion_mnist_ptq.main(["--data", str(folder), "--quick"]) == 1
    assert "apt-get install" in capsys.readouterr().out


def test_digits_stand_in_only_in_a_quick_run(monkeypatch, tmp_path):
    monkeypatch.setattr(fashion_mnist_data, "DEBIAN", tmp_path)
    out = Console(file=io.StringIO(), width=200)
    images = fashion_mnist_ptq.load(None, True, out)
    assert "not of Fashion-MNIST" in out.file.getvalue()
    assert images.train_x.shape[1:] == images.test_x.shape[1:] == (28, 28, 1)
    assert images.train_x.min() >= 0 and images.train_x.max() == 1
    with pytest.raises(FileNotFoundError):
        fashion_mnist_ptq.load(None, False, out)


def test_model_folds_and_is_measured():
    model = ResNet((4, 6))
    x = np.random.default_rng(0).random((BATCH + 3, 28, 28, 1), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x[:1])
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda a: rng.random(a.shape, np.float32) + 0.1, shapes)
    folded, info = fold_batchnorm(model.apply, variables, x[:1])
    assert [record.folded for record in info] == [True] * 6
    fn, steps = jax.jit(model.apply), []
    variant = Variant("float32", "float / float", fn, variables, 1)
    found = predictions(variant, x, lambda: steps.append(1))
    a, b = (np.asarray(fn(v, x[-BATCH:])) for v in (variables, folded))
    assert found.shape == (BATCH + 3,) and a.shape == (BATCH, 10) and len(steps) == 2
    np.testing.assert_array_equal(found[-BATCH:], a.argmax(-1))
    np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max())


def test_table_and_figures():
    rows = [Row("float32", "float / float", 0.92, 1.0, 4000, 0.02)]
    rows.append(Row("integer, fixed-point", "int8 / int8", 0.9165, 0.98, 1000, 0.01))
    out = Console(file=io.StringIO(), width=100)
    out.print(table(rows, "title", "caption"))
    text = out.file.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= 100
    assert "-0.35" in text and "91.65 %" in text and "0.50" in text
    figures = as_dict(rows[1], rows[0])
    assert figures["points_to_float"] == pytest.approx(-0.35)
    assert (figures["bytes_of_float"], figures["time_of_float"]) == (0.25, 0.5)
    untimed = Row("x", "y", 0.5, 0.5, 1)
    assert as_dict(untimed, untimed)["time_of_float"] is None
    table([untimed], "", "")
