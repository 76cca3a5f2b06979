"""Palettes through `ptq` and `quantized`: scans, lookups, and every way to move a codebook."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant as jq
from jaxquant import PerBlock, PerChannel, QSpec, dequantize, kmeans, palette
from jaxquant.encoders import huffman_bits
from jaxquant.interpret import reshapes, slices
from tests.interpret.test_reshapes import MOVES, SHAPE

FORMAT = palette(2).format
SPECS = {
    "one codebook": palette(2),
    "per channel": QSpec(FORMAT, PerChannel(-1)),
    "channels": QSpec(FORMAT, PerChannel(1, size=4)),
    "uneven channels": QSpec(FORMAT, PerChannel(1, size=3)),
    "blocks": QSpec(FORMAT, PerBlock(2, 4, axes=(0, 1))),
    "256 levels": palette(6),
}


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def encode(spec, w, **how):
    return kmeans()(w, spec, **how)[0]


@functools.cache
def encoded(spec):
    return encode(SPECS[spec], normal(0, *SHAPE))


QUICK = ("one codebook", "channels")


@pytest.mark.parametrize(
    "spec", [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in SPECS]
)
def test_a_moved_codebook_is_the_moved_array(spec):
    @jax.jit
    def run(q):
        every = {name: on_q(q) for name, (on_q, _) in MOVES.items()}
        moved = {name: m for name, m in every.items() if m is not None}
        return dequantize(q), moved, {name: dequantize(m) for name, m in moved.items()}

    whole, moved, values = run(encoded(spec))
    for name, got in values.items():
        moved[name].validate()
        want = MOVES[name][1](np.asarray(whole))
        np.testing.assert_array_equal(got, want, err_msg=name)


@pytest.mark.parametrize("move", ["transpose", "slice"])
def test_a_codebook_may_be_moved_eagerly(move):
    q = encoded("channels")
    on_q, on_array = MOVES[move]
    np.testing.assert_array_equal(dequantize(on_q(q)), on_array(np.asarray(dequantize(q))))


def test_most_moves_stay_quantized():
    def moved(w, spec):
        q = encode(spec, w)
        return [on_q(q) for on_q, _ in MOVES.values()]

    w = normal(0, *SHAPE)
    every = [jax.eval_shape(functools.partial(moved, spec=spec), w) for spec in SPECS.values()]
    kept = [m for each in every for m in each if m is not None]
    assert len(kept) >= 0.7 * len(SPECS) * len(MOVES)


@pytest.mark.parametrize("spec", ["one codebook", "channels", "blocks"])
def test_batch_axes_move_too(spec):
    w = normal(0, *SHAPE)
    perms = ((0, 2, 1, 3), (1, 0, 2, 3), (3, 2, 1, 0))

    @jax.jit
    def run(q, alone):
        moved = [reshapes.transpose(q, perm) for perm in perms]
        whole = reshapes.promote(q)
        made = {
            "layer": jax.tree.map(lambda a: a[1], q),
            "moved": moved,
            "back": reshapes.demote(whole),
            "one": reshapes.demote(alone),
            "joined": slices.concatenate([q, q], 0),
        }
        is_q = lambda x: isinstance(x, jq.QTensor)
        assert all(is_q(x) for x in jax.tree.leaves(made, is_leaf=lambda x: x is None or is_q(x)))
        return whole, dequantize(q), dequantize(alone), jax.tree.map(dequantize, made, is_leaf=is_q)

    q = encode(SPECS[spec], np.stack([w, 2 * w, -w]), batch_axes=1)
    whole, *values = run(q, encoded("one codebook"))
    whole.validate()
    all_, alone, got = jax.tree.map(np.asarray, values)
    np.testing.assert_array_equal(got["layer"], all_[1])
    for perm, moved in zip(perms, got["moved"], strict=True):
        np.testing.assert_array_equal(moved, all_.transpose(perm), err_msg=str(perm))
    np.testing.assert_array_equal(got["back"], all_)
    np.testing.assert_array_equal(got["one"], alone)
    np.testing.assert_array_equal(got["joined"], np.concatenate([all_] * 2))


@pytest.mark.parametrize("channels", [None, pytest.param(4, marks=pytest.mark.slow), 6])
def test_the_forward_pass_is_that_of_the_values(channels):
    params = {
        "table": normal(1, 30, 16),
        "layers": {"in": normal(2, 3, 16, 32) / 4, "out": normal(3, 3, 16, 16) / 4},
        "heads": normal(4, 3, 16, 4) / 4,
    }

    def fn(p, x, ids):
        x = x + jnp.take(p["table"], ids, axis=0)

        def layer(x, w):
            q, k = jnp.split(x @ w["in"], 2, axis=-1)
            return x + jnp.tanh(q * k[:, ::-1]) @ w["out"][:, ::-1].T, None

        x = lax.scan(layer, x, p["layers"])[0]
        heads = jnp.einsum("nd,hdk->nhk", x, p["heads"])
        return heads.reshape(x.shape[0], -1), x @ p["table"].T, x[:, :8] @ p["table"][:10, :8].T

    x, ids = normal(5, 5, 16), np.array([0, 29, 7, 7, 3], np.int32)
    rule = jq.Rule("**", weights=palette(3, channels=channels), encoder=kmeans())
    qparams, report = jq.ptq(fn, params, rule, x, ids)
    assert all(leaf.quantized for leaf in report.leaves)
    assert qparams["layers"]["in"].codebook.shape[0] == 3
    want = jax.jit(lambda p, x, ids: fn(jq.dequantize_params(p), x, ids))(qparams, x, ids)
    got = jax.jit(jq.quantized(fn))(qparams, x, ids)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_tables_may_have_another_format():
    def fn(p, ids):
        return jnp.take(p["table"], ids, axis=0) @ p["w"]

    params = {"table": normal(1, 30, 16), "w": normal(2, 16, 16)}
    rule = jq.Rule("**", weights=palette(3), lookup=jq.int8(), encoder=kmeans())
    qparams, _ = jq.ptq(fn, params, rule, np.arange(4, dtype=np.int32))
    assert qparams["table"].spec.format.name == "int8"
    assert qparams["w"].codebook.shape == (8,)


def test_lookups_in_a_palette_take_rows_alone():
    def fn(p, ids):
        return jnp.take(p, ids, axis=0)

    table, _ = kmeans()(normal(1, 300, 16), palette(4))
    ids = np.array([[1, 299], [300, 0]], np.int32)  # one of them out of bounds
    run = jax.jit(jq.quantized(fn))
    np.testing.assert_array_equal(run(table, ids), jax.jit(fn)(dequantize(table), ids))
    text = run.lower(table, ids).as_text()
    assert "300x16xf32" not in text


def test_huffman_bits_are_those_of_an_optimal_prefix_code():
    counts = np.array([45, 13, 12, 16, 9, 5])  # lengths 1, 3, 3, 3, 4, 4
    assert huffman_bits(counts) == pytest.approx(2.24)
    assert huffman_bits([[1, 1], [2, 0]]) == pytest.approx(0.5)
    random = np.random.default_rng(0).integers(0, 100, 16)
    p = random / random.sum()
    entropy = -(p[p > 0] * np.log2(p[p > 0])).sum()
    assert entropy <= huffman_bits(random) < entropy + 1
    _, info = kmeans()(normal(1, 64, 64), palette(4))
    assert 3.0 < huffman_bits(info.details["counts"]) < 4.0
    for bad in ([], [0, 0], [-1, 2], [np.inf, 1]):
        with pytest.raises(ValueError, match="huffman_bits"):
            huffman_bits(bad)
