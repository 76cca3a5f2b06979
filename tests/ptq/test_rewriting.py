"""Rules with a rewrite: factors of input channels, folded into what comes before or kept online."""

import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxquant as jq
from jaxquant.observers import absmax
from jaxquant.qtensor import is_qtensor
from tests.arrays import normal

# with weights that are hardly rounded, what is left of a difference is the rewrite's
FINE = jq.QSpec("float32", jq.PerChannel())
SKIP = jq.Rule("scale", skip=True)
SPREAD = np.array([1, 30, 1, 0.1, 1, 1, 8, 1], np.float32)


class Attention(nn.Module):
    """Heads of 2, keys and values shared by two of them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        q = nn.DenseGeneral((4, 2), use_bias=False, name="q")(x)
        k, v = (nn.DenseGeneral((2, 2), use_bias=False, name=n)(x) for n in "kv")
        k, v = (jnp.repeat(a, 2, axis=-2) for a in (k, v))
        y = nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        y = jnp.einsum("bhts,bshd->bthd", y, v)
        return nn.DenseGeneral(8, axis=(-2, -1), use_bias=False, name="out")(y)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        x = x + Attention(name="attn")(nn.RMSNorm(name="norm_a")(x))
        y = nn.LayerNorm(name="norm_b")(x)
        y = nn.silu(nn.Dense(12, name="gate")(y)) * nn.Dense(12, name="up")(y)
        return x + nn.Dense(8, name="down")(y), None


class Model(nn.Module):
    scan: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.scan:
            return Block(name="layers")(x)[0]
        options: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(Block, length=2, **options)(name="layers")(x, None)[0]


def made(scan: bool) -> tuple[Any, Any, list[jax.Array]]:
    model = Model(scan)
    variables = jax.jit(model.init)(jax.random.key(0), normal(0, 2, 5, 8))
    scale = np.asarray(variables["params"]["layers"]["norm_a"]["scale"])
    variables["params"]["layers"]["norm_a"]["scale"] = jax.device_put(
        scale * SPREAD.reshape((1,) * (scale.ndim - 1) + (8,))
    )
    return model.apply, variables, [normal(n, 2, 5, 8) for n in range(3)]


def relative(got: Any, want: Any) -> float:
    got, want = np.asarray(got), np.asarray(want)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def notes(report: Any) -> dict[str, str]:
    return {
        leaf.path.split("/")[-2]: " | ".join(leaf.notes) for leaf in report.leaves if leaf.notes
    }


@pytest.mark.parametrize(
    ("online", "sequential", "scan"),
    [
        (True, True, True),
        pytest.param(False, True, False, marks=pytest.mark.slow),
        pytest.param(False, False, True, marks=pytest.mark.slow),
        (True, False, False),
    ],
)
def test_the_function_stays_what_it_was(online: bool, sequential: bool, scan: bool) -> None:
    fn, variables, batches = made(scan)
    rule = jq.Rule("**", weights=FINE, rewrite=jq.smoothquant(online=online))
    q, report = jq.ptq(fn, variables, rule, batches=batches, sequential=sequential)
    plain = jax.jit(fn)
    y, z = plain(variables, batches[0]), jax.jit(jq.quantized(fn))(q, batches[0])
    for got in (z, plain(jq.dequantize_params(q), batches[0])):
        assert relative(got, y) < 1e-4
    said = notes(report)
    for name in "qkv":
        assert "factors folded into" in said[name] and "norm_a/scale" in said[name]
    assert "norm_b/bias" in said["gate"] and "up" in said["down"]
    kept = "one value feeds several of its channels" if online else "/v/kernel"
    assert kept in said["out"]
    before, after = (t["params"]["layers"]["norm_a"]["scale"] for t in (variables, q))
    assert not np.allclose(before, after)
    held = {p: x.calibration for p, x in named(q).items() if is_qtensor(x)}
    divided = [p for p, c in held.items() if c is not None and c.divisor is not None]
    assert [p.split("/")[-2] for p in divided] == (["out"] if online else [])


def named(tree: Any) -> dict[str, Any]:
    flat = jax.tree.leaves_with_path(tree, is_leaf=is_qtensor)
    return {"/".join(str(getattr(k, "key", k)) for k in path): leaf for path, leaf in flat}


@pytest.mark.slow
def test_the_caller_keeps_his_params() -> None:
    fn, variables, batches = made(True)
    before = jax.tree.map(np.array, variables)
    jq.ptq(fn, variables, jq.w8a8(attention=False).using(rewrite=jq.awq()), batches=batches)
    chex.assert_trees_all_equal(before, variables)


def error(fn: Any, variables: Any, q: Any, x: jax.Array) -> float:
    y, z = jax.jit(lambda p, q, x: (fn(p, x), jq.quantized(fn)(q, x)))(variables, q, x)
    return relative(z, y)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_smoothquant_serves_int8_activations(static: bool) -> None:
    def fn(p: Any, x: Any) -> Any:
        return jnp.tanh(x * p["scale"][None] @ p["a"]) @ p["b"]

    params = {"scale": jax.device_put(SPREAD), "a": normal(0, 8, 16), "b": normal(1, 16, 4)}
    batches = [normal(2 + n, 64, 8) for n in range(2)]
    how: dict[str, Any] = {"weights": jq.int8(), "activations": jq.int8()}
    given: Any = {}
    if static:
        how |= {"activations": jq.int8(granularity=jq.PerTensor()), "observer": absmax()}
        given = {"batches": batches}
    plain, smooth = (jq.Rule("**", rewrite=r, **how) for r in (None, jq.smoothquant()))
    rough, _ = jq.ptq(fn, params, [SKIP, plain], *([] if static else batches[:1]), **given)
    q, report = jq.ptq(fn, params, [SKIP, smooth], batches=batches)
    assert error(fn, params, q, batches[0]) < 0.7 * error(fn, params, rough, batches[0])
    assert not report.events
    text = jax.jit(jq.quantized(fn)).lower(q, batches[0]).as_text()
    assert (
        text.count("stablehlo.dot_general") == len(re.findall("dot_general.*xi8>.*xi8>", text)) == 2
    )


def test_static_ranges_are_of_what_is_left_of_the_activation() -> None:
    x, w = jax.device_put(np.asarray(normal(0, 64, 8)) * SPREAD[None]), normal(1, 8, 6)
    rule = jq.Rule(
        "**",
        weights=jq.int8(),
        activations=jq.int8(granularity=jq.PerTensor()),
        observer=absmax(),
        rewrite=jq.smoothquant(),
    )
    q, _ = jq.ptq(lambda p, x: x @ p["w"], {"w": w}, rule, batches=[x])
    held = q["w"].calibration
    top = np.abs(np.asarray(x) / np.asarray(held.divisor)[None]).max()
    np.testing.assert_allclose(float(held.input.scale), top / 127.5, rtol=1e-5)


def test_what_feeds_others_too_is_kept_online_and_said() -> None:
    def fn(p: Any, x: Any) -> Any:
        x = x * p["scale"][None]
        return x @ p["w"] + x[:, :6]

    params = {"scale": jax.device_put(SPREAD), "w": normal(0, 8, 6)}
    rule = jq.Rule("w", weights=jq.int8(), rewrite=jq.awq())
    q, report = jq.ptq(fn, params, rule, batches=[normal(1, 16, 8)])
    assert "factors stay on the activation" in " ".join(report["w"].notes)
    assert q["w"].calibration.divisor.shape == (8,)
    rule = jq.Rule("w", weights=jq.int8(), rewrite=jq.awq(online=False))
    q, report = jq.ptq(fn, params, rule, batches=[normal(1, 16, 8)])
    assert "not rewritten" in " ".join(report["w"].notes) and q["w"].calibration is None


def test_weights_of_one_activation_share_factors_only_with_those_of_their_rewrite() -> None:
    def fn(p: Any, x: Any) -> Any:
        x = x * p["scale"][None]
        return x @ p["a"], x @ p["b"], x @ p["c"]

    params = {"scale": jax.device_put(SPREAD), **{n: normal(i, 8, 6) for i, n in enumerate("abc")}}
    rules = [
        jq.Rule("c", weights=jq.int8()),
        jq.Rule("scale", skip=True),
        jq.Rule("**", weights=jq.int8(), rewrite=jq.smoothquant()),
    ]
    q, report = jq.ptq(fn, params, rules, batches=[normal(9, 16, 8)])
    a, b = (q[n].calibration.divisor for n in "ab")
    assert np.array_equal(a, b) and q["c"].calibration is None
    assert "factors stay on the activation" in " ".join(report["a"].notes)


def test_convolutions_experts_and_tables_are_left_as_they_are() -> None:
    def fn(p: Any, tokens: Any) -> Any:
        x = p["table"][tokens]
        y = jax.lax.conv_general_dilated(
            x, p["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        y = jnp.einsum("bwc,ecd->ebwd", y, p["spread"])
        return jnp.einsum("ebwd,edf->ebwf", y, p["experts"]), y.sum(0) @ p["table"].T

    shapes = {"table": (9, 4), "conv": (3, 4, 4), "spread": (2, 4, 4), "experts": (2, 4, 5)}
    params = {name: normal(n, *shape) for n, (name, shape) in enumerate(shapes.items())}
    rule = jq.Rule("**", weights=jq.int8(), rewrite=jq.awq(), lookup=jq.int8())
    tokens = np.arange(9, dtype=np.int32).reshape(3, 3)
    q, report = jq.ptq(fn, params, rule, batches=[tokens])
    assert "scale cannot move across conv" in " ".join(report["conv"].notes)
    assert "several activations" in " ".join(report["experts"].notes)
    assert all(q[n].calibration is None for n in ("conv", "experts", "table"))
    z, y = jax.jit(lambda q, p, x: (jq.quantized(fn)(q, x), fn(p, x)))(q, params, tokens)
    for a, b in zip(z, y, strict=True):
        assert relative(a, b) < 0.05


def test_a_divisor_moves_with_a_transposition() -> None:
    fn = lambda p, x: x @ p["w"].T
    rule = jq.Rule("**", weights=jq.int8(), activations=jq.int8(), rewrite=jq.smoothquant())
    x = jax.device_put(np.asarray(normal(0, 16, 8)) * SPREAD[None])
    q, report = jq.ptq(fn, {"w": normal(1, 6, 8)}, rule, batches=[x])
    assert not report.events
    assert error(fn, {"w": normal(1, 6, 8)}, q, x) < 0.02
