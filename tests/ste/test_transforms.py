"""Estimators under jit, grad, vmap and scan: the same codes and gradients in every program."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import PerChannel, PerGroup, PerTensor, QSpec
from jaxquant.ste import kmeans, lsq, lsq_plus, pact, straight_through
from tests.ste import cases

STACK = jax.device_put(cases.normal((2, *cases.SHAPE), seed=21))
ESTIMATORS = [straight_through(), lsq(), lsq_plus(), pact()]
CODEBOOK = QSpec(cases.TERNARY, PerTensor())
PAIRS = [
    *zip(ESTIMATORS, cases.few(), strict=True),
    (kmeans(), CODEBOOK),
    (kmeans(reassign=True), CODEBOOK),
]


def name(v) -> str:
    return cases.label(v) if isinstance(v, QSpec) else repr(v)


@pytest.mark.parametrize(("estimator", "spec"), PAIRS, ids=name)
def test_batch_axes_vmap_and_scan_agree(estimator, spec):
    """Layers encoded as one stack, mapped over, or scanned, jitted, against one after the other."""
    made = estimator.init(STACK, spec, storage_last_axes=(0,), batch_axes=1)
    fixed = {n: made.pop(n) for n in estimator.constants}

    def loss(batch_axes, w, learned, fixed):
        q = estimator.encode(
            w, {**learned, **fixed}, spec, storage_last_axes=(0,), batch_axes=batch_axes
        )
        return jnp.sum(jnp.cos(estimator.values(w, {**learned, **fixed}, q))), q

    one = jax.value_and_grad(functools.partial(loss, 0), argnums=(0, 1), has_aux=True)
    several = jax.value_and_grad(functools.partial(loss, 1), argnums=(0, 1), has_aux=True)

    @jax.jit
    def every(*args):
        _, scanned = jax.lax.scan(lambda c, layer: (c, one(*layer)), 0.0, args)
        return several(*args), jax.vmap(one)(*args), scanned

    alone = jax.jit(one)
    apart = [alone(*jax.tree.map(lambda a, i=i: a[i], (STACK, made, fixed))) for i in range(2)]
    apart = jax.tree.map(lambda *a: np.stack(a), *apart)
    stacked, *others = every(STACK, made, fixed)
    assert jax.tree.structure(stacked) == jax.tree.structure(apart)
    for other in (stacked, *others):
        (_, q), (dw, dlearned) = other
        chex.assert_trees_all_equal(q, apart[0][1])
        # cosines differ by an ulp between programs
        near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(near, (dw, dlearned), apart[1])


def near_ties(step: float, low: int, high: int) -> np.ndarray:
    """Values within two ulps of where the code changes."""
    rng = np.random.default_rng(31)
    w = ((rng.integers(low, high, (64, 16)) + 0.5) * np.float32(step)).astype(np.float32)
    for _ in range(2):
        w = np.nextafter(w, w + rng.integers(-1, 2, w.shape).astype(np.float32))
    return w


@pytest.mark.parametrize(
    ("estimator", "spec"),
    [
        (straight_through(), QSpec("int8", PerTensor())),
        (straight_through(), QSpec("int8", PerChannel(1), False)),
        (lsq(), QSpec("int4", PerGroup(24, 0))),
        (lsq_plus(), QSpec("uint8", PerChannel(1), False)),
        (pact(), QSpec("int8", PerTensor())),
    ],
    ids=name,
)
def test_codes_are_those_of_every_other_program(estimator, spec):
    """A step whose inverse is not a float, and weights next to ties: an ulp would show."""
    fmt = spec.format
    step = 0.0123
    w = jnp.asarray(near_ties(step, -(2 ** (fmt.bits - 1)) + 1, 2 ** (fmt.bits - 1) - 1))
    learned = jax.tree.map(
        lambda a: jnp.full(a.shape, step, jnp.float32),
        jax.eval_shape(lambda w: estimator.init(w, spec), w),
    )
    if "offset" in learned:
        learned["offset"] = -128 * learned["step"]
    if "alpha" in learned:
        learned["alpha"] = 127.5 * learned["alpha"]

    def encode(w, learned):
        return estimator.encode(w, learned, spec)

    def trained(x, w, learned):
        def loss(w, learned):
            q = encode(w, learned)
            return jnp.sum(jnp.tanh(x @ estimator.values(w, learned, q))), q

        (_, q), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(w, learned)
        return grads, q

    def looped(x, w, learned):
        def body(x, _):
            q = encode(w, learned)
            return jnp.tanh(x @ jq.dequantize(q))[:, :1] * x, q

        y, q = jax.lax.scan(jax.checkpoint(body), x, None, length=2)
        return y, jax.tree.map(lambda a: a[0], q)

    x = jnp.ones((3, 64))
    alone = encode(w, learned)
    if estimator == straight_through():
        chex.assert_trees_all_equal(alone, jq.quantize(w, spec))
    for program in (trained, looped):
        chex.assert_trees_all_equal(jax.jit(program)(x, w, learned)[1], alone)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("estimator", "spec"), PAIRS[:4], ids=name)
def test_narrow_weights_keep_their_dtype(estimator, spec, dtype):
    w = STACK[0].astype(dtype)
    learned = estimator.init(w, spec, storage_last_axes=(0,))
    assert all(a.dtype == jnp.float32 for a in learned.values())
    g = STACK[1].astype(dtype)
    q, y, again, (dw, dlearned) = cases.compiled(estimator, spec, w, learned, g)
    wide = cases.compiled(estimator, spec, w.astype(jnp.float32), learned, g.astype(jnp.float32))
    assert y.dtype == dw.dtype == dtype and q.dtype == jnp.dtype(dtype).name
    np.testing.assert_array_equal(y, again)
    np.testing.assert_array_equal(q.codes, wide[0].codes)
    np.testing.assert_array_equal(dw, wide[3][0].astype(dtype))
    for n, a in dlearned.items():
        np.testing.assert_array_equal(a, wide[3][1][n])
