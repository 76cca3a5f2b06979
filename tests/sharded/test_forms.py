"""How a CPU contracts is chosen by where the operands are, and gives the same everywhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from jaxquant.ops import lowering
from tests.arrays import normal
from tests.ops.cases import EXACT, LIMBS, assert_near

K, N = 256, 96
WIDE = 2048  # values enough for tiles
PRESETS = {
    "w8a8": (jq.w8a8(), EXACT),
    "w8a16": (jq.w8a16(), LIMBS),
    "w4a8": (jq.w4a8(group=32), EXACT),
    "w4a16": (jq.w4a16(group=64), LIMBS),
    "nf4": (jq.nf4(group=32), EXACT),
    "fp8": (jq.w8a8_fp8(), EXACT),
    "mxfp4": (jq.mxfp4(), LIMBS),
    "fp4": (jq.fp4(group=32), EXACT),
    "nf4 double": (jq.nf4(double=True), EXACT),
    "llm_int8": (jq.llm_int8(), EXACT),
    "static": (jq.w8a8_static(), EXACT),
}


def meshed(kind: AxisType, count: int = 8) -> jax.sharding.Mesh:
    return jax.make_mesh((count,), ("model",), (kind,), devices=jax.devices()[:count])


def fn(params: Any, x: Any) -> Any:
    return {name: x @ w for name, w in params.items()}


def known(x: Any, y: Any) -> bool:
    """What is known while a function of both is traced."""
    found = []
    jax.jit(lambda x, y: found.append(lowering.undivided(x, y)))(x, y)
    return found[0]


@pytest.mark.parametrize(
    ("kind", "x", "y", "expected"),
    [
        (AxisType.Auto, P(), P(), False),  # the compiler may divide what lies whole
        (AxisType.Auto, None, P("model"), False),
        (AxisType.Explicit, P(), P(), True),
        (AxisType.Explicit, None, P(), True),
        (AxisType.Explicit, P(), P("model"), False),
        (AxisType.Explicit, P(None, "model"), None, False),
    ],
)
def test_a_mesh_says_what_is_divided(kind: AxisType, x: P, y: P, expected: bool) -> None:
    mesh, a = meshed(kind), normal(0, 8, 8)
    placed = [a if s is None else jax.device_put(a, NamedSharding(mesh, s)) for s in (x, y)]
    assert known(*placed) == expected
    with jax.set_mesh(mesh):
        assert known(*placed) == expected


def test_a_mesh_of_one_device_divides_nothing() -> None:
    for kind in (AxisType.Auto, AxisType.Explicit):
        placed = jax.device_put(normal(0, 8, 8), NamedSharding(meshed(kind, 1), P("model")))
        assert known(placed, placed)


def test_the_mesh_in_context_counts() -> None:
    a = normal(0, 8, 8)
    with jax.set_mesh(meshed(AxisType.Auto)):
        assert not known(a, a)
    with jax.set_mesh(meshed(AxisType.Explicit)):
        assert known(a, a)


def test_parts_are_whole_inside_shard_map() -> None:
    found, mesh, a = [], meshed(AxisType.Auto), normal(0, 8, 8)
    split = jax.shard_map(
        lambda x: (found.append(lowering.undivided(x)), x)[1],
        mesh=mesh, in_specs=P("model"), out_specs=P("model"),
    )  # fmt: skip
    jax.jit(split)(a)
    assert found == [True]


def test_without_a_mesh_devices_are_counted() -> None:
    """What `in_shardings` divides has no mesh while it is traced."""
    a = normal(0, 8, 8)
    assert not known(a, a)


@pytest.fixture(scope="module")
def qparams() -> Any:
    """A weight for each preset: one program has them all."""
    rules = [dataclasses.replace(jq.Recipe(r).rules[0], pattern=n) for n, (r, _) in PRESETS.items()]
    wide = {"nf4": WIDE}
    params = {name: normal(i, K, wide.get(name, N)) for i, name in enumerate(PRESETS)}
    return jq.ptq(fn, params, jq.Recipe(rules), batches=[normal(1, 1, K)], progress=False)[0]


def placed(tree: Any, mesh: jax.sharding.Mesh, axis: str | None) -> Any:
    """Arrays on a mesh, a weight's kept axis, the first that it stores, along `axis`."""

    def put(a: jax.Array) -> jax.Array:
        divides = axis is not None and a.ndim and a.shape[0] in (N, WIDE)
        return jax.device_put(a, NamedSharding(mesh, P(axis) if divides else P()))

    return jax.tree.map(put, tree)


@pytest.mark.parametrize("rows", [1, 2, 16, 70])
def test_one_device_and_eight_agree(qparams: Any, rows: int) -> None:
    x, call = normal(1, rows, K), jax.jit(jq.quantized(fn))
    one, eight = meshed(AxisType.Auto, 1), meshed(AxisType.Auto)
    whole = meshed(AxisType.Explicit)
    alone = call(placed(qparams, one, None), placed(x, one, None))
    split = jax.shard_map(jq.quantized(fn), mesh=eight, in_specs=(P(), P()), out_specs=P())
    for others in (
        call(placed(qparams, eight, "model"), placed(x, eight, None)),
        call(placed(qparams, whole, None), placed(x, whole, None)),
        jax.jit(split)(qparams, x),
    ):
        for name, y in others.items():
            w, bound = jq.dequantize(qparams[name]), PRESETS[name][1]
            assert_near(np.asarray(y), x, w, np.asarray(alone[name]), bound)
