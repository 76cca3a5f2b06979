"""`fold_batchnorm`: BatchNorms found by tracing, in any spelling; all others left alone."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxquant as jq
from jaxquant.rewrites import fold_batchnorm

norm = nn.BatchNorm


def randomized(variables, seed=0):
    """Every leaf random: scales of both signs, variances from tiny to large."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        x = rng.normal(size=leaf.shape).astype(np.float32)
        name = jax.tree_util.keystr(path)
        if "var" in name:
            x = np.exp(3 * x)
            x[..., 0] = 1e-9
        return jnp.asarray(x / 3 if "kernel" in name else x, leaf.dtype)

    return jax.tree.map_with_path(draw, variables)


def same_structure(a, b):
    def spec(tree):
        return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)

    assert jax.tree.structure(a) == jax.tree.structure(b) and spec(a) == spec(b)


def check(fn, params, x, count, left=0):
    """Folds and returns new params and records; the function must be what it was, jitted."""
    new, info = fold_batchnorm(fn, params, jax.ShapeDtypeStruct(x.shape, x.dtype))
    same_structure(params, new)
    jitted = jax.jit(fn)
    a, b = np.asarray(jitted(params, x)), np.asarray(jitted(new, x))
    assert np.abs(b - a).max() <= 1e-5 * np.abs(a).max()
    assert [r.folded for r in info].count(True) == count, info
    assert [r.folded for r in info].count(False) == left, info
    assert all(bool(r.reason) != r.folded for r in info)
    return new, info


class Convs(nn.Module):
    """Every kind of producer that Linen has, with and without bias, scale and shift."""

    @nn.compact
    def __call__(self, x, train=False):
        def bn(name, **kw):
            return norm(use_running_average=not train, name=name, **kw)

        x = nn.relu(bn("plain")(nn.Conv(4, (3, 3))(x)))
        x = bn("grouped", use_scale=False)(nn.Conv(6, (3, 3), 2, use_bias=False)(x)[..., :])
        x = nn.relu6(x)
        x = bn("depthwise", epsilon=1e-3)(
            nn.Conv(12, (3, 3), feature_group_count=6, padding="VALID")(x)
        )
        skip = bn("skip", use_bias=False)(nn.Conv(5, (1, 1), use_bias=False)(x))
        x = bn("remat")(nn.remat(nn.Conv)(5, (3, 3))(nn.silu(x))) + skip
        x = bn("transposed")(nn.ConvTranspose(3, (2, 2), transpose_kernel=True)(nn.relu(x)))
        x = nn.relu(x).mean((1, 2))
        x = bn("dense", use_scale=False, use_bias=False)(nn.Dense(7)(x))
        return nn.Dense(2)(nn.relu(bn("einsum")(nn.Einsum((7, 4), "bi,io->bo")(x))))


@pytest.fixture(scope="module")
def convs():
    x = jax.random.normal(jax.random.key(0), (2, 9, 9, 3))
    model = Convs()
    return model, randomized(jax.eval_shape(model.init, jax.random.key(1), x)), x


def test_every_producer_of_linen(convs):
    model, variables, x = convs
    new, info = check(model.apply, variables, x, count=8)
    assert [r.path.rpartition("/")[2] for r in info] == [
        *("plain", "grouped", "depthwise", "skip", "remat", "transposed", "dense", "einsum")
    ]
    for record in info:
        name = record.path.rpartition("/")[2]
        stats, affine = new["batch_stats"][name], new["params"].get(name, {})
        eps = np.float32(1e-3 if name == "depthwise" else 1e-5)
        assert (np.asarray(stats["var"]) + eps == 1).all()
        assert (np.asarray(affine.get("scale", 1)) == 1).all()
        if "bias" in affine:
            assert not np.any(stats["mean"])
        collection, module, _ = record.kernel.split("/")
        assert not np.any(new[collection][module].get("bias", 0))


def test_statistics_of_the_batch_are_left_alone(convs):
    model, variables, x = convs

    def fn(variables, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    with pytest.raises(ValueError, match=r"params/plain: it normalises by statistics of its batch"):
        fold_batchnorm(fn, variables, x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dense = nnx.Linear(4, 3, use_bias=False, rngs=rngs)
        self.last = nnx.BatchNorm(3, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dense(nnx.relu(self.norm(self.conv(x)))))


def test_nnx():
    model = Nnx(nnx.Rngs(0))
    model.eval()
    graph, state = nnx.split(model)
    state = randomized(state)
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 3))
    new, info = check(lambda state, x: nnx.merge(graph, state)(x), state, x, count=2)
    assert [(r.path, r.kernel) for r in info] == [("norm", "conv/kernel"), ("last", "dense/kernel")]
    nnx.merge(graph, new)  # still a state of the model


def stats(shape, *names):
    return {name: np.zeros(shape) for name in names}


def spelled(p, x):
    """One function, its BatchNorms each written in another way."""

    def e(name, k):
        return p[name][k][None]

    y = x @ p["k0"]
    y = (y - e("s0", "mean")) / jnp.sqrt(e("s0", "var") + 1e-3) * e("s0", "scale") + e("s0", "bias")
    y = jnp.tanh(y) @ p["k1"]
    a = e("s1", "scale") * (e("s1", "var") + 1e-5) ** -0.5
    y = y * a + (e("s1", "bias") - e("s1", "mean") * a)
    y = jnp.einsum("oi,bi->ob", p["k2"], jnp.tanh(y))  # kernel first, channels first
    y = -(e("s2", "mean").T - y - e("s2", "b").T) * lax.rsqrt(1e-5 + e("s2", "var").T)
    y = jax.jit(lambda y: y.T + e("s2", "bias"))(y)
    y = jnp.tanh(y) @ p["k3"]
    return (y - p["s3"]["mean"]) * (1 / jnp.sqrt(p["s3"]["var"] + 1e-5))


def test_hand_written_spellings():
    rng = np.random.default_rng(0)
    full = ("mean", "var", "scale", "bias")
    params = {
        "k0": rng.normal(size=(3, 4)),
        "s0": stats(4, *full),
        "k1": rng.normal(size=(4, 5)),
        "s1": stats(5, *full),
        "k2": rng.normal(size=(6, 5)),
        "s2": stats(6, "mean", "var", "b", "bias"),
        "k3": rng.normal(size=(6, 2)),
        "s3": stats((1, 2), "mean", "var"),
    }
    params = randomized(jax.tree.map(jnp.float32, params))
    x = jax.random.normal(jax.random.key(0), (7, 3))
    _, info = check(spelled, params, x, count=4)
    assert [r.kernel for r in info] == ["k0", "k1", "k2", "k3"]


@pytest.mark.parametrize("axis", [0, 1])
def test_scanned_layers(axis):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            y = norm(use_running_average=True)(nn.Dense(4)(x))
            return jnp.tanh(y), None

    stacked = nn.scan(
        Layer,
        variable_axes={"params": axis, "batch_stats": axis},
        split_rngs={"params": True},
        length=3,
    )()
    x = jax.random.normal(jax.random.key(0), (2, 4))
    variables = randomized(jax.eval_shape(stacked.init, jax.random.key(1), x, None))
    check(lambda v, x: stacked.apply(v, x, None)[0], variables, x, count=1)


def test_loops_branches_and_batched_kernels():
    """A kernel used by each step of a loop, by one branch, one of an ensemble; several axes."""

    def fn(p, x):
        def step(_, x):
            return jnp.tanh(bn(x @ p["loop"]["w"], p["loop"]))

        x = lax.fori_loop(0, 3, step, x)
        x = lax.cond(x[0, 0] > -2, lambda x: bn(x @ p["cond"]["w"], p["cond"]), lambda x: x, x)
        x = jax.vmap(lambda p, x: bn(x @ p["w"], p), (0, None))(p["vmap"], jnp.tanh(x))
        return bn(jnp.einsum("bi,ihd->bhd", x.mean(0), p["heads"]["w"]), p["heads"])

    shapes = {"loop": ((4, 4), (4,)), "cond": ((4, 4), (4,)), "vmap": ((3, 4, 5), (3, 5))}
    shapes["heads"] = ((5, 2, 3), (2, 3))
    params = {
        name: {"w": np.zeros(w), **stats(c, "mean", "var", "scale")}
        for name, (w, c) in shapes.items()
    }
    params = randomized(jax.tree.map(jnp.float32, params))
    _, info = check(fn, params, jax.random.normal(jax.random.key(0), (2, 4)), count=4)
    assert [record.path for record in info] == list(shapes)


def bn(y, p):
    return (y - p["mean"][None]) * lax.rsqrt(p["var"][None] + 1e-5) * p["scale"][None]


# What is computed of the kernels `w` and `v`, the BatchNorm's parameters `p` and `x`; and why not.
LEFT_ALONE = {
    "activation": (lambda q, x: bn(jnp.tanh(x @ q["w"]), q["p"]), "fed by `tanh`"),
    "sum": (lambda q, x: bn(x @ q["w"] + x @ q["v"], q["p"]), "fed by `add`"),
    "input": (lambda q, x: bn(x, q["p"]), "fed by `input`"),
    "computed": (lambda q, x: bn(x @ (q["w"] * q["v"]), q["p"]), "feeds it is computed"),
    "activations": (lambda q, x: bn((x.T @ x), q["p"]), "no parameter as its kernel"),
    "output": (lambda q, x: (lambda y: bn(y, q["p"]) + y)(x @ q["w"]), "output of w is also used"),
    "returned": (lambda q, x: (lambda y: (bn(y, q["p"]), y))(x @ q["w"]), "w is also returned"),
    "kernel": (lambda q, x: bn(x @ q["w"], q["p"]) @ q["w"], "w is also used by another `dot"),
    "statistics": (
        lambda q, x: (bn(x @ q["w"], q["p"]), q["p"]["mean"]),
        "p/mean is also returned",
    ),
    "shared": (lambda q, x: bn(bn(x @ q["w"], q["p"]) @ q["v"], q["p"]), "is also used by another"),
    "rows": (lambda q, x: bn((x @ q["w"]).T, q["p"]), "is no output axis of w"),
    "scanned kernel": (
        lambda q, x: lax.scan(lambda c, w: (bn(c @ w, q["p"]), None), x, q["ws"])[0],
        "not scanned together",
    ),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case):
    fn, reason = LEFT_ALONE[case]
    rng = np.random.default_rng(0)
    params = {
        "w": rng.normal(size=(4, 4)),
        "v": rng.normal(size=(4, 4)),
        "ws": rng.normal(size=(2, 4, 4)),
        "p": {k: np.ones(4) for k in ("mean", "var", "scale")},
    }
    params = jax.tree.map(jnp.float32, params)
    with pytest.raises(ValueError, match="nothing can be folded; p: ") as raised:
        fold_batchnorm(fn, params, jnp.ones((4, 4)))
    assert reason in str(raised.value)


def test_what_can_be_folded_is_beside_what_cannot():
    def fn(params, x):
        y = bn(bn(x @ params["w"], params["p"]), params["q"])
        scaled = y * params["gain"][None]  # no part of a BatchNorm
        return scaled @ params["v"] + lax.cond(x[0, 0] > 0, lambda: 1.0, lambda: params["s"])

    leaves = {k: jnp.ones(3) for k in ("mean", "var", "scale")}
    params = {"w": jnp.ones((4, 3)), "v": jnp.ones((3, 2)), "gain": jnp.ones(3), "s": jnp.ones(())}
    params = randomized({**params, "p": leaves, "q": leaves})
    x = jax.random.normal(jax.random.key(0), (5, 4))
    new, info = check(fn, params, x, count=1, left=1)
    assert [dataclasses.astuple(r)[:2] for r in info] == [("p", True), ("q", False)]
    assert "another BatchNorm" in info[1].reason
    for name in ("v", "gain", "s", "q"):
        assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, params[name], new[name]))), name
    # inside jit the arrays have no values yet, and outside nothing is computed twice
    jitted = jax.jit(lambda p: fold_batchnorm(fn, p, x)[0])(params)
    np.testing.assert_allclose(jitted["w"], new["w"], rtol=1e-6)


def test_no_batchnorm_at_all_and_quantized_params():
    def fn(p, x):
        return x @ p["w"]

    with pytest.raises(ValueError, match="no BatchNorm with running statistics"):
        fold_batchnorm(fn, {"w": jnp.ones((3, 2))}, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="expected a function of params first, got a dict"):
        fold_batchnorm({}, {}, jnp.ones((1, 3)))

    def normed(p, x):
        return bn(x @ p["w"], p)

    params = {"w": jnp.eye(3), **{k: jnp.ones(3) for k in ("mean", "var", "scale")}}
    rule = jq.Rule("w", weights=jq.QSpec("int8", jq.PerChannel(1)))
    quantized, _ = jq.quantize_params(params, rule)
    with pytest.raises(ValueError, match="quantized already"):
        fold_batchnorm(normed, quantized, jnp.ones((2, 3)))


def test_modules_are_told_the_call_and_the_report_prints():
    with pytest.raises(ValueError, match=r"the Linen module Dense; .*fold_batchnorm\(model\.apply"):
        jq.fold_batchnorm(nn.Dense(2), {}, jnp.ones((1, 2)))
    with pytest.raises(ValueError, match=r"the NNX module Linear; call jaxquant\.nnx\.fold_batch"):
        jq.fold_batchnorm(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), {}, jnp.ones((1, 2)))

    def fn(p, x):
        y = (x @ p["w"] - p["mean"][None]) / jnp.sqrt(p["var"][None] + 0.5)
        return y + p["bias"][None]

    params = {"w": jnp.eye(2), **{n: jnp.ones(2) for n in ("mean", "var", "bias")}}
    _, info = jq.fold_batchnorm(fn, params, jnp.ones((1, 2)))
    assert isinstance(info, tuple) and info == tuple(info) and info[0].folded
    assert str(info).splitlines()[2].split() == ["var", "w", "yes"]
