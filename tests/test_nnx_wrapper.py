"""`jaxquant.nnx.Quantized` as a module: state, modes, transforms, checkpoints, mistakes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jaxquant as jq
import jaxquant.nnx
from jaxquant.qtensor import is_qtensor

pytestmark = pytest.mark.usefixtures("uncontracted")

W8A8 = jq.w8a8()


class Net(nnx.Module):
    """Batch statistics, dropout, and methods of several kinds."""

    def __init__(self, rngs: nnx.Rngs):
        self.inner = nnx.Linear(64, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(32, 8, rngs=rngs)
        self.calls = 0

    def __call__(self, x):
        return self.head(self.features(x))

    def features(self, x, *, rngs: nnx.Rngs | None = None):
        return self.drop(nnx.relu(self.norm(self.inner(x))), rngs=rngs)

    def size(self):
        return 8, "classes"

    def remember(self, x):
        self.calls += 1
        self.last = nnx.Intermediate(x)
        return self.inner(x)

    def replace(self, x):
        self.inner.kernel[...] = 2 * self.inner.kernel[...]
        return self.inner(x)

    def branch(self, x):
        def flipped(net, x):
            return -net.inner(x)

        return nnx.cond(x.sum() > 0, lambda net, x: net.inner(x), flipped, self, x)

    @staticmethod
    def double(x):
        return 2 * x

    @property
    def width(self):
        return 32


@pytest.fixture
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (4, 64))


@pytest.fixture
def model() -> Net:
    return Net(nnx.Rngs(0))


@pytest.fixture
def qmodel(model: Net, x: jax.Array) -> jq.nnx.Quantized:
    return jq.nnx.ptq(model, W8A8, x)[0]


def _close(got: jax.Array, want: jax.Array, bound: float = 0.03) -> bool:
    return float(jnp.linalg.norm(got - want)) < bound * float(jnp.linalg.norm(want))


def _forward(model: nnx.Module, x: jax.Array) -> jax.Array:
    return model(x)


@pytest.mark.parametrize("run", [_forward, nnx.jit(_forward)], ids=["eager", "jit"])
def test_state_moves_on_in_the_wrapper_alone(run: Callable, model, qmodel, x):
    ref = nnx.clone(model)
    before = nnx.state(model)
    for _ in range(2):
        got, want = run(qmodel, x), _forward(ref, x)
        dropped = ref.features(x) == 0, qmodel.features(x) == 0
        assert (dropped[0] == dropped[1]).mean() > 0.95  # a relu may fall on the other side of 0
        assert _close(got, want, 0.1)
    inner = qmodel.model
    assert _close(inner.norm.mean[...], ref.norm.mean[...])
    assert _close(inner.norm.var[...], ref.norm.var[...])
    assert int(inner.drop.rngs.count[...]) == int(ref.drop.rngs.count[...]) == 4
    after = nnx.state(model)
    assert all(a is b for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True))


def test_modes(model, qmodel, x):
    model(x), qmodel(x)
    model.eval()
    qmodel.eval()
    assert qmodel.model.drop.deterministic and qmodel.model.norm.use_running_average
    assert _close(qmodel(x), model(x))
    assert (qmodel(x) == qmodel(x)).all()
    training = nnx.view(qmodel, deterministic=False, use_running_average=False)
    assert (training.features(x) == 0).mean() > 0.4
    qmodel.train()
    assert (qmodel(x) != qmodel(x)).any()


def test_split_merge_jit_and_copies(qmodel, x):
    qmodel.eval()
    want = nnx.jit(_forward)(qmodel, x)
    graphdef, state = nnx.split(qmodel)
    assert (jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x) == want).all()
    assert (nnx.jit(qmodel)(x) == want).all()
    for other in (nnx.clone(qmodel), copy.deepcopy(qmodel)):
        assert (nnx.jit(_forward)(other, x) == want).all()
    rows = nnx.vmap(_forward, in_axes=(None, 0))(qmodel, x[:, None])[:, 0]
    assert jnp.allclose(rows, want, atol=1e-6)
    shape = nnx.eval_shape(_forward, qmodel, jax.ShapeDtypeStruct((7, 64), jnp.float32)).shape
    assert shape == (7, 8)


def test_checkpoint(qmodel, x, tmp_path: Path):
    qmodel.eval()
    state = nnx.state(qmodel, nnx.Not(nnx.RngState))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    fresh = nnx.clone(qmodel)
    nnx.update(fresh, jax.tree.map(jnp.zeros_like, state))
    assert (fresh(x) != qmodel(x)).any()
    nnx.update(fresh, restored)
    assert (fresh(x) == qmodel(x)).all()


def test_methods(model, qmodel, x):
    assert qmodel.size() == (8, "classes")
    assert qmodel.double(3) == 6
    with pytest.raises(AttributeError, match=r"Net has no method 'width'.*\.model\.width"):
        _ = qmodel.width
    # generators given as an argument are drawn from
    ours, theirs = nnx.Rngs(5), nnx.Rngs(5)
    for _ in range(2):
        got, want = qmodel.features(x, rngs=ours), model.features(x, rngs=theirs)
        assert ((got == 0) == (want == 0)).mean() > 0.95
    assert int(ours.default.count[...]) == int(theirs.default.count[...]) == 2
    # the graph changes as the method says
    assert _close(nnx.jit(lambda m, x: m.remember(x))(qmodel, x), model.remember(x))
    assert qmodel.model.calls == 1 and (qmodel.model.last[...] == x).all()


def test_quantized_parameters_are_constants(model, qmodel, x):
    before = jax.tree.leaves(qmodel.model.inner.kernel.get_raw_value())
    assert _close(qmodel.replace(x), nnx.clone(model).replace(x))
    assert _close(qmodel.branch(x), model.branch(x))  # `cond` hands every variable back
    kernel = qmodel.model.inner.kernel.get_raw_value()
    assert is_qtensor(kernel)
    assert all(a is b for a, b in zip(jax.tree.leaves(kernel), before, strict=True))


def test_inside_another_module_and_quantized_further(qmodel, x):
    class Outer(nnx.Module):
        def __init__(self):
            self.body = qmodel
            self.top = nnx.Linear(8, 8, rngs=nnx.Rngs(2))

        def __call__(self, x):
            return self.top(self.body(x))

    qmodel.eval()
    outer = Outer()
    both, report = jq.nnx.ptq(outer, W8A8, x)
    assert report["top/kernel"].quantized
    assert report["body/model/inner/kernel"].action == "kept: already quantized (int8)"
    assert _close(both(x), outer(x))
    head_only = jq.Recipe([jq.Rule("head/*", weights=jq.int8())])
    once, _ = jq.nnx.ptq(Net(nnx.Rngs(0)), head_only, x)
    twice, report = jq.nnx.ptq(once, W8A8, x)
    assert isinstance(twice.model, Net) and report["inner/kernel"].quantized


def test_decode_with_cache():
    model = nnx.MultiHeadAttention(4, 64, decode=True, rngs=nnx.Rngs(0))
    model.init_cache((2, 5, 64))
    tokens = jax.random.normal(jax.random.key(2), (5, 2, 1, 64))
    qmodel, _ = jq.nnx.ptq(model, W8A8, tokens[0])
    step, qstep = nnx.jit(_forward), nnx.jit(_forward)
    for n, token in enumerate(tokens):
        assert _close(qstep(qmodel, token), step(model, token), 0.04)
        assert int(qmodel.model.cache_index[...]) == n + 1


def test_gradients_with_respect_to_float_parameters(x):
    model = nnx.LoRALinear(
        64, 32, lora_rank=8, rngs=nnx.Rngs(0), b_initializer=nnx.initializers.lecun_normal()
    )
    qmodel, _ = jq.nnx.ptq(model, W8A8.prepend(jq.Rule("lora/*", skip=True)), x)

    def loss(model):
        return (model(x) ** 2).mean()

    wrt = nnx.DiffState(0, nnx.LoRAParam)
    got, want = (nnx.grad(loss, argnums=wrt)(m) for m in (qmodel, model))
    for name in ("lora_a", "lora_b"):
        assert _close(got["model"]["lora"][name][...], want["lora"][name][...])
    with pytest.raises(TypeError, match="int8"):
        nnx.grad(loss)(qmodel)


def test_shapes_alone_are_enough():
    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    qmodel, report = jq.nnx.ptq(model, jq.w4a16(32), jax.ShapeDtypeStruct((1, 64), jnp.float32))
    assert report["inner/kernel"].bits_per_weight == 5.0
    assert qmodel.model.inner.kernel.get_raw_value().codes.shape == (32, 32)


def test_mistakes(model, x):
    with pytest.raises(ValueError, match=r"expected an nnx.Module, got dict"):
        jq.nnx.ptq({}, W8A8, x)
    with pytest.raises(ValueError, match=r"nnx.ptq: expected a Recipe .* call it"):
        jq.nnx.ptq(model, jq.w8a8, x)
    with pytest.raises(ValueError, match=r"Net has no method 'encode'"):
        jq.nnx.ptq(model, W8A8, x, method="encode")
    with pytest.raises(ValueError, match=r"'body/\*'.*matches no parameter"):
        jq.nnx.ptq(model, jq.Recipe([jq.Rule("body/*", weights=jq.int8())]), x)
    with pytest.raises(ValueError, match=r"nothing to quantize"):
        jq.nnx.ptq(nnx.LayerNorm(64, rngs=nnx.Rngs(0)), W8A8, x)
    with pytest.raises(ValueError, match=r"head/bias.*ref=True.*with_vars"):
        jq.nnx.ptq(nnx.with_vars(model, ref=True, only=nnx.Param), W8A8, x)
    model.inner.kernel[...] = model.inner.kernel[...].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"inner/kernel \(1 of 2048 values\)"):
        jq.nnx.ptq(model, W8A8, x)
