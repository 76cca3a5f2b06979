"""NNX models in training: `jaxquant.nnx.fake_quantized`, optimizers, modes, and what is served."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jaxquant as jq
import jaxquant.nnx
from tests.arrays import array

pytestmark = pytest.mark.usefixtures("uncontracted")

LSQ = jq.Rule(
    "**/kernel",
    weights=jq.int4(),
    activations=jq.int8(granularity=jq.PerTensor()),
    weight_estimator=jq.ste.lsq(),
    activation_estimator=jq.ste.lsq(),
)
OBSERVED = jq.Rule(
    "**/kernel",
    weights=jq.int8(),
    activations=jq.int8(granularity=jq.PerTensor()),
    observer=jq.observers.moving_average(),
)


class Net(nnx.Module):
    """Batch statistics, dropout, and another method."""

    def __init__(self, rngs: nnx.Rngs):
        self.inner = nnx.Linear(16, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, momentum=0.8, rngs=rngs)
        self.drop = nnx.Dropout(0.25, rngs=rngs)
        self.head = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(self.features(x))

    def features(self, x, *, rngs: nnx.Rngs | None = None):
        return self.drop(nnx.relu(self.norm(self.inner(x))), rngs=rngs)

    def size(self):
        return 4, "classes"


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(16, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.norm(self.up(x)))


class Scanned(nnx.Module):
    """Layers stacked by `vmap`, walked by `scan`, which hands every variable back."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.vmap(Block)(rngs.split(2))

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def walk(layer, x):
            return layer(x)

        return walk(self.layers, x)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return array(np.random.default_rng(seed).standard_normal(shape))


x = normal(16, 16)


@nnx.jit
def step(fmodel: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    def loss(fmodel: Any) -> jax.Array:
        return ((fmodel(x) - y) ** 2).mean()

    value, grads = nnx.value_and_grad(loss)(fmodel)
    optimizer.update(fmodel, grads)
    return value


@nnx.jit
def forward(model: nnx.Module, x: jax.Array) -> jax.Array:
    return model(x)


def leaves(model: nnx.Module, *filters: Any) -> list[np.ndarray]:
    """Copies of the arrays of a model's variables."""
    return [
        np.array(a)
        for a in jax.tree.leaves(nnx.state(model, nnx.All(nnx.Not(nnx.RngKey), *filters)))
    ]


def same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(
        np.asarray(m).tobytes() == np.asarray(n).tobytes() for m, n in zip(a, b, strict=True)
    )


def error(got: jax.Array, want: jax.Array) -> float:
    return float(jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(want.ravel()))


class FakeQuantTensor:
    """A model after some steps."""

    def __init__(self) -> None:
        self.model = Net(nnx.Rngs(0))
        self.before = leaves(self.model)
        self.fmodel = jq.nnx.fake_quantized(self.model, LSQ, x)
        self.first = nnx.clone(self.fmodel)
        self.optimizer = nnx.Optimizer(self.fmodel, optax.adam(1e-2), wrt=nnx.Param)
        self.losses = [float(step(self.fmodel, self.optimizer, x, x[:, :4])) for _ in range(25)]


@pytest.fixture(scope="module")
def trained() -> FakeQuantTensor:
    return FakeQuantTensor()


def test_what_is_trained(trained: FakeQuantTensor) -> None:
    fmodel, first = trained.fmodel, trained.first
    assert trained.losses[-1] < 0.5 * trained.losses[0]
    assert same(leaves(trained.model), trained.before)
    for kind in (nnx.Param, jq.nnx.LearnedParam, nnx.BatchStat):
        pairs = zip(leaves(fmodel, kind), leaves(first, kind), strict=True)
        assert all((a != b).any() for a, b in pairs)
    assert len(leaves(fmodel, jq.nnx.LearnedParam)) == 4
    assert fmodel.quant.step[...] == 25 and fmodel.quant.state().step == 25
    assert int(fmodel.model.drop.rngs.count[...]) == 25


def test_gradients_are_of_parameters_alone(trained: FakeQuantTensor) -> None:
    fmodel = nnx.clone(trained.fmodel)
    grads = nnx.jit(nnx.grad(lambda fmodel: (fmodel(x) ** 2).mean()))(fmodel)
    paths = {path[0] for path, _ in nnx.to_flat_state(grads)}
    assert paths == {"model", "quant"}
    assert nnx.graphdef(fmodel) == nnx.graphdef(trained.fmodel)
    kinds = {type(v) for v in jax.tree.leaves(grads, is_leaf=lambda v: isinstance(v, nnx.Variable))}
    assert kinds == {nnx.Param, jq.nnx.LearnedParam}
    assert all(np.isfinite(g).all() and (g != 0).any() for g in jax.tree.leaves(grads["quant"]))


def test_what_is_trained_is_served(trained: FakeQuantTensor) -> None:
    fmodel = nnx.clone(trained.fmodel)
    fmodel.eval()
    before = leaves(fmodel)
    y = forward(fmodel, x)
    assert same(leaves(fmodel), before)  # evaluation reads the state
    qmodel, report = jq.nnx.convert(fmodel)
    assert type(qmodel) is jq.nnx.Quantized and qmodel.model.drop.deterministic
    assert same([forward(qmodel, x)], [y])
    assert report.quantized == 2 and report["head/kernel"].action.startswith("int4 per channel")
    assert 5 < report["head/kernel"].sqnr_db < 40 and report.ratio < 0.5
    assert same(leaves(fmodel), before)
    viewed = nnx.view(fmodel, use_running_average=False, deterministic=False)
    forward(viewed, x)
    assert viewed.quant.step[...] == 26 and fmodel.model.norm.use_running_average


def test_a_checkpoint_goes_on(trained: FakeQuantTensor, tmp_path: Path) -> None:
    whole = copy.deepcopy((trained.fmodel, trained.optimizer))
    graphdef, keys, state = nnx.split(whole, nnx.RngKey, ...)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    again = nnx.merge(graphdef, keys, restored)
    for fmodel, optimizer in (whole, again):
        for _ in range(2):
            step(fmodel, optimizer, x, x[:, :4])
    assert whole[0].quant.step[...] == 27
    assert same(leaves(whole[0]), leaves(again[0])) and same(leaves(whole[1]), leaves(again[1]))


@pytest.mark.slow
def test_all_else_is_as_with_the_float_model() -> None:
    model = Net(nnx.Rngs(0))
    fmodel = jq.nnx.fake_quantized(model, OBSERVED, x)
    ranges = [np.array(a) for a in jax.tree.leaves(fmodel.quant.state().ranges)]
    for n in range(2):
        rows = normal(16, 16, seed=n)
        got, want = fmodel.features(rows), model.features(rows)
        assert ((got == 0) == (want == 0)).mean() > 0.99  # a relu may fall on the other side of 0
    assert error(got, want) < 0.05
    for name in ("mean", "var"):
        a, b = (getattr(m.norm, name)[...] for m in (fmodel.model, model))
        assert error(a, b) < 0.02
    assert int(fmodel.model.drop.rngs.count[...]) == int(model.drop.rngs.count[...]) == 2
    assert fmodel.quant.step[...] == 2
    assert not same(jax.tree.leaves(fmodel.quant.state().ranges), ranges)
    assert fmodel.size() == (4, "classes")
    ours, theirs = nnx.Rngs(5), nnx.Rngs(5)
    got, want = fmodel.features(x, rngs=ours), model.features(x, rngs=theirs)
    assert ((got == 0) == (want == 0)).mean() > 0.99
    assert int(ours.default.count[...]) == 1


def test_scanned_layers_and_schedule() -> None:
    model, rows = Scanned(nnx.Rngs(0)), normal(8, 16)
    schedule = jq.Schedule(start=1, freeze_batchnorm=1)
    fmodel = jq.nnx.fake_quantized(model, LSQ, rows, schedule=schedule)
    assert fmodel.quant.learned["weights"]["layers/up/kernel"]["step"].shape[0] == 2
    optimizer = nnx.Optimizer(fmodel, optax.sgd(1e-2), wrt=nnx.Param)
    stats = []
    graphdef = nnx.graphdef(fmodel)
    start = nnx.clone(model)
    assert error(forward(fmodel, rows), forward(start, rows)) < 1e-5  # still float
    stats.append(leaves(fmodel, nnx.BatchStat))
    pairs = zip(stats[0], leaves(start, nnx.BatchStat), strict=True)
    assert all(error(a, b) < 1e-5 for a, b in pairs)
    for _ in range(3):
        step(fmodel, optimizer, rows, 2 * rows)
        stats.append(leaves(fmodel, nnx.BatchStat))
    assert nnx.graphdef(fmodel) == graphdef  # each BatchNorm is as it was
    assert not same(stats[0], leaves(model, nnx.BatchStat))
    assert same(stats[0], stats[1]) and same(stats[0], stats[3])
    # what was handed back by the loop is the float parameter, not what it was rounded to
    after, before = (m.layers.up.kernel[...] for m in (fmodel.model, model))
    assert 0 < error(after, before) < 0.03
    fmodel.eval()
    qmodel, _ = jq.nnx.convert(fmodel)
    assert same([forward(qmodel, rows)], [forward(fmodel, rows)])


def test_random_rounding_moves_on() -> None:
    model = nnx.Linear(16, 4, rngs=nnx.Rngs(0))
    fmodel = jq.nnx.fake_quantized(model, jq.int8_training(), x, key=jax.random.key(7))
    assert same([fmodel.quant.key[...]], [jax.random.key_data(jax.random.key(7))])

    @nnx.jit
    def grads(fmodel: nnx.Module) -> Any:
        return nnx.grad(lambda fmodel: (fmodel(x) ** 3).mean())(fmodel)["model"]["kernel"][...]

    first, second = grads(fmodel), grads(fmodel)
    assert (first != second).any() and error(first, second) < 0.05


def test_mistakes(trained: FakeQuantTensor) -> None:
    model = trained.model
    with pytest.raises(
        ValueError, match=r"^nnx\.fake_quantized: expected an nnx\.Module, got dict"
    ):
        jq.nnx.fake_quantized({}, LSQ, x)
    with pytest.raises(ValueError, match=r"expected a Recipe .* call it"):
        jq.nnx.fake_quantized(model, jq.w8a8, x)
    with pytest.raises(ValueError, match=r"Net has no method 'encode'"):
        jq.nnx.fake_quantized(model, LSQ, x, method="encode")
    with pytest.raises(ValueError, match=r"expected an example to run '__call__' with"):
        jq.nnx.fake_quantized(model, LSQ)
    with pytest.raises(ValueError, match=r"expected a jq\.Schedule"):
        jq.nnx.fake_quantized(model, LSQ, x, schedule=5)
    with pytest.raises(ValueError, match=r"expected a float model, got a FakeQuantized"):
        jq.nnx.fake_quantized(trained.fmodel, LSQ, x)
    with pytest.raises(ValueError, match=r"that jaxquant\.nnx\.fake_quantized made, got Net"):
        jq.nnx.convert(model)
    broken = nnx.clone(trained.fmodel)
    broken.quant.learned["weights"]["head/kernel"]["step"].set_value(jnp.full((4, 1), jnp.nan))
    with pytest.raises(ValueError, match=r"the learned array is not finite"):
        jq.nnx.convert(broken)
    with pytest.raises(AttributeError, match=r"Net has no method 'norm'.*\.model\.norm"):
        _ = trained.fmodel.norm
