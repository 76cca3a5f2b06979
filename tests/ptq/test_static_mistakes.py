"""Calibration that is missing, of no use, or of something else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.export
import jax.numpy as jnp
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

STATIC = jq.Rule("**", weights=W8, activations=INT8, observer=minmax())
PARAMS = {"a": normal(1, 8, 6), "b": normal(2, 6, 4)}
X = normal(3, 5, 8)


def stats_of(fn: Any, params: Any, *rules: jq.Rule) -> jq.Statistics:
    return jq.capture(fn, params, rules, batches=[X])


def test_calibration_that_is_missing_or_of_no_use() -> None:
    stats = stats_of(mlp, PARAMS, STATIC)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (
            STATIC,
            {},
            r"^ptq: the recipe has an observer, so it needs .*batches=\[\.\.\.\], or stats",
        ),
        (STATIC, {"batches": [X], "stats": stats}, "^ptq: give batches or stats, not both"),
        (jq.w8a8(), {"batches": [X]}, "^ptq: batches given, but no rule of the recipe has an obs"),
        (jq.w8a8(), {"stats": stats}, "^ptq: stats given, but no rule of the recipe has an obs"),
        (STATIC, {"batches": []}, "^ptq: no batches; expected at least one"),
        (STATIC, {"batches": iter(())}, "^ptq: no batches; expected at least one"),
        (STATIC, {"batches": 3}, "expected an iterable of batches.*got int"),
        (STATIC, {"batches": X}, "expected an iterable of batches.*got ArrayImpl"),
        (
            STATIC,
            {"stats": {"a": 1}},
            r"^stats: expected the result of jaxquant\.capture, got dict",
        ),
    ]
    for recipe, given, message in cases:
        args = () if "batches" in given else (X,)
        with pytest.raises(ValueError, match=message):
            jq.ptq(mlp, PARAMS, recipe, *args, **given)


def test_statistics_of_other_sites() -> None:
    def other(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["a"]) @ p["c"]

    renamed = {"a": PARAMS["a"], "c": PARAMS["b"]}
    stats = stats_of(mlp, PARAMS, STATIC)
    with pytest.raises(ValueError, match=r"^stats: .* of another model: b is no .* are a, c"):
        jq.ptq(other, renamed, STATIC, X, stats=stats)

    def folded(p: Any, x: Any) -> Any:
        return jnp.tanh(x[None] @ p["a"]) @ p["b"]

    with pytest.raises(ValueError, match=r"stats: a, lhs: .* like \[1, 5, 8\], got \[5, 8\]"):
        jq.ptq(folded, PARAMS, STATIC, X, stats=stats)
    # more rows than in any batch are no other model
    jq.ptq(mlp, PARAMS, STATIC, normal(4, 9, 8), stats=stats)

    some = stats_of(mlp, PARAMS, dataclasses.replace(STATIC, pattern="a"))
    with pytest.raises(ValueError, match=r"^b: its rule has an observer, .* \(.*statistics of a\)"):
        jq.ptq(mlp, PARAMS, STATIC, X, stats=some)

    per_channel = dataclasses.replace(
        STATIC, activations=jq.int8(granularity=jq.PerChannel(-1)), observer=absmax(axis=-1)
    )
    with pytest.raises(ValueError, match=r"^a: .* one scale, and the statistics, of .*axis=-1"):
        jq.ptq(mlp, PARAMS, STATIC, X, stats=stats_of(mlp, PARAMS, per_channel))
    with pytest.raises(ValueError, match=r"^a: .* a scale for each channel, and .*one range"):
        jq.ptq(mlp, PARAMS, per_channel, X, stats=stats)


def test_batches_are_gone_through_once_and_give_the_arguments() -> None:
    given = []

    def samples() -> Iterator[Any]:
        for factor in (1.0, 3.0, 2.0):
            given.append(factor)
            yield (factor * X,)

    class Loader:
        """Starts afresh each time, as data loaders do."""

        def __iter__(self) -> Iterator[Any]:
            return samples()

    q, report = jq.ptq(mlp, PARAMS, STATIC, batches=samples())
    assert given == [1.0, 3.0, 2.0]
    jq.ptq(mlp, PARAMS, STATIC, batches=Loader())
    assert given == 2 * [1.0, 3.0, 2.0]
    np.testing.assert_allclose(
        q["a"].calibration.input.scale, 3 * np.abs(X).max() / 127.5, rtol=1e-6
    )
    # arguments to trace with may be given beside them, and stand for shapes only
    aval = jax.ShapeDtypeStruct((2, 8), jnp.float32)
    again, _ = jq.ptq(mlp, PARAMS, STATIC, aval, batches=[f * X for f in (1.0, 3.0, 2.0)])
    stats = jq.capture(mlp, PARAMS, STATIC, batches=[f * X for f in (1.0, 3.0, 2.0)])
    third, _ = jq.ptq(mlp, PARAMS, STATIC, aval, stats=stats)
    for other in (again, third):
        chex.assert_trees_all_equal(other, q)
    assert report["a"].quantized
