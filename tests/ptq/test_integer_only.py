"""Networks that run on integers throughout, against the equations in NumPy, bit for bit."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import jaxquant as jq
from tests.arrays import normal
from tests.ops import integer_reference as ref
from tests.ptq.networks import (
    ACTIVATIONS,
    MODES,
    NETWORKS,
    ROWS,
    WEIGHTS,
    made,
    rule,
)


@functools.cache
def served(fn):
    return jax.jit(jq.quantized(fn))


def check(network, qparams, x):
    fn = served(network.fn)
    y, expected = fn(qparams, x), network.expected(network.layers(qparams), network.params, x)
    np.testing.assert_array_equal(y, expected, strict=True)
    np.testing.assert_array_equal(fn(qparams, x), y)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_its_equations(name):
    network = NETWORKS[name]
    qparams, report = made(name)
    assert all(edge.integer for edge in report.edges), report
    taken = {(source, to) for source, to in network.takers.items() if to is not None}
    assert taken <= {(edge.source, edge.target) for edge in report.edges}
    check(network, qparams, network.x)
    # a quarter of the values lies beyond the grids: the integers saturate alike
    check(network, qparams, 3 * np.asarray(network.x))


def test_every_pair_of_formats_is_tried():
    rules = [r for network in NETWORKS.values() for r in network.recipe()]
    for weights in WEIGHTS.values():
        of = [r for r in rules if r.weights == weights]
        assert {r.activations for r in of} == set(ACTIVATIONS.values())
        assert {r.requantize for r in of} == set(MODES)


def test_one_row():
    # one row takes another way through the contraction than many
    qparams, _ = made("rows")
    check(ROWS, qparams, np.asarray(ROWS.x)[:1])


CONTRACTION = re.compile(
    r"stablehlo\.(?:dot_general|convolution).*: \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\)"
    r" -> tensor<(?:\d+x)*(\w+)>"
)
CONVERSION = re.compile(r"stablehlo\.convert.*tensor<(?:\d+x)*u?i8>\) -> tensor<(?:\d+x)*(\w+)>")


def text_for(platform, fn, qparams, x):
    if platform == "cpu":
        return jax.jit(fn).lower(qparams, x).as_text()
    return str(export.export(jax.jit(fn), platforms=[platform])(qparams, x).mlir_module())


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("name", ["images", "rows"])
def test_nothing_is_float_between_layers(name, platform):
    network = NETWORKS[name]
    text = text_for(platform, jq.quantized(network.fn), made(name)[0], network.x)
    found = CONTRACTION.findall(text)
    assert len(found) == len(re.findall(r"stablehlo\.(?:dot_general|convolution)\b", text))
    assert set(found) == {("i8", "i8", "i32")}
    # zero points cost no further one; on a CPU, depthwise ones are sums of shifted products
    depthwise = {"depthwise", "double"} & set(network.takers) if platform == "cpu" else ()
    assert len(found) == len(network.takers) - len(depthwise)
    assert not [to for to in CONVERSION.findall(text) if not to.startswith(("i", "ui"))]
    # and the patterns do find a float contraction
    other = text_for(platform, network.fn, network.params, network.x)
    assert ("f32", "f32", "f32") in CONTRACTION.findall(other)


def test_transforms():
    qparams, _ = made("rows")
    fn = served(ROWS.fn)
    y = fn(qparams, ROWS.x)
    each = jax.jit(jax.vmap(lambda x: jq.quantized(ROWS.fn)(qparams, x)))
    each = each(np.asarray(ROWS.x)[:, None])
    np.testing.assert_array_equal(np.asarray(each)[:, 0], y)
    leaves, tree = jax.tree.flatten(qparams)
    again = jax.tree.unflatten(tree, [jax.device_put(np.array(a)) for a in leaves])
    np.testing.assert_array_equal(fn(again, ROWS.x), y)
    held = export.export(fn)(qparams, ROWS.x)
    held = export.deserialize(held.serialize())
    np.testing.assert_array_equal(held.call(qparams, ROWS.x), y)
    with pytest.raises(TypeError, match="between contractions have no gradient"):
        jax.grad(lambda x: fn(qparams, x).sum())(ROWS.x)


# Loops and helpers: what is not known beforehand is worked out at run time, alike.


def block_expected(q, p, x):
    """One block from floats to floats."""
    up, down = ref.layer(q["up"], q["down"]), ref.layer(q["down"])
    total = ref.dense(up.x.whole(up.x.code(x)), up.w, "nk,ko->no")
    codes = ref.result(up, total, up.scale[:1], np.asarray(p["up_b"])[None]).codes()
    codes = up.y.relu(codes)
    total = ref.dense(down.x.whole(codes), down.w, "nk,ko->no")
    return ref.result(down, total, down.scale[:1]).floats()


@pytest.mark.parametrize("mode", MODES)
def test_layers_in_a_loop(mode):
    count = 3
    params = {
        "up": normal(1, count, 5, 7),
        "up_b": normal(2, count, 7),
        "down": normal(3, count, 7, 5),
    }
    x = normal(4, 6, 5)

    def body(x, p):
        y = jax.nn.relu(x @ p["up"] + p["up_b"][None]) @ p["down"]
        return jnp.tanh(y), y

    def fn(p, x):
        return lax.scan(body, x, p)

    rules = [
        rule("up", "int8 asymmetric", "uint8 asymmetric", mode),
        rule("down", "int4", "int8 asymmetric", mode),
    ]
    qparams, report = jq.ptq(fn, params, rules, batches=[x])
    assert "up -> down: int8" in map(str, report.edges)
    for name in ("up", "down"):
        held = qparams[name].calibration
        assert held.input.scale.shape == (count,)
        assert len(set(held.input.scale.tolist())) == count
    assert qparams["up"].calibration.offset.shape == (count, 7)
    _, ys = jax.jit(jq.quantized(fn))(qparams, x)
    ys, host = np.asarray(ys), jax.tree.map(np.asarray, (qparams, params))
    one = jax.jit(jq.quantized(lambda p, x: body(x, p)))
    for n in range(count):
        q, p = jax.tree.map(lambda a, n=n: a[n], host)
        np.testing.assert_array_equal(ys[n], block_expected(q, p, np.asarray(x)))
        x, y = one(q, x)
        np.testing.assert_array_equal(ys[n], y)


def test_a_jitted_helper_for_every_layer():
    params = {f"w{n}": normal(n, 6, 6) for n in range(3)}
    params |= {f"b{n}": normal(n, 6) for n in range(3)}
    x = normal(7, 4, 6)

    @jax.jit
    def helper(x, w, b):
        return jax.nn.relu(x @ w + b[None])

    def fn(p, x):
        for n in range(3):
            x = helper(x, p[f"w{n}"], p[f"b{n}"])
        return x

    qparams, report = jq.ptq(
        fn, params, rule("w?", "int8", "int8 asymmetric", "fixed_point"), batches=[x]
    )
    assert [str(e) for e in report.edges] == ["w0 -> w1: int8", "w1 -> w2: int8"]
    y = jax.jit(jq.quantized(fn))(qparams, x)
    layers = [ref.layer(qparams[f"w{n}"], qparams.get(f"w{n + 1}")) for n in range(3)]
    q = layers[0].x.code(x)
    for n, at in enumerate(layers):
        total = ref.dense(at.x.whole(q), at.w, "nk,ko->no")
        sums = ref.result(at, total, at.scale[:1], np.asarray(params[f"b{n}"])[None])
        if at.y is not None:
            q = at.y.relu(sums.codes())
    np.testing.assert_array_equal(y, np.maximum(sums.floats(), 0))


def test_bfloat16():
    names = ("plain", "plain_b", "flipped")
    some = {n: np.asarray(ROWS.params[n]).astype(jnp.bfloat16) for n in names}
    some, x = jax.device_put((some, np.asarray(ROWS.x).astype(jnp.bfloat16)))

    def fn(p, x):
        x = jax.nn.relu(x @ p["plain"] + p["plain_b"][None])
        return jnp.einsum("nk,ok->no", x, p["flipped"])

    rules = rule("*[nd]", "int8 asymmetric", "int8 asymmetric", "float32")
    qparams, _ = jq.ptq(fn, some, rules, batches=[x])
    y = jax.jit(jq.quantized(fn))(qparams, x)
    first, second = ref.layer(qparams["plain"], qparams["flipped"]), ref.layer(qparams["flipped"])
    total = ref.dense(first.x.whole(first.x.code(x)), first.w, "nk,ko->no")
    bias = np.asarray(some["plain_b"]).astype(np.float32)[None]
    q = first.y.relu(ref.result(first, total, first.scale[:1], bias).codes())
    total = ref.dense(second.x.whole(q), second.w, "nk,ok->no")
    expected = ref.result(second, total, second.scale[:, 0][None]).floats()
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, expected.astype(y.dtype))


def test_a_channel_without_a_gain_is_its_bias():
    params = {"w": normal(1, 5, 4), "v": normal(2, 4, 3), "gain": np.float32([1.5, 0.0, -0.5, 0.0])}
    params["bias"] = np.float32([0.1, 0.7, 0.3, 0.0])
    params, x = jax.device_put(params), normal(3, 6, 5)

    def fn(p, x):
        return jax.nn.relu((x @ p["w"]) * p["gain"][None] + p["bias"][None]) @ p["v"]

    rules = rule("[wv]", "int8", "int8 asymmetric", "fixed_point")
    qparams, report = jq.ptq(fn, params, rules, batches=[x])
    assert report.edges[0].integer
    y = jax.jit(jq.quantized(fn))(qparams, x)
    first, second = ref.layer(qparams["w"], qparams["v"]), ref.layer(qparams["v"])
    total = ref.dense(first.x.whole(first.x.code(x)), first.w, "nk,ko->no")
    gain, bias = np.asarray(params["gain"]), np.asarray(params["bias"])
    has = gain != 0
    sums = ref.result(first, total, first.scale[:1], bias[None], np.where(has, gain, 1)[None])
    codes = np.where(has, sums.codes(), first.y.code(bias))
    total = ref.dense(second.x.whole(first.y.relu(codes)), second.w, "nk,ko->no")
    np.testing.assert_array_equal(y, ref.result(second, total, second.scale[:1]).floats())
