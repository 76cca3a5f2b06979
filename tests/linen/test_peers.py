"""What does not run, or is silently wrong, in other libraries, each as a test."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jaxquant as jq
from jaxquant import linen
from tests.linen.models import (
    LeftHand,
    Scanned,
    Tied,
    Twins,
    contractions,
    error,
    intercepted,
    lecun,
    normal,
    project,
    same,
)

x = normal(4, 32)


class Helped(nn.Module):
    """Calls a jitted helper."""

    @nn.compact
    def __call__(self, x):
        return project(
            project(x[None], self.param("a", lecun, (32, 32))), self.param("b", lecun, (32, 32))
        )[0]


def quantize(model: nn.Module, recipe: jq.Recipe, *args: Any) -> tuple[Any, Any, jq.report.Report]:
    variables = jax.jit(model.init)(jax.random.key(0), *args)
    return variables, *jq.ptq(model.apply, variables, recipe, *args)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_jitted_helper_does_not_leak(first: int) -> None:
    """Qwix: which of float and quantized came first decides what both return."""
    model = Helped()
    variables, qvariables, _ = quantize(model, jq.w8a8(), x)
    jax.clear_caches()
    calls = [
        lambda: model.apply(variables, x),
        lambda: linen.quantized(model).apply(qvariables, x),
        lambda: intercepted(model)(qvariables, x),
    ]
    results = {}
    for i in [*range(first, 3), *range(first)]:
        results[i] = jax.jit(calls[i])()
    again = jax.jit(lambda: model.apply(variables, x))()
    assert same(again, results[0]) and 0 < error(results[1], results[0]) < 0.03
    assert error(results[2], results[1]) < 1e-6


@pytest.mark.parametrize(
    "recipe", [jq.w8a8(), jq.w8a16(), jq.w4a16(group=32), jq.w4a8(group=32), jq.nf4(group=32)]
)
def test_scan(recipe: jq.Recipe) -> None:
    """Qwix: fails in every mode."""
    variables, qvariables, report = quantize(Scanned(), recipe, x)
    assert [leaf.path for leaf in report.leaves if leaf.quantized] == [
        f"params/ScanCheckpointBlock_0/Dense_{i}/kernel" for i in range(2)
    ]
    y = jax.jit(linen.quantized(Scanned()).apply)(qvariables, x)
    assert error(y, Scanned().apply(variables, x)) < (0.03 if "w8" in recipe.name else 0.2)


def test_tied_embedding_is_stored_once() -> None:
    """Qwix: fails."""
    tokens = jnp.arange(6).reshape(2, 3)
    variables, qvariables, report = quantize(Tied(), jq.w8a8(), tokens)
    (leaf,) = report.leaves
    assert leaf.path == "params/embed/embedding" and len(leaf.sites) == 2
    assert leaf.bytes_after < 0.3 * leaf.bytes_before
    y = intercepted(Tied())(qvariables, tokens)
    assert error(y, Tied().apply(variables, tokens)) < 0.03


@pytest.mark.parametrize("recipe", [jq.w4a16(group=20), jq.w4a8(group=64), jq.nf4(group=48)])
def test_groups_need_not_divide(recipe: jq.Recipe) -> None:
    """Qwix: groups must divide the axis; attention heads of 32 by 64 are refused as well."""
    model, sequence = nn.MultiHeadDotProductAttention(2), normal(2, 5, 32)
    variables, qvariables, report = quantize(model, recipe, sequence)
    assert sum(leaf.quantized for leaf in report.leaves) == 4
    y = jax.jit(linen.quantized(model).apply)(qvariables, sequence)
    assert error(y, model.apply(variables, sequence)) < 0.25


@pytest.mark.parametrize("recipe", [jq.w8a16(), jq.w4a16(group=32), jq.w4a8(group=32), jq.nf4()])
@pytest.mark.parametrize("groups", [1, 16])
def test_convolution_of_any_scheme(recipe: jq.Recipe, groups: int) -> None:
    """Qwix: refuses weight-only and 4-bit convolutions."""
    model, image = nn.Conv(32, (3, 3), strides=2, feature_group_count=groups), normal(2, 8, 8, 16)
    variables, qvariables, report = quantize(model, recipe, image)
    assert report["params/kernel"].quantized
    y = jax.jit(linen.quantized(model).apply)(qvariables, image)
    assert error(y, model.apply(variables, image)) < (0.01 if recipe.name == "w8a16" else 0.15)


@pytest.mark.parametrize("model", [LeftHand(), Twins()], ids=["left-hand", "same shapes"])
def test_weights_are_found_by_what_they_are(model: nn.Module) -> None:
    """Qwix: weights on the left, and two candidates of one shape, stay float without a word."""
    variables, qvariables, report = quantize(model, jq.w8a8(), x)
    assert all(leaf.quantized for leaf in report.leaves)
    y = jax.jit(linen.quantized(model).apply)
    assert set(contractions(y.lower(qvariables, x).as_text())) == {("i8", "i8")}
    assert error(y(qvariables, x), model.apply(variables, x)) < 0.03
