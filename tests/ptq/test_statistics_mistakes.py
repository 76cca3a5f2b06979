"""Statistics and batches that `ptq` takes, and those that it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.observers import absmax, minmax
from tests.arrays import normal
from tests.ptq.static import (
    INT8,
    W8,
    mlp,
)

PARAMS = {"a": normal(1, 8, 6), "b": normal(2, 6, 4)}
X = normal(3, 5, 8)


def rule(observer: Any) -> jq.Rule:
    return jq.Rule("**", weights=W8, activations=INT8, observer=observer)


def test_widths_and_observers_have_to_agree(tmp_path: Any) -> None:
    stats = jq.capture(mlp, PARAMS, rule(minmax()), batches=[X])
    wide = {"a": normal(1, 9, 6), "b": PARAMS["b"]}
    with pytest.raises(ValueError, match=r"stats: a, lhs: expected .* 9 values along axis 1.* 8, "):
        jq.ptq(mlp, wide, rule(minmax()), normal(3, 5, 9), stats=stats)
    with pytest.raises(ValueError, match=r"stats: a: expected .*absmax\(\).*got those of minmax\("):
        jq.ptq(mlp, PARAMS, rule(absmax()), X, stats=stats)
    path = tmp_path / "stats.npz"
    stats.save(path)
    q, _ = jq.ptq(mlp, PARAMS, rule(minmax()), X, stats=path)
    again, _ = jq.ptq(mlp, PARAMS, rule(minmax()), X, stats=stats)
    np.testing.assert_array_equal(
        q["a"].calibration.input.scale, again["a"].calibration.input.scale
    )
    with pytest.raises(ValueError, match="there is no such file"):
        jq.ptq(mlp, PARAMS, rule(minmax()), X, stats=str(tmp_path / "none.npz"))


def test_features_of_a_convolution() -> None:
    def conv(p: Any, x: Any) -> Any:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=numbers)

    stats = jq.capture(
        conv, {"k": normal(0, 3, 3, 4, 5)}, rule(minmax()), batches=[normal(1, 2, 6, 6, 4)]
    )
    params = {"k": normal(0, 3, 3, 2, 5)}
    with pytest.raises(ValueError, match=r"stats: k, lhs: expected .* 2 values along axis 3.* 4, "):
        jq.ptq(conv, params, rule(minmax()), normal(1, 2, 6, 6, 2), stats=stats)
    # images of another size are no other model
    jq.ptq(conv, {"k": normal(0, 3, 3, 4, 5)}, rule(minmax()), normal(1, 1, 8, 7, 4), stats=stats)


def test_batches_are_opened_once() -> None:
    opened = []

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            opened.append(1)
            return iter([X, 2 * X])

    q, _ = jq.ptq(mlp, PARAMS, rule(absmax()), batches=Loader())
    assert opened == [1]
    scale = 2 * np.abs(X).max() / 127.5
    np.testing.assert_allclose(q["a"].calibration.input.scale, scale, rtol=1e-6)
    for given in (X, {"x": X}):
        with pytest.raises(ValueError, match=r"^ptq: expected an iterable of batches"):
            jq.ptq(mlp, PARAMS, rule(absmax()), batches=given)
