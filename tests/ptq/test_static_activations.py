"""Contractions on static grids through `ptq` and `quantized`, against the equations in NumPy."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.observers import minmax
from jaxquant.ops import lowering
from tests.arrays import normal
from tests.ops import integer_reference as ref
from tests.ptq.static import (
    ASYM,
    F32,
    FLOAT8,
    INT4,
    INT8,
    POSITIVE,
    TENSOR,
    UINT8,
    W4,
    W8,
    W8A,
    equations,
    expected_grid,
)

SIZES = {"b": 5, "k": 16, "n": 6, "h": 3, "d": 4, "e": 3}


@dataclasses.dataclass(frozen=True)
class Case:
    """One contraction `numbers` (as of an einsum) of an activation and a parameter.

    `form`: `exact` where sums are scaled by `S_x S_w` at once; `batched` where they are by `S_w`,
    then by `S_x`; `parts` where float32 sums of several integer ones; `float` where not integer.
    """

    numbers: str
    weights: jq.QSpec
    activations: jq.QSpec
    form: str = "exact"
    left: bool = False  # whether the parameter is the left operand
    sizes: tuple[tuple[str, int], ...] = ()

    @property
    def axes(self) -> tuple[str, str, str]:
        """Letters of the activation, of the parameter and of the result."""
        operands, out = self.numbers.split("->")
        first, second = operands.split(",")
        return (second, first, out) if self.left else (first, second, out)

    def shape(self, letters: str) -> tuple[int, ...]:
        return tuple((SIZES | dict(self.sizes))[c] for c in letters)

    def contract(self, x: Any, w: Any, how: Any) -> Any:
        return how(self.numbers, *((w, x) if self.left else (x, w)))


DENSE = "bk,kn->bn"
CASES = {
    "symmetric": Case(DENSE, W8, INT8),
    "asymmetric": Case(DENSE, W8, ASYM),
    "both asymmetric": Case(DENSE, W8A, UINT8),
    "unsigned": Case(DENSE, jq.int8(range="signed"), POSITIVE),
    "4-bit activations": Case(DENSE, W8, INT4),
    "left": Case("nk,bk->nb", W8A, ASYM, left=True),
    "two axes": Case("bhd,hdn->bn", W8, ASYM),
    "vector": Case("k,kn->n", W8, ASYM),
    "row": Case(DENSE, W8A, ASYM, sizes=(("b", 1),)),
    "experts": Case("ebk,ekn->ebn", W8A, ASYM, "batched"),
    "experts inside": Case("bek,ekn->ben", jq.int8(granularity=TENSOR), INT8, "batched"),
    "4-bit weights": Case(DENSE, W4, ASYM, "parts"),
    "groups": Case(DENSE, jq.int4(group=8), ASYM, "parts", sizes=(("k", 32),)),
    "float8": Case(DENSE, jq.QSpec("float8_e4m3fn"), FLOAT8, "float"),
    "scales along": Case(DENSE, jq.int8(granularity=jq.PerChannel(0)), ASYM, "float"),
}
FLOAT32_EPS = 2.0**-24


def contractions(p: Any, x: Any) -> Any:
    return {name: case.contract(x[name], p[name], jnp.einsum) for name, case in CASES.items()}


def inputs(seed: int, factor: float) -> dict[str, jax.Array]:
    found = {}
    for n, (name, case) in enumerate(CASES.items()):
        values = factor * (normal(100 * seed + n, *case.shape(case.axes[0])) + 0.4)
        found[name] = jnp.abs(values) if case.activations == POSITIVE else values
    return found


def beyond(x: jax.Array) -> jax.Array:
    """The same array with a value that calibration did not see."""
    return x.ravel().at[0].set(50.0).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class Served:
    """Everything that came of `CASES`; `x` goes beyond what calibration saw."""

    batches: list[dict[str, jax.Array]]
    qparams: Any
    report: jq.report.Report
    x: dict[str, jax.Array]
    y: dict[str, jax.Array]


@pytest.fixture(scope="module")
def served() -> Served:
    params = {
        name: normal(n, *case.shape(case.axes[1])) for n, (name, case) in enumerate(CASES.items())
    }
    recipe = [
        jq.Rule(name, weights=c.weights, activations=c.activations, observer=minmax())
        for name, c in CASES.items()
    ]
    batches, x = [inputs(1, 1.0), inputs(2, 1.0)], jax.tree.map(beyond, inputs(3, 2.0))
    qparams, report = jq.ptq(contractions, params, recipe, batches=batches)
    return Served(batches, qparams, report, x, jax.jit(jq.quantized(contractions))(qparams, x))


def along_result(case: Case, scale: np.ndarray) -> np.ndarray:
    """Scales of a parameter, of its shape, laid out for the result."""
    _, letters, out = case.axes
    kept = [c for c in letters if c in out]
    scale = scale.min(axis=tuple(a for a, c in enumerate(letters) if c not in out))
    scale = scale.transpose([kept.index(c) for c in out if c in kept])
    return np.expand_dims(scale, [a for a, c in enumerate(out) if c not in kept])


@pytest.mark.parametrize("name", CASES)
def test_a_contraction_is_its_equation(name: str, served: Served) -> None:
    case, q, x = CASES[name], served.qparams[name], np.asarray(served.x[name])
    held, y = q.calibration, np.asarray(served.y[name])
    if case.activations == FLOAT8:
        amax = max(np.abs(b[name]).max() for b in served.batches)
        codes = np.clip(x / F32(held.input.scale), -448, 448).astype(jnp.float8_e4m3fn)
        np.testing.assert_allclose(float(held.input.scale), amax / 448, rtol=1e-6)
        values = codes.astype(np.float64) * float(held.input.scale)
    else:
        scale, zero, least, most = expected_grid(
            case.activations, [b[name] for b in served.batches]
        )
        np.testing.assert_allclose(F32(held.input.scale), scale, rtol=2e-7)
        assert int(held.input.zero_point or 0) == zero
        grid = ref.Grid(F32(held.input.scale), zero, least, most)
        codes = grid.whole(grid.code(x))
        assert codes.max() + zero == most and 50 / scale > 2 * most, "beyond the range"
        values = codes * np.float64(grid.scale)
    if case.form in ("exact", "batched"):
        at = ref.layer(q)
        total = case.contract(codes, at.w, np.einsum).astype(F32)
        by = along_result(case, at.scale)
        exact = case.form == "exact"
        want = total * (by * grid.scale) if exact else total * by * grid.scale
        if exact:
            np.testing.assert_array_equal(y, want)
        np.testing.assert_allclose(y, want, rtol=2 * FLOAT32_EPS)
        assert (held.offset is None) == (zero == 0)
        if zero:
            letters, out = case.axes[1:]
            over = tuple(a for a, c in enumerate(letters) if c not in out)
            np.testing.assert_array_equal(held.offset, -zero * at.w.sum(axis=over))
    else:
        w = np.asarray(jq.dequantize(q), np.float64)
        want = case.contract(values, w, np.einsum)
        bound = case.contract(np.abs(values), np.abs(w), np.einsum)
        assert (np.abs(y - want) <= 8 * FLOAT32_EPS * bound).all()


def test_only_forms_without_integer_sums_are_reported(served: Served) -> None:
    lost = [e.where for e in served.report.events if e.kind == "contracted in float"]
    assert lost == ["scales along"]
    assert "activations uint8 static" in served.report["both asymmetric"].action


def test_a_zero_point_costs_no_sum_at_run_time(served: Served) -> None:
    def only(name: str) -> Any:
        def fn(p: Any, x: Any) -> Any:
            return CASES[name].contract(x, p[name], jnp.einsum)

        return jax.make_jaxpr(jq.quantized(fn))({name: served.qparams[name]}, served.x[name])

    for name in ("symmetric", "asymmetric", "left", "two axes", "vector"):
        found = list(equations(only(name).jaxpr))
        dots = [e for e in found if e.primitive.name == "dot_general"]
        # one product for each platform, of which a CPU has the weight on the left
        assert dots and {v.aval.dtype for e in dots for v in e.invars} == {jnp.dtype("int8")}, name
        sums = [e for e in found if e.primitive.name == "reduce_sum"]
        # a weight with a zero point needs the rows' sums; never those of the weight. A row alone is
        # multiplied and summed in one loop.
        one_loop = name == "vector" and lowering.FUSES_SUMS
        assert len(sums) == (CASES[name].weights == W8A) + one_loop, name
