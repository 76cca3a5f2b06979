"""Moving a QTensor is moving the array it stands for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant import PerBlock, PerChannel, PerGroup, PerTensor, QSpec, dequantize, quantize
from jaxquant.interpret import reshapes, slices
from jaxquant.qtensor import QTensor

SPECS = {
    "int8 per tensor": QSpec("int8", PerTensor()),
    "int8 per channel": QSpec("int8", PerChannel(-1)),
    "uint8 asymmetric": QSpec("uint8", PerChannel((0, 2)), symmetric=False),
    "int4 groups": QSpec("int4", PerGroup(4, axis=1)),
    "int4 groups of two axes": QSpec("int4", PerGroup(8, axis=(0, 1))),
    "int3 uneven groups": QSpec("int3", PerGroup(5, axis=1)),
    "nf4 groups of two": QSpec("nf4", PerGroup(2, axis=1)),
    "fp8 blocks": QSpec("float8_e4m3fn", PerBlock(2, 4, axes=(0, 1))),
    "nvfp4": QSpec("nvfp4", PerGroup(4, axis=1)),
}
SHAPE = (6, 8, 4)

MOVES = {
    "transpose": (lambda q: reshapes.transpose(q, (2, 0, 1)), lambda w: w.transpose(2, 0, 1)),
    "merge": (lambda q: reshapes.reshape(q, (48, 4)), lambda w: w.reshape(48, 4)),
    "split": (lambda q: reshapes.reshape(q, (6, 2, 4, 4)), lambda w: w.reshape(6, 2, 4, 4)),
    "regroup": (lambda q: reshapes.reshape(q, (12, 4, 4)), lambda w: w.reshape(12, 4, 4)),
    "flatten": (lambda q: reshapes.reshape(q, (192,)), lambda w: w.reshape(192)),
    "unit axes": (
        lambda q: reshapes.reshape(q, (1, 6, 1, 8, 4)),
        lambda w: w.reshape(1, 6, 1, 8, 4),
    ),
    "slice": (lambda q: slices.cut(q, (0, 4, 0), (6, 4, 4)), lambda w: w[:, 4:]),
    "slice to end": (lambda q: slices.cut(q, (0, 5, 0), (6, 3, 4)), lambda w: w[:, 5:]),
    "row": (lambda q: slices.cut(q, (2, 0, 0), (1, 8, 4)), lambda w: w[2:3]),
    "stride": (lambda q: slices.cut(q, (1, 0, 0), (3, 8, 4), (2, 1, 1)), lambda w: w[1:6:2]),
    "reverse": (lambda q: slices.reverse(q, (0, 2)), lambda w: w[::-1, :, ::-1]),
    "join": (lambda q: slices.concatenate([q, q], 2), lambda w: jnp.concatenate([w, w], 2)),
    "join 0": (lambda q: slices.concatenate([q, q], 0), lambda w: jnp.concatenate([w, w], 0)),
    "repeat": (
        lambda q: slices.broadcast(q, (6, 3, 8, 4), (0, 2, 3)),
        lambda w: jnp.broadcast_to(w[:, None], (6, 3, 8, 4)),
    ),
    "scale": (lambda q: slices.rescale(q, -2.0), lambda w: -2.0 * w),
    "rows": (
        lambda q: slices.rows(q, jnp.array([[[3], [0]]]), 0, lax.GatherScatterMode.CLIP),
        lambda w: w[np.array([[3, 0]])],
    ),
    "rows of axis 1": (
        lambda q: slices.rows(q, jnp.array([[3]]), 1, lax.GatherScatterMode.CLIP),
        lambda w: w[:, np.array([3])].swapaxes(0, 1),
    ),
}
# what a scale's blocks forbid: groups that the move would cut, or that run over what it parts
ALWAYS = {"transpose", "unit axes", "scale"}


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    return np.random.default_rng(7).standard_normal(SHAPE).astype(np.float32)


def moved_all(q: QTensor) -> dict[str, QTensor | None]:
    return {move: on_q(q) for move, (on_q, _) in MOVES.items()}


@pytest.mark.parametrize("spec", SPECS)
def test_a_moved_tensor_is_the_moved_array(spec: str, weights: np.ndarray) -> None:
    q = jax.jit(quantize, static_argnums=1)(weights, SPECS[spec])

    @jax.jit
    def program(q: QTensor) -> tuple[dict[str, QTensor | None], dict[str, jax.Array], jax.Array]:
        moved = moved_all(q)
        got = {move: dequantize(m) for move, m in moved.items() if m is not None}
        return moved, got, dequantize(q)

    moved, got, w = program(q)
    for move, (_, on_array) in MOVES.items():
        if moved[move] is None:
            assert move not in ALWAYS, f"{move} of {spec} must stay quantized"
            continue
        moved[move].validate()
        want = np.asarray(on_array(np.asarray(w)))
        assert moved[move].shape == want.shape, move
        np.testing.assert_array_equal(got[move], want, err_msg=move)


@pytest.mark.parametrize("spec", ["int8 per channel", "nvfp4"])
def test_moves_are_alike_outside_of_jit(spec: str, weights: np.ndarray) -> None:
    q = quantize(weights, SPECS[spec])
    for move in ("merge", "slice", "scale"):
        moved = MOVES[move][0](q)
        assert moved is not None
        want = MOVES[move][1](np.asarray(dequantize(q)))
        np.testing.assert_array_equal(dequantize(moved.validate()), want, err_msg=move)


def test_most_moves_stay_quantized(weights: np.ndarray) -> None:
    kept: list[tuple[str, str]] = []

    def note(w: jax.Array) -> None:
        for name, spec in SPECS.items():
            moved = moved_all(quantize(w, spec))
            kept.extend((name, move) for move, m in moved.items() if m is not None)

    jax.eval_shape(note, weights)
    assert len(kept) >= 0.7 * len(SPECS) * len(MOVES)
    assert {m for s, m in kept if s == "int8 per channel"} == set(MOVES) - {"flatten"}


@pytest.mark.parametrize("spec", ["int8 per channel", "int4 groups", "nf4 groups of two", "nvfp4"])
def test_batch_axes_move_too(spec: str, weights: np.ndarray) -> None:
    stacked = np.stack([weights, 2 * weights, -weights])
    perms = (0, 2, 1, 3), (1, 0, 2, 3), (3, 2, 1, 0)

    @jax.jit
    def program(stacked: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        q = quantize(stacked, SPECS[spec], batch_axes=1)
        assert q.batch == (3,)
        whole = reshapes.promote(q)
        assert whole is not None
        assert whole.batch == ()
        back = reshapes.demote(whole)
        assert back is not None
        assert back.batch == (3,)
        one = slices.cut(q, (2, 0, 0, 0), (1, *SHAPE))
        assert one is not None
        made = {"layer": jax.tree.map(lambda a: a[1], q), "whole": whole, "back": back}
        made |= {"bare": reshapes.squeeze(one, [0])}
        made |= {str(perm): reshapes.transpose(q, perm) for perm in perms}
        assert all(m is not None for m in made.values())
        return dequantize(q), {name: dequantize(m) for name, m in made.items()}

    w, got = program(stacked)
    w = np.asarray(w)
    want = {"layer": w[1], "whole": w, "back": w, "bare": w[2]}
    want |= {str(perm): w.transpose(perm) for perm in perms}
    for name, values in want.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)
