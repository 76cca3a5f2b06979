"""Moving a QTensor is moving the array it stands for."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant import PerBlock, PerChannel, PerGroup, PerTensor, QSpec, dequantize, quantize
from jaxquant.interpret import cuts, moves

SPECS = {
    "int8 per tensor": QSpec("int8", PerTensor()),
    "int8 per channel": QSpec("int8", PerChannel(-1)),
    "uint8 asymmetric": QSpec("uint8", PerChannel((0, 2)), symmetric=False),
    "int4 groups": QSpec("int4", PerGroup(4, axis=1)),
    "int4 groups of two axes": QSpec("int4", PerGroup(8, axis=(0, 1))),
    "int3 uneven groups": QSpec("int3", PerGroup(5, axis=1)),
    "nf4 groups": QSpec("nf4", PerGroup(4, axis=1)),
    "fp8 blocks": QSpec("float8_e4m3fn", PerBlock(2, 4, axes=(0, 1))),
    "nvfp4": QSpec("nvfp4", PerGroup(4, axis=1)),
}
SHAPE = (6, 8, 4)

MOVES = {
    "transpose": (lambda q: moves.transpose(q, (2, 0, 1)), lambda w: w.transpose(2, 0, 1)),
    "merge": (lambda q: moves.reshape(q, (48, 4)), lambda w: w.reshape(48, 4)),
    "split": (lambda q: moves.reshape(q, (6, 2, 4, 4)), lambda w: w.reshape(6, 2, 4, 4)),
    "regroup": (lambda q: moves.reshape(q, (12, 4, 4)), lambda w: w.reshape(12, 4, 4)),
    "flatten": (lambda q: moves.reshape(q, (192,)), lambda w: w.reshape(192)),
    "unit axes": (lambda q: moves.reshape(q, (1, 6, 1, 8, 4)), lambda w: w.reshape(1, 6, 1, 8, 4)),
    "slice": (lambda q: cuts.cut(q, (0, 4, 0), (6, 4, 4)), lambda w: w[:, 4:]),
    "slice to end": (lambda q: cuts.cut(q, (0, 5, 0), (6, 3, 4)), lambda w: w[:, 5:]),
    "row": (lambda q: cuts.cut(q, (2, 0, 0), (1, 8, 4)), lambda w: w[2:3]),
    "stride": (lambda q: cuts.cut(q, (1, 0, 0), (3, 8, 4), (2, 1, 1)), lambda w: w[1:6:2]),
    "reverse": (lambda q: cuts.reverse(q, (0, 2)), lambda w: w[::-1, :, ::-1]),
    "join": (lambda q: cuts.concatenate([q, q], 2), lambda w: jnp.concatenate([w, w], 2)),
    "join 0": (lambda q: cuts.concatenate([q, q], 0), lambda w: jnp.concatenate([w, w], 0)),
    "repeat": (
        lambda q: cuts.broadcast(q, (6, 3, 8, 4), (0, 2, 3)),
        lambda w: jnp.broadcast_to(w[:, None], (6, 3, 8, 4)),
    ),
    "scale": (lambda q: cuts.rescale(q, -2.0), lambda w: -2.0 * w),
    "rows": (
        lambda q: cuts.rows(q, jnp.array([[[4], [0]]]), 0, lax.GatherScatterMode.CLIP),
        lambda w: w[jnp.array([[4, 0]])],
    ),
    "rows of axis 1": (
        lambda q: cuts.rows(q, jnp.array([[3]]), 1, lax.GatherScatterMode.CLIP),
        lambda w: w[:, jnp.array([3])].swapaxes(0, 1),
    ),
}
# what a scale's blocks forbid: groups that the move would cut, or that run over what it parts
ALWAYS = {"transpose", "unit axes", "scale"}


@pytest.fixture(scope="module")
def weights() -> jax.Array:
    return jax.random.normal(jax.random.key(7), SHAPE)


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("spec", SPECS)
def test_a_moved_tensor_is_the_moved_array(spec: str, move: str, weights: jax.Array) -> None:
    q = quantize(weights, SPECS[spec])
    on_q, on_array = MOVES[move]
    moved = on_q(q)
    if moved is None:
        assert move not in ALWAYS, f"{move} of {spec} must stay quantized"
        return
    moved.validate()
    want = on_array(dequantize(q))
    assert moved.shape == want.shape
    np.testing.assert_array_equal(dequantize(moved), want)


def test_most_moves_stay_quantized(weights: jax.Array) -> None:
    kept = [
        (spec, move)
        for spec, move in itertools.product(SPECS, MOVES)
        if MOVES[move][0](quantize(weights, SPECS[spec])) is not None
    ]
    assert len(kept) >= 0.7 * len(SPECS) * len(MOVES)
    assert {m for s, m in kept if s == "int8 per channel"} == set(MOVES) - {"flatten"}


@pytest.mark.parametrize("spec", ["int8 per channel", "int4 groups", "nf4 groups", "nvfp4"])
def test_batch_axes_move_too(spec: str, weights: jax.Array) -> None:
    stacked = jnp.stack([weights, 2 * weights, -weights])
    q = quantize(stacked, SPECS[spec], batch_axes=1)
    assert q.batch == (3,)
    layer = jax.tree.map(lambda a: a[1], q)
    np.testing.assert_array_equal(dequantize(layer), dequantize(q)[1])
    for perm in ((0, 2, 1, 3), (1, 0, 2, 3), (3, 2, 1, 0)):
        moved = moves.transpose(q, perm)
        assert moved is not None
        np.testing.assert_array_equal(dequantize(moved), dequantize(q).transpose(perm))
    whole = moves.promote(q)
    assert whole is not None
    assert whole.batch == ()
    np.testing.assert_array_equal(dequantize(whole), dequantize(q))
    back = moves.demote(whole)
    assert back is not None
    assert back.batch == (3,)
    np.testing.assert_array_equal(dequantize(back), dequantize(q))
    one = cuts.cut(q, (2, 0, 0, 0), (1, *SHAPE))
    assert one is not None
    bare = moves.squeeze(one, [0])
    assert bare is not None
    np.testing.assert_array_equal(dequantize(bare), dequantize(q)[2])
