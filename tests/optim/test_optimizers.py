"""The 8-bit optimizers against optax's and against NumPy."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxquant as jq
from jaxquant.numerics.dynamic_map import dynamic_map
from jaxquant.optim import Blocks, adam8bit, adamw8bit, is_blocks, lion8bit, momentum8bit
from jaxquant.optim.blocks import decode, encode, tile_of, zero_blocks
from tests.compiled import optimised, uncontracted

PAIRS = {
    "adam": (adam8bit, optax.adam),
    "adamw": (adamw8bit, optax.adamw),
    "lion": (lion8bit, optax.lion),
    "momentum": (momentum8bit, lambda rate: optax.sgd(rate, momentum=0.9)),
}
ALL = pytest.mark.parametrize("name", PAIRS)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> jax.Array:
    x = np.random.default_rng(seed).standard_normal(shape) * scale
    return jax.device_put(x.astype(np.float32))


def trained(tx, loss, params, steps: int):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params):
        params, state = jax.lax.scan(step, (params, tx.init(params)), length=steps)[0]
        return params, state, loss(params)

    params, state, last = run(params)
    return params, state, float(last)


def nbytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def numpy_blocks(x: np.ndarray, signed: bool, size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Nearest values times the block's largest magnitude, by exhaustive search."""
    values = np.asarray(dynamic_map(signed), np.float32)
    rows = x.reshape(-1, size)
    scale = np.abs(rows).max(1, keepdims=True)
    codes = np.abs((rows / scale)[..., None] - values).argmin(-1)
    if not signed:
        codes = np.maximum(codes, rows > 0)
    return (values[codes] * scale).reshape(x.shape), codes.reshape(x.shape)


@ALL
def test_two_steps_equal_numpy(name: str) -> None:
    tx = PAIRS[name][0](0.1)
    w, g1, g2 = (normal(16, 256, seed=s) for s in range(3))
    step = jax.jit(tx.update)
    _, state = step(g1, jax.jit(tx.init)(w), w)
    got, _ = step(g2, state, w)
    g1, g2, w = (np.asarray(x, np.float64) for x in (g1, g2, w))
    rate, b2 = (1.0, 0.99) if name == "momentum" else (0.1, 0.99)
    if name.startswith("adam"):
        m, _ = numpy_blocks(0.1 * g1, True)
        v, _ = numpy_blocks(0.001 * g1**2, False)
        m, v = 0.9 * m + 0.1 * g2, 0.999 * v + 0.001 * g2**2
        step = (m / (1 - 0.9**2)) / (np.sqrt(v / (1 - 0.999**2)) + 1e-8)
        want = -0.1 * (step + (1e-4 * w if name == "adamw" else 0))
    elif name == "lion":
        m, _ = numpy_blocks((1 - b2) * g1, True)
        want = -0.1 * (np.sign(0.9 * m + 0.1 * g2) + 1e-3 * w)
    else:
        m, _ = numpy_blocks(rate * g1, True)
        want = -0.1 * (0.9 * m + g2)
    # 1 - 0.999^2 = 0.002 is rounded in float32 to 2^-25 of 1, 1.5e-5 of itself; sums may cancel
    np.testing.assert_allclose(got, want, rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adam", "lion", "momentum"])
def test_trains_as_optax(name: str) -> None:
    target, x = normal(64, 128, seed=1), normal(32, 64, seed=2)
    loss = lambda p: jnp.mean((x @ (p["w"] - target) + p["b"][None]) ** 2)
    params = jax.device_put({"w": np.zeros((64, 128), np.float32), "b": np.zeros(128, np.float32)})
    ours, theirs = PAIRS[name]
    rate = {"momentum": 0.5, "lion": 3e-3}.get(name, 0.02)
    start = float(jax.jit(loss)(params))
    *_, got = trained(ours(rate), loss, params, 60)
    *_, want = trained(theirs(rate), loss, params, 60)
    assert want < 0.6 * start
    assert abs(got - want) < 0.01 * start


def test_quadratic_converges() -> None:
    scales = np.logspace(-2, 1, 8192).reshape(32, 256).astype(np.float32)
    loss = lambda w: jnp.sum(scales * w**2)
    tx = adam8bit(optax.cosine_decay_schedule(0.1, 200))
    _, _, got = trained(tx, loss, jax.device_put(np.ones((32, 256), np.float32)), 200)
    assert got < 1e-4 * float(scales.sum())


def test_small_leaves_are_optax() -> None:
    """Bit for bit what optax makes of a tree of the small leaves, whatever else there is."""
    small = {"a": normal(300, seed=1), "z": normal(7, 5, seed=2)}
    ours, theirs = adam8bit(0.01), optax.adam(0.01)
    params = small | {"big": normal(64, 64)}
    state, want_state = jax.jit(ours.init)(params), jax.jit(theirs.init)(small)
    steps = [uncontracted(tx.update) for tx in (ours, theirs)]
    for scale in (1, -3):
        grow = lambda tree, scale=scale: jax.tree.map(lambda p: scale * np.asarray(p), tree)
        got, state = steps[0](grow(params), state, params)
        want, want_state = steps[1](grow(small), want_state, small)
        assert isinstance(got.pop("big"), jax.Array)
        chex.assert_trees_all_equal(got, want)


@ALL
def test_memory(name: str) -> None:
    shapes = {"emb": (5003, 96), "conv": (3, 3, 64, 128), "mlp": (4, 256, 512), "b": (512,)}
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    state, float_state = (jax.eval_shape(tx(0.1).init, params) for tx in PAIRS[name])
    assert nbytes(state) <= 0.27 * nbytes(float_state)
    held = [x for x in jax.tree.leaves(state, is_leaf=is_blocks) if is_blocks(x)]
    assert {q.shape for q in held} == {s for k, s in shapes.items() if k != "b"}
    assert sum(q.nbytes for q in held) <= nbytes(state)
    assert "8-bit[5003, 96]" in repr(state)


def test_no_float_copy_of_the_state() -> None:
    """At one time, the moments of one leaf are in float, of as many as there are."""
    count, tx = 12, adam8bit(0.1)
    params = {f"w{i}": jax.device_put(np.ones((64, 128), np.float32)) for i in range(count)}

    def step(p, state, g):
        updates, state = tx.update(g, state, p)
        return optax.apply_updates(p, updates), state

    args = params, jax.jit(tx.init)(params), params
    memory = optimised(step, donate_argnums=(0, 1)).lower(*args).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= nbytes(args[:2])
    leaf = 2 * params["w0"].nbytes
    assert leaf <= memory.temp_size_in_bytes <= 2 * leaf


@pytest.mark.parametrize("shape", [(300, 256), (40, 2, 1000), (77, 333)])
def test_blocks_hold_any_shape(shape) -> None:
    tile = tile_of(shape, 256)
    assert 128 <= np.prod(tile) <= 256
    hold = jax.jit(lambda y, signed: encode(y, zero_blocks(y, signed, 256)), static_argnums=1)
    for signed in (True, False):
        y = normal(*shape) if signed else jax.device_put(np.square(normal(*shape)))
        q = hold(y, signed)
        assert q.codes.shape == shape and q.nbytes <= 1.04 * y.size
        counts = tuple(-(-n // t) for n, t in zip(shape, tile, strict=True))
        assert q.scale.shape == counts
        scale = np.asarray(q.scale)
        for axis, (t, n) in enumerate(zip(tile, shape, strict=True)):
            scale = np.repeat(scale, t, axis).take(range(n), axis)
        assert np.all(np.abs(y) <= scale)
        # half the widest cell, that between the two largest decades counted in, and a few roundings
        values = np.asarray(dynamic_map(signed), np.float64)
        end = 1 + values[0] if signed else 0  # there is no -1
        half = max(np.diff(values).max() / 2, end)
        assert np.all(np.abs(jax.jit(decode)(q) - y) <= (half + 1e-6) * scale)


def test_second_moments_never_vanish() -> None:
    x = jax.device_put(np.float32([1.0, 1e-7, 1e-30, 0.0] * 1024))
    hold = jax.jit(lambda x: decode(encode(x, zero_blocks(x, False, 256))))
    assert np.array_equal(np.asarray(hold(x)) > 0, np.asarray(x) > 0)
    tiny = jax.device_put(np.full(4096, 1e-42, np.float32))
    assert np.all(np.isfinite(hold(tiny)))


@pytest.mark.parametrize(
    ("name", "value"), [("adam", 1e30), ("adam", np.nan), ("lion", np.inf)], ids=str
)
def test_not_finite_leaves_the_state(name: str, value: float) -> None:
    """NaN, infinities, and what is finite while its square is not."""
    tx = PAIRS[name][0](0.1)
    params = {"big": normal(16, 256), "other": normal(16, 256), "small": normal(5)}
    step = jax.jit(tx.update)
    _, state = step(params, jax.jit(tx.init)(params), params)
    big = np.array(params["big"])
    big[3, 4] = value
    bad = {**params, "big": big, "small": np.copysign(np.inf, params["small"])}
    bad = jax.device_put(bad)
    zero = jax.device_put(jax.tree.map(np.zeros_like, params))
    updates, new = step(bad, state, zero)  # zeros do not decay
    assert not np.any(updates["big"]) and not np.any(updates["small"])
    assert np.any(updates["other"])
    for field in set(state[0]._fields) - {"count"}:
        old, kept = getattr(state[0], field), getattr(new[0], field)
        for leaf in ("big", "small"):
            chex.assert_trees_all_equal(old[leaf], kept[leaf])
        assert np.any(np.asarray(old["other"].scale) != np.asarray(kept["other"].scale))
    updates, new = step(params, new, params)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, new)))


def test_bfloat16() -> None:
    params = jax.device_put(np.asarray(normal(32, 256)).astype(jnp.bfloat16))
    tx = adamw8bit(0.1)
    updates, state = jax.jit(lambda p: tx.update(p, tx.init(p), p))(params)
    assert updates.dtype == jnp.bfloat16 and isinstance(state[0].mu, Blocks)
    float_tx = optax.adamw(0.1)
    want, _ = jax.jit(lambda p: float_tx.update(p, float_tx.init(p), p))(params)
    # the first update is made before moments are encoded: what differs is bfloat16 moments
    np.testing.assert_allclose(
        *(np.asarray(a).astype(np.float32) for a in (updates, want)),
        rtol=4 * 2**-8,
        atol=2**-8 * 0.1,
    )


def test_errors() -> None:
    q = jq.quantize(normal(64, 64), jq.QSpec("int8", jq.PerTensor()))
    with pytest.raises(ValueError, match=r"layer/w is a QTensor.*jaxquant\.partition"):
        adam8bit(0.1).init({"layer": {"w": q}})
    trainable, _ = jq.partition({"w": q, "v": normal(64, 64)})
    assert isinstance(jax.eval_shape(adam8bit(0.1).init, trainable)[0].mu["v"], Blocks)
    for given in ({"block_size": 0}, {"min_size": -1}, {"block_size": 2.5}):
        with pytest.raises(ValueError, match="expected a positive integer"):
            adam8bit(0.1, **given)
