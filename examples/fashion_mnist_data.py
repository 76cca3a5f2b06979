"""Fashion-MNIST as Debian packages it, and handwritten digits of the same shape in its place."""

from __future__ import annotations

import gzip
import pathlib
from typing import NamedTuple

import numpy as np

from jaxquant.demo import load_digits

DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")
CLASSES = 10
INSTALL = """Fashion-MNIST is in a package of Debian and Ubuntu:
  apt-get install dataset-fashion-mnist
or, without being root, in a folder of your own:
  apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb fashion
  python examples/fashion_mnist_ptq.py --data fashion/usr/share/datasets/fashion-mnist"""

# File, and the shape of what is in it. MIT licence; Xiao, Rasul & Vollgraf 2017, Fashion-MNIST: a
# Novel Image Dataset for Benchmarking Machine Learning Algorithms.
FILES = {
    "train-images-idx3-ubyte.gz": (60000, 28, 28),
    "train-labels-idx1-ubyte.gz": (60000,),
    "t10k-images-idx3-ubyte.gz": (10000, 28, 28),
    "t10k-labels-idx1-ubyte.gz": (10000,),
}


class Images(NamedTuple):
    """Float images `[n, 28, 28, 1]` from 0 to 1, their labels `[n]`, split; and the set's name."""

    name: str
    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray

    def first(self, train: int, test: int) -> Images:
        """The first so many images of each part."""
        kept = (self.train_x[:train], self.train_y[:train], self.test_x[:test], self.test_y[:test])
        return Images(self.name, *kept)


def fashion_mnist(folder: pathlib.Path | None = None) -> Images:
    """The 60,000 and 10,000 images from `folder`, by default where Debian's package puts them.

    Raises:
      FileNotFoundError: a file is missing; the message says how to get it.
      ValueError: a file does not hold what it should.
    """
    folder = DEBIAN if folder is None else folder
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"no {', '.join(missing)} in {folder}. {INSTALL}")
    train_x, train_y, test_x, test_y = (read_idx(folder / n, shape) for n, shape in FILES.items())
    if max(train_y.max(), test_y.max()) >= CLASSES:
        raise ValueError(f"{folder}: expected labels below {CLASSES}")

    def scaled(x: np.ndarray) -> np.ndarray:
        return x[..., None].astype(np.float32) / 255

    labels = (train_y.astype(np.int32), test_y.astype(np.int32))
    return Images("Fashion-MNIST", scaled(train_x), labels[0], scaled(test_x), labels[1])


def digits() -> Images:
    """Scikit-learn's 1797 digits of 8 x 8 pixels, each pixel drawn as 3 x 3, with a margin of 2."""
    found = load_digits()

    def drawn(x: np.ndarray) -> np.ndarray:
        return np.pad(x.repeat(3, 1).repeat(3, 2), ((0, 0), (2, 2), (2, 2), (0, 0)))

    train_y, test_y = (y.astype(np.int32) for y in (found.train_y, found.test_y))
    return Images("digits", drawn(found.train_x), train_y, drawn(found.test_x), test_y)


def read_idx(path: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray:
    """The unsigned bytes of a gzipped IDX file, which must have this shape.

    The header is two zero bytes, the type (8: unsigned byte), the number of axes, and each axis's
    size as four bytes, high byte first.

    Raises:
      ValueError: it is no such file, has another shape, or is cut short.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}: not a whole gzip file: {error}") from error
    start = 4 + 4 * len(shape)
    if data[:4] != bytes((0, 0, 8, len(shape))) or len(data) < start:
        raise ValueError(
            f"{path}: expected an IDX file of unsigned bytes with {len(shape)} axes, "
            f"got a header of {data[:4].hex(' ') or 'nothing'}"
        )
    found = tuple(int(n) for n in np.frombuffer(data[4:start], ">u4"))
    if found != shape or len(data) - start != np.prod(shape):
        raise ValueError(
            f"{path}: expected shape {list(shape)}, got {list(found)} and {len(data) - start} bytes"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
