"""`quantize_state` in everything that optax and JAX do with a transformation and its state."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxquant.optim import Blocks, StateSpec, adam8bit, is_blocks, lion8bit, quantize_state
from jaxquant.optim.blocks import decode
from jaxquant.optim.leafwise import agree


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


PARAMS = {"w": normal(2, 16, 256), "v": normal(8, seed=1), "b": normal(8, seed=2)}


def stepped(tx, params=PARAMS, steps: int = 2):
    """The last update and the state: one compilation."""

    def step(carry, _):
        updates, state = tx.update(params, carry[1], params)
        return (updates, state), None

    def run(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0]

    return jax.jit(run)(params)


def close(got, want, rtol: float = 0.04) -> None:
    """Leaf by leaf, over the whole leaf. The cells of a decade are 1.4 % of its top wide, so that
    errors are 0.4 % (near the top) to 4 % (near the bottom) of a value.
    """
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= rtol * np.linalg.norm(b)


INNER = {
    "adam": optax.scale_by_adam(),
    "novograd": optax.scale_by_novograd(),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam()),
    "masked": optax.masked(optax.scale_by_adam(), {"w": True, "v": True, "b": False}),
    "decay mask": optax.adamw(0.1, mask={"w": True, "v": False, "b": False}),
    "factored": optax.adafactor(0.1, min_dim_size_to_factor=8, momentum=0.9),
    "none": optax.scale(-0.1),
}


@pytest.mark.parametrize("name", INNER)
def test_any_transformation(name: str) -> None:
    inner = INNER[name]
    got, state = stepped(quantize_state(inner))
    want, want_state = stepped(inner)
    close(got, want)
    held = [x for x in jax.tree.leaves(state, is_leaf=is_blocks) if is_blocks(x)]
    large = [x for x in jax.tree.leaves(want_state) if x.size >= 4096]
    assert [q.shape for q in held] == [x.shape for x in large]
    decoded = lambda x: decode(x) if is_blocks(x) else x
    floats = jax.eval_shape(lambda s: jax.tree.map(decoded, s, is_leaf=is_blocks), state)
    assert jax.tree.structure(floats) == jax.tree.structure(want_state)


def _norm(t):
    return jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(t)))


def test_leafwise_is_found_out() -> None:
    tree = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    each = lambda f: lambda t: {k: f(x) for k, x in t.items()}
    assert agree(lambda t: jax.tree.map(jnp.sin, t), each(jnp.sin), tree)
    norm = lambda t: jax.tree.map(lambda x: x / _norm(t), t)
    assert not agree(norm, each(lambda x: x / _norm(x)), tree)


def test_whole_trees_keep_all_of_the_state() -> None:
    tx = quantize_state(INNER["clipped"])
    state = jax.jit(tx.init)(PARAMS)
    b = np.array(PARAMS["b"])
    b[0] = np.inf
    bad = {**PARAMS, "b": b}
    updates, new = jax.jit(tx.update)(bad, state, PARAMS)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    chex.assert_trees_all_equal(new, state)


STATIC = ("block_size", "min_size")


def compositions():
    adam, by_size = adam8bit(0.1), {"w": "a", "v": "b", "b": "a"}
    mask = {"w": True, "v": False, "b": True}
    plain = optax.adam(0.1)
    make = lambda tx, other: {
        "chain": optax.chain(optax.clip_by_global_norm(1.0), tx),
        "partition": optax.partition({"a": tx, "b": other}, by_size),
        "multi_transform": optax.multi_transform({"a": tx, "b": other}, lambda p: by_size),
        "masked": optax.masked(tx, mask),
        "apply_if_finite": optax.apply_if_finite(tx, 3),
        "multi_steps": optax.MultiSteps(tx, 2).gradient_transformation(),
    }
    ours, theirs = make(adam, lion8bit(0.1)), make(plain, optax.lion(0.1))
    schedule = optax.linear_schedule(0.1, 0.01, 10)
    ours["inject"] = optax.inject_hyperparams(adam8bit, STATIC)(0.1, b1=schedule)
    theirs["inject"] = optax.inject_hyperparams(optax.adam)(0.1, b1=schedule)
    return {name: (ours[name], theirs[name]) for name in ours}


COMPOSED = compositions()


@pytest.mark.parametrize("name", COMPOSED)
def test_compositions(name: str) -> None:
    (got, state), (want, _) = map(stepped, COMPOSED[name])
    close(got, want)
    assert any(map(is_blocks, jax.tree.leaves(state, is_leaf=is_blocks)))


def test_tree_utils() -> None:
    tx = adam8bit(0.1)
    state = jax.jit(tx.init)(PARAMS)
    doubled = optax.tree_utils.tree_map_params(tx, lambda x: x + x, state)
    np.testing.assert_array_equal(doubled[0].mu["w"].codes, np.asarray(state[0].mu["w"].codes) * 2)
    mu = optax.tree_utils.tree_get(state, "mu")
    assert isinstance(mu["w"], Blocks) and mu["w"].signed
    assert not optax.tree_utils.tree_get(state, "nu")["w"].signed
    reset = optax.tree_utils.tree_set(state, count=jnp.int32(5))
    assert int(reset[0].count) == 5
    placed = optax.tree_utils.tree_map_params(
        tx, lambda q, s: s, state, {"w": P("x"), "v": P(), "b": P()}, is_leaf=is_blocks
    )
    assert placed[0].mu["w"] == P("x")


def test_stacked_leaves_are_layers() -> None:
    tx = adam8bit(0.1)
    _, stacked = stepped(tx)
    layer = {"w": np.asarray(PARAMS["w"])[1]}
    _, alone = stepped(tx, layer)
    first = jax.tree.map(lambda x: np.asarray(x)[1], stacked[0].mu["w"])
    chex.assert_trees_all_equal(first.codes, alone[0].mu["w"].codes)


def test_donation() -> None:
    tx = adam8bit(0.1)
    state = jax.tree.map(jnp.copy, stepped(tx)[1])
    pointers = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state[0].mu)}
    _, new = jax.jit(tx.update, donate_argnums=1)(PARAMS, state, PARAMS)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert pointers & {x.unsafe_buffer_pointer() for x in jax.tree.leaves(new[0].mu)}


def test_checkpoint(tmp_path) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    _, state = stepped(adam8bit(0.1))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        got = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    assert jax.tree.structure(got) == jax.tree.structure(state)
    chex.assert_trees_all_equal(got, state)


def test_errors() -> None:
    with pytest.raises(ValueError, match="expected a StateSpec"):
        quantize_state(optax.scale_by_adam(), 256)
    with pytest.raises(ValueError, match="expected an optax transformation"):
        quantize_state(optax.scale_by_adam)
    small = quantize_state(optax.scale_by_adam(), StateSpec(block_size=64, min_size=8))
    state = jax.eval_shape(small.init, PARAMS)
    assert state.mu["w"].scale.shape == (2, 16, 4) and is_blocks(state.nu["b"])
