"""Static activations with a scale for each channel: the scales move into the weights."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant as jq
from jaxquant.observers import absmax, minmax, percentile
from tests.arrays import normal

CHANNELS = jq.int8(granularity=jq.PerChannel(-1))
SHIFTED = jq.int8(granularity=jq.PerChannel((-1,)), symmetric=False)
TENSOR = jq.int8(granularity=jq.PerTensor())
W8 = jq.int8()
# of 8 channels one is 40 times the others, one a fiftieth, and one is never used
SPREAD = np.array([1, 1, 40, 1, 0.02, 1, 0, 1], np.float32)


def spread(x: jax.Array) -> jax.Array:
    return x * SPREAD.reshape((1,) * (x.ndim - 1) + (-1,))


def rule(pattern: str = "**", activations: jq.QSpec = CHANNELS, **kwargs: Any) -> jq.Rule:
    how = {"weights": W8, "observer": absmax(axis=-1)} | kwargs
    return jq.Rule(pattern, activations=activations, **how)


# name: the weight's shape, the function of `x` `[2, 6, 8]`, the weight as the matrix it acts as,
# and whether it stays integer: what moves a weight's values makes it float, and is reported
FORMS: dict[str, tuple[Any, ...]] = {
    "dense": ((8, 6), lambda x, w: x @ w, lambda w: w, True),
    "heads": (
        *((8, 3, 2), lambda x, w: jnp.einsum("btk,khd->bthd", x, w).reshape(2, 6, 6)),
        *(lambda w: w.reshape(8, 6), True),
    ),
    "rows": ((6, 8), lambda x, w: jnp.einsum("btk,nk->btn", x, w), lambda w: w.T, True),
    "shifted": ((8, 6), lambda x, w: jax.nn.relu(x) @ w, lambda w: w, True),
    "groups": ((8, 6), lambda x, w: x @ w, lambda w: w, True),
    "packed": ((8, 6), lambda x, w: x @ w, lambda w: w, True),
    "cast": (
        *((8, 6), lambda x, w: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)),
        *(lambda w: w, True),
    ),
    "transposed": ((6, 8), lambda x, w: x @ w.T, lambda w: w.T, True),
    "reshaped": ((8, 3, 2), lambda x, w: x @ w.reshape(8, 6), lambda w: w.reshape(8, 6), False),
    "columns": ((8, 9), lambda x, w: x @ w[:, 1:7], lambda w: w[:, 1:7], False),
    "negated": ((8, 6), lambda x, w: x @ -w, lambda w: -w, False),
    "indexed": ((3, 8, 6), lambda x, w: x @ w[1], lambda w: w[1], False),
}
WEIGHTS = {"groups": jq.int8(group=4), "packed": jq.int4()}


def forms(p: Any, x: Any) -> Any:
    return {name: fn(x, p[name]) for name, (_, fn, _, _) in FORMS.items()}


@pytest.fixture(scope="module")
def served() -> tuple[Any, Any, Any, jax.Array, Any]:
    params = {name: normal(n, *shape) for n, (name, (shape, *_)) in enumerate(FORMS.items())}
    rules = [rule("shifted", SHIFTED, observer=minmax(axis=-1))]
    rules += [rule(name, weights=spec) for name, spec in WEIGHTS.items()]
    x = spread(normal(100, 2, 6, 8))
    qparams, report = jq.ptq(forms, params, [*rules, rule()], batches=[x, 0.7 * x])
    return params, qparams, report, x, jax.jit(jq.quantized(forms))(qparams, x)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_its_equation(name: str, served: Any) -> None:
    _, qparams, report, x, y = served
    _, _, matrix, integer = FORMS[name]
    q, x = qparams[name], np.asarray(x, np.float32)
    if name == "cast":
        x = np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float32)
    if name == "shifted":
        x = np.maximum(x, 0)
    held, rows = q.calibration, x.reshape(-1, 8)
    # channels beside the widest, but none below a 256th of it
    amax = np.abs(rows).max(axis=0)
    divisor = np.maximum(amax / amax.max(), 2.0**-8).astype(np.float32)
    np.testing.assert_allclose(held.divisor, divisor, rtol=3e-7)
    w = matrix(np.asarray(jq.dequantize(q), np.float64))
    if integer:
        grid = held.input
        zero = 0 if grid.zero_point is None else int(grid.zero_point)
        assert (zero < 0) == (name == "shifted")
        over = rows / np.asarray(held.divisor)
        if name == "cast":
            over = np.asarray(jnp.asarray(over).astype(jnp.bfloat16), np.float32)
        codes = np.clip(np.round(over / np.float32(grid.scale)) + zero, -128, 127) - zero
        values = codes * np.float64(grid.scale) * np.float64(held.divisor)
    else:
        values = rows.astype(np.float64)
    bound = np.abs(values) @ np.abs(w)
    error = np.abs(np.asarray(y[name], np.float64).reshape(-1, 6) - values @ w)
    assert (error <= (2.0**-8 if name == "cast" else 2.0**-19) * bound).all()
    moved = [e.where for e in report.events if e.kind == "dequantized"]
    assert (name in moved) is not integer
    floats = [e.where for e in report.events if e.kind == "contracted in float"]
    assert name not in floats


@pytest.mark.parametrize("name", FORMS)
def test_dequantize_gives_the_weight_back(name: str, served: Any) -> None:
    params, qparams, *_ = served
    q, w = qparams[name], np.asarray(params[name])
    # half a step of what is stored is half a step over the divisor of what it stands for
    size = w.shape[q.calibration.axis[0]]
    divisor = np.asarray(q.calibration.divisor)
    divisor = divisor.reshape(
        [size if (a,) == q.calibration.axis else 1 for a in range(-w.ndim, 0)]
    )
    back = np.asarray(jax.jit(jq.dequantize)(q))
    step = float(jnp.max(q.scale))
    assert (np.abs(back - w) <= 0.5001 * step / divisor).all()
    assert np.abs(back - w).max() < 0.51 * step / divisor.min()
    assert q.nbytes == sum(a.nbytes for a in jax.tree.leaves(q))


def test_outliers_cost_less_than_with_one_scale_and_contract_on_integers() -> None:
    def fn(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["a"]) @ p["b"]

    def error(q: Any) -> float:
        y = jax.jit(jq.quantized(fn))(q, x)
        return float(jnp.sqrt(jnp.mean((y - exact) ** 2)))

    # the widest channel has small weights, as those that follow a normalization do
    params = {"a": normal(1, 8, 16) / (10 * SPREAD[:, None] + 1), "b": normal(2, 16, 4)}
    x = spread(normal(3, 64, 8))
    exact = fn(params, x)
    found, _ = jq.ptq(fn, params, jq.w8a8_static(per_channel=True), batches=[x])
    one, _ = jq.ptq(fn, params, jq.w8a8_static(symmetric=True), batches=[x])
    assert error(found) < 0.5 * error(one)
    assert error(found) < 0.02 * float(jnp.std(exact))
    text = jax.jit(jq.quantized(fn)).lower(found, x).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    # of few rows the weight is on the left, so rows come last; either way a sum takes all of them
    results = [re.search(r"xi8>, tensor<[x\d]*xi8>\) -> tensor<([x\d]*)xi32>", d) for d in dots]
    assert [found and sorted(found[1].split("x")) for found in results] == [
        ["16", "64"],
        ["4", "64"],
    ]


def test_gradients_and_vmap() -> None:
    def fn(p: Any, x: Any) -> Any:
        return x @ p["w"]

    params, x = {"w": normal(1, 8, 4)}, spread(normal(2, 5, 8))
    q, _ = jq.ptq(fn, params, rule(observer=percentile(99.9, axis=-1)), batches=[x])
    serve = jq.quantized(fn)

    @jax.jit
    def every(q: Any, x: Any, g: Any) -> Any:
        y, back = jax.vjp(lambda x: serve(q, x), x)
        return y, back(g)[0], jax.vmap(serve, (None, 0))(q, x)

    g = normal(3, 5, 4)
    y, dx, rows = every(q, x, g)
    np.testing.assert_allclose(dx, g @ jq.dequantize(q["w"]).T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(rows, y, rtol=1e-6)


def test_layers_of_a_loop_have_divisors_of_their_own() -> None:
    def loop(p: Any, x: Any) -> Any:
        return lax.scan(lambda h, w: (h @ w + h, None), x, p["w"])[0]

    def unrolled(p: Any, x: Any) -> Any:
        for i in range(3):
            x = x @ p[f"w{i}"] + x
        return x

    w, x = 0.2 * normal(1, 3, 8, 8), spread(normal(2, 5, 8))
    q, report = jq.ptq(loop, {"w": w}, rule(), batches=[x])
    q1, _ = jq.ptq(unrolled, {f"w{i}": w[i] for i in range(3)}, rule(), batches=[x])
    assert q["w"].calibration.divisor.shape == (3, 8)
    y, y1 = jax.jit(jq.quantized(loop))(q, x), jax.jit(jq.quantized(unrolled))(q1, x)
    np.testing.assert_allclose(y, y1, rtol=1e-5, atol=1e-4)
    exact = unrolled({f"w{i}": w[i] for i in range(3)}, x)
    assert float(jnp.abs(y - exact).max()) < 0.03 * float(jnp.abs(exact).max())
    back = jax.jit(jq.dequantize)(q["w"])
    for i in range(3):
        layer = jax.tree.map(lambda a, i=i: a[i], q["w"])
        np.testing.assert_allclose(back[i], jax.jit(jq.dequantize)(layer), rtol=1e-6)
        np.testing.assert_allclose(back[i], jq.dequantize(q1[f"w{i}"]), rtol=1e-5, atol=1e-6)
    assert not report.events


def test_joined_parameters_are_divided_each_by_its_own() -> None:
    params, x = {n: normal(i, 8, 4) for i, n in enumerate("abc")}, spread(normal(5, 6, 8))

    def concat(p: Any, x: Any) -> Any:
        return x @ jnp.concatenate([p["a"], p["b"], p["c"]], 1)

    def stack(p: Any, x: Any) -> Any:
        return jnp.einsum("bk,ekn->bne", x, jnp.stack([p["a"], p["b"], p["c"]]))

    for fn in (concat, stack):
        for mixed in ([], [jq.Rule("a", weights=W8)]):
            q, _ = jq.ptq(fn, params, [*mixed, rule()], batches=[x])
            plain = jax.tree.map(jq.dequantize, q, is_leaf=lambda a: isinstance(a, jq.QTensor))
            y, want = jax.jit(jq.quantized(fn))(q, x), fn(plain, x)
            assert float(jnp.abs(y - want).max()) < 0.02 * float(jnp.abs(want).max())


def test_all_channels_dead() -> None:
    def fn(p: Any, x: Any) -> Any:
        return x @ p["w"]

    w = normal(1, 8, 4)
    q, _ = jq.ptq(fn, {"w": w}, rule(), batches=[jnp.zeros((3, 8))])
    np.testing.assert_array_equal(q["w"].calibration.divisor, np.ones(8))
    np.testing.assert_allclose(jq.dequantize(q["w"]), w, atol=0.51 * float(q["w"].scale.max()))
    assert not jax.jit(jq.quantized(fn))(q, jnp.zeros((3, 8))).any()


def twice(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["w"]) @ p["w"]


def image(p: Any, x: Any) -> Any:
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=numbers)


X = np.ones((2, 6, 8), np.float32)
REFUSED = {
    "two sites": (twice, (8, 8), "is used at several sites"),
    "indexed twice": (lambda p, x: x @ p["w"][0] + x @ p["w"][1], (2, 8, 8), "at several sites"),
    "looked up": (lambda p, x: (x @ p["w"].T, p["w"][jnp.array([1])]), (6, 8), "several sites"),
    "a convolution": (image, (3, 8, 4), r"contracted by conv_general_dilated over axes \[0, 1\]"),
    "two axes": (
        *(lambda p, x: jnp.einsum("btk,tkn->bn", x, p["w"]), (6, 8, 4)),
        r"contracted by dot_general over axes \[[01], [01]\]",
    ),
    "another axis": (lambda p, x: jnp.einsum("btk,tn->bkn", x, p["w"]), (6, 4), "another axis of"),
    "left": (lambda p, x: p["w"] @ x[0], (4, 6), "another axis of the activation than its last"),
    "in part": (lambda p, x: x[..., :4] @ p["w"][:4], (8, 6), "has 8 indices there, of 4 contr"),
    "joined": (
        *(lambda p, x: x @ jnp.concatenate([p["w"], p["v"]]), (4, 6)),
        "has 4 indices there, of 8 contracted",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_have_a_scale_for_each_channel(name: str) -> None:
    fn, shape, message = REFUSED[name]
    params = {"w": normal(1, *shape)} | ({"v": normal(2, *shape)} if name == "joined" else {})
    with pytest.raises(ValueError, match=rf"^[vw]: activations with a scale for .* {message}.*Put"):
        jq.ptq(fn, params, rule(), batches=[X])


def test_tied_leaves_are_refused() -> None:
    w = normal(1, 8, 8)
    with pytest.raises(ValueError, match="is used at several sites"):
        jq.ptq(lambda p, x: x @ p["a"] @ p["b"], {"a": w, "b": w}, rule(), batches=[X])
