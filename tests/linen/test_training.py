"""Linen models in training: the `quant` collection, what moves on, and what is served."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax.core import freeze

import jaxquant as jq
from jaxquant import linen
from tests.linen.models import Stateful, error, normal, same

pytestmark = pytest.mark.usefixtures("uncontracted")

LSQ = jq.Rule(
    "**",
    weights=jq.int4(),
    activations=jq.int8(granularity=jq.PerTensor()),
    weight_estimator=jq.ste.lsq(),
    activation_estimator=jq.ste.lsq(),
)
OBSERVED = jq.Rule(
    "**",
    weights=jq.int8(),
    activations=jq.int8(granularity=jq.PerTensor()),
    observer=jq.observers.moving_average(),
)
MOVING = ["batch_stats", "quant"]
x = normal(8, 32)


class Net(nn.Module):
    """A convolution, and BatchNorm that is told its mode by an argument."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.8)(x))
        x = nn.Dense(8, use_bias=False)(x.mean((1, 2)))
        x = nn.relu(nn.BatchNorm(momentum=0.8)(x, not train))
        return nn.Dense(3)(x)


def step_of(fmodel: linen.FakeQuantizedModel, optimizer: Any, **kwargs: Any) -> Callable[..., Any]:
    """A jitted training step: variables and moments, then a batch."""

    def step(variables: Any, moments: Any, x: Any, y: Any) -> Any:
        def loss(trained: Any) -> Any:
            now = linen.updated(variables, trained)
            out, updates = fmodel.apply(now, x, mutable=MOVING, **kwargs)
            return ((out - y) ** 2).mean(), updates

        trained = linen.trainable(variables)
        (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        changes, moments = optimizer.update(grads, moments, trained)
        trained = optax.apply_updates(trained, changes)
        return linen.updated(variables, updates, trained), moments, value

    return jax.jit(step, donate_argnums=(0, 1))


@pytest.fixture(scope="module")
def images() -> tuple[jax.Array, jax.Array]:
    x = normal(16, 6, 6, 2)
    return x, jnp.stack([x[:, :4].mean((1, 2, 3)), x[..., 0].std((1, 2)), x[:, 0, 0, 0]], -1)


class FakeQuantTensor:
    """A convolutional model after some steps, and what can be done with it."""

    def __init__(self, batch: tuple[jax.Array, jax.Array]):
        self.model, (x, _) = Net(), batch
        self.fmodel = linen.fake_quantized(self.model, LSQ)
        self.optimizer = optax.sgd(0.02, 0.9)
        self.float = jax.jit(self.model.init)(jax.random.key(0), x)
        self.first = self.fmodel.with_state(self.float, x, kwargs={"train": True})
        self.step = step_of(self.fmodel, self.optimizer, train=True)
        self.variables, self.losses = jax.tree.map(jnp.copy, self.first), []
        self.moments = self.optimizer.init(linen.trainable(self.first))
        for _ in range(25):
            self.variables, self.moments, loss = self.step(self.variables, self.moments, *batch)
            self.losses.append(float(loss))


@pytest.fixture(scope="module")
def trained(images: Any) -> FakeQuantTensor:
    return FakeQuantTensor(images)


def test_what_is_trained(trained: FakeQuantTensor) -> None:
    assert trained.losses[-1] < 0.6 * trained.losses[0]
    before, after = trained.first, trained.variables
    assert jax.tree.structure(before) == jax.tree.structure(after)
    learned = after["quant"]["learned"]
    paths = [f"params/{name}/kernel" for name in ("Conv_0", "Dense_0", "Dense_1")]
    assert sorted(learned["weights"]) == sorted(learned["activations"]) == paths
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert all(jax.tree.leaves((moved["params"], moved["batch_stats"], moved["quant"]["learned"])))
    assert int(after["quant"]["step"]) == 25 and not moved["quant"]["key"]
    assert same({name: before[name] for name in trained.float}, trained.float)


def test_what_is_trained_is_served(trained: FakeQuantTensor, images: Any) -> None:
    x = images[0]
    y = jax.jit(trained.fmodel.apply)(trained.variables, x)
    assert 0 < error(y, trained.model.apply({**trained.variables}, x)) < 0.5
    qvariables = linen.convert(
        trained.fmodel, trained.variables, jax.ShapeDtypeStruct(x.shape, x.dtype)
    )
    assert sorted(qvariables) == ["batch_stats", "params"]
    assert isinstance(qvariables["params"]["Conv_0"]["kernel"], jq.QTensor)
    for served in (linen.quantized(trained.model).apply, jq.quantized(trained.model.apply)):
        assert same(jax.jit(served)(qvariables, x), y)


def test_a_checkpoint_goes_on(trained: FakeQuantTensor, images: Any, tmp_path: Path) -> None:
    held = {"variables": trained.variables, "moments": trained.moments}
    held = jax.tree.map(jnp.copy, held)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "held", held)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, held)
        restored = checkpointer.restore(tmp_path / "held", abstract)
    assert same(restored, held)
    data = flax.serialization.to_bytes(held)
    again = jax.tree.map(jnp.asarray, flax.serialization.from_bytes(held, data))
    results = [trained.step(h["variables"], h["moments"], *images) for h in (held, restored, again)]
    assert same(results[0], results[1]) and same(results[0], results[2])


def test_frozen_variables_and_state(trained: FakeQuantTensor, images: Any) -> None:
    fmodel, x = trained.fmodel, images[0]
    frozen = freeze(trained.variables)
    state = fmodel.state(frozen, x)
    assert isinstance(state, jq.qat.QuantState) and int(state.step) == 25
    fake = jq.fake_quantized(lambda v, x: Net().apply(v, x), LSQ)
    plain = {name: trained.variables[name] for name in trained.float}
    y, after = jax.jit(fake)(plain, x, quant_state=state)
    assert int(after.step) == 26
    assert same(jax.jit(fmodel.apply)(frozen, x), y)


@pytest.fixture(scope="module")
def stateful() -> tuple[Any, Any, Any]:
    model = Stateful()
    fmodel = linen.fake_quantized(model, OBSERVED)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    return model, fmodel, jax.jit(fmodel.init, static_argnames="train")(rngs, x, train=True)


@pytest.mark.parametrize(
    "mutable",
    [["batch_stats"], MOVING, ["intermediates", "quant"], True, nn.DenyList("params"), "quant"],
    ids=str,
)
@pytest.mark.parametrize("capture", [False, True])
def test_all_else_is_as_with_the_float_model(stateful: Any, mutable: Any, capture: bool) -> None:
    model, fmodel, variables = stateful
    plain = {name: held for name, held in variables.items() if name != "quant"}
    options = {
        # batch statistics must be mutable to be updated
        "train": mutable not in ("quant", ["intermediates", "quant"]),
        "rngs": {"dropout": jax.random.key(3)},
        "mutable": mutable,
        "capture_intermediates": capture,
    }
    want, expected = model.apply(plain, x, **options)
    got, updates = fmodel.apply(variables, x, **options)
    has = nn.module.Scope({}, {}, mutable=mutable).is_mutable_collection("quant")
    quant = updates.pop("quant", None)
    assert (quant is not None) == has
    if has:
        assert jax.tree.structure(quant) == jax.tree.structure(variables["quant"])
        assert int(quant["step"]) == 1 and same(quant["learned"], variables["quant"]["learned"])
        assert not same(quant["ranges"], variables["quant"]["ranges"])
    assert jax.tree.structure(updates) == jax.tree.structure(expected)
    if "params" in updates:
        assert same(updates["params"], variables["params"])
    pairs = zip(*map(jax.tree.leaves, ((got, updates), (want, expected))), strict=True)
    assert all(error(a, b) < 0.05 for a, b in pairs if b.any())
    for a, b in zip(_hidden(updates), _hidden(expected), strict=True):
        assert ((a == 0) == (b == 0)).all()  # the dropout mask of the float model


def _hidden(variables: Any) -> list[jax.Array]:
    return list(variables.get("intermediates", {}).get("hidden", ()))


def test_a_collection_that_is_not_mutable_is_read(stateful: Any) -> None:
    _, fmodel, variables = stateful
    wide = {**variables, "quant": jax.tree.map(jnp.copy, variables["quant"])}
    for name, state in wide["quant"]["ranges"].items():
        wide["quant"]["ranges"][name] = {
            k: 8 * v if v.dtype == jnp.float32 else v for k, v in state.items()
        }
    y, exact = fmodel.apply(wide, x), fmodel.model.apply(_plain(variables), x)
    assert error(fmodel.apply(variables, x), exact) < error(y, exact)
    assert same(fmodel.apply(wide, x), y)


def _plain(variables: Any) -> dict[str, Any]:
    return {name: held for name, held in variables.items() if name != "quant"}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.Dense(16, use_bias=False)(x)[:, :, None]
        return x + nn.dot_product_attention(h, h, h)[:, :, 0], None


class Attentive(nn.Module):
    """Scanned attention; a second method that uses one layer."""

    def setup(self):
        self.layers = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )()
        self.head = nn.Dense(16)

    def __call__(self, x):
        return self.head(self.layers(x, None)[0])

    def top(self, x):
        return self.head(x)

    def double(self, x):
        return 2 * x


def test_scanned_attention() -> None:
    model, x = Attentive(), normal(2, 4, 16)
    observed = jq.Rule(
        "head/*", **{k: getattr(OBSERVED, k) for k in ("weights", "activations", "observer")}
    )
    fmodel = linen.fake_quantized(model, jq.Recipe([observed, LSQ, *jq.w8a8().rules]))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda a: normal(*a.shape) / 4, shapes)
    variables = fmodel.with_state(variables, x)
    learned, path = variables["quant"]["learned"], "params/layers/Dense_0/kernel"
    assert learned["weights"][path]["step"].shape[0] == 2
    assert learned["activations"][path]["step"].shape == (2,)
    optimizer = optax.sgd(0.1)
    step, moments = step_of(fmodel, optimizer), optimizer.init(linen.trainable(variables))
    losses = []
    for _ in range(10):
        variables, moments, loss = step(variables, moments, x, x[:, ::-1])
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    qvariables = linen.convert(fmodel, variables, x)
    served = jax.jit(linen.quantized(model).apply)(qvariables, x)
    assert same(served, jax.jit(fmodel.apply)(variables, x))
    # methods of parts update theirs, and one that computes with no parameter nothing
    for method, moves in (("top", True), ("double", False)):
        y, updates = fmodel.apply(variables, x, method=method, mutable=["quant"])
        assert jax.tree.structure(updates["quant"]) == jax.tree.structure(variables["quant"])
        assert (not same(updates["quant"]["ranges"], variables["quant"]["ranges"])) == moves
    assert same(y, 2 * x)


def test_recipes_without_a_state() -> None:
    model = nn.Dense(4)
    fmodel = linen.fake_quantized(model, jq.w8a8())
    variables = model.init(jax.random.key(0), x)
    y = jax.jit(fmodel.apply)(variables, x)
    assert 0 < error(y, model.apply(variables, x)) < 0.03
    assert same(jax.jit(fmodel.apply)(fmodel.with_state(variables, x), x), y)
    assert same(jax.jit(linen.quantized(model).apply)(linen.convert(fmodel, variables, x), x), y)
    assert linen.trainable(variables).keys() == {"params"}


def test_init_as_the_model_has_it() -> None:
    model, rngs = nn.Dense(4), {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    fmodel = linen.fake_quantized(model, LSQ)
    y, variables = fmodel.init_with_output(rngs, x)
    assert same((y, _plain(variables)), model.init_with_output(rngs, x))
    keys = [fmodel.init(jax.random.key(n), x)["quant"]["key"] for n in (5, 6)]
    assert (keys[0] != keys[1]).any()
    rngs["quant"] = jax.random.key(5)
    assert same(fmodel.init(rngs, x)["quant"]["key"], jax.random.key_data(rngs["quant"]))
    assert "kernel" in fmodel.tabulate(rngs, x)
    with pytest.raises(AttributeError, match=r"ask its model, as in fmodel\.model"):
        _ = fmodel.bind


def test_schedule() -> None:
    model, rngs = Stateful(), {"dropout": jax.random.key(3)}
    schedule = jq.Schedule(start=1, freeze_batchnorm=2)
    fmodel = linen.fake_quantized(model, LSQ, schedule=schedule)
    variables = start = fmodel.init({"params": jax.random.key(0), **rngs}, x, train=True)
    apply = jax.jit(lambda v: fmodel.apply(v, x, train=True, rngs=rngs, mutable=MOVING))
    plain = jax.jit(lambda v: model.apply(v, x, train=True, rngs=rngs, mutable=["batch_stats"]))
    outs = []
    for _ in range(4):
        outs.append(apply(variables))
        variables = linen.updated(variables, outs[-1][1])
    y, updates = plain(_plain(start))
    assert error(outs[0][0], y) < 1e-5
    pairs = zip(*(jax.tree.leaves(u["batch_stats"]) for u in (outs[0][1], updates)), strict=True)
    assert all(error(a, b) < 1e-5 for a, b in pairs)
    assert 1e-3 < error(outs[1][0], y) < 0.3
    stats = [updates["batch_stats"] for _, updates in outs]
    assert not same(stats[0], stats[1]) and same(stats[1], stats[2]) and same(stats[1], stats[3])
    assert error(outs[2][0], outs[1][0]) > 0.01  # running statistics, after few steps
    assert same(outs[2][0], outs[3][0])


class Norms(nn.Module):
    """BatchNorm made in `setup`, scanned, and on its own."""

    def setup(self):
        self.norm = nn.BatchNorm(use_running_average=False)
        layers = nn.scan(
            Normed,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=2,
        )
        self.layers = layers()

    def __call__(self, x):
        return self.layers(self.norm(x), None)[0]


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.BatchNorm()(x + 1, use_running_average=False), None


@pytest.mark.parametrize("model", [Norms(), nn.BatchNorm(use_running_average=False)], ids=repr)
def test_freeze_batchnorm(model: nn.Module) -> None:
    variables = model.init(jax.random.key(0), x)
    options = {"mutable": ["batch_stats"], "capture_intermediates": True}
    y, updates = model.apply(variables, x, **options)
    frozen = linen.freeze_batchnorm(model.apply)
    out, unchanged = jax.jit(lambda v: frozen(v, x, **options))(variables)
    assert jax.tree.structure(unchanged) == jax.tree.structure(updates)
    assert same(unchanged["batch_stats"], variables["batch_stats"])
    assert not same(updates["batch_stats"], variables["batch_stats"])
    # statistics are those of initialization, a mean of 0 and a variance of 1
    assert error(out, x + 2 if isinstance(model, Norms) else x) < 1e-4
    assert same(model.apply(variables, x, **options), (y, updates))


class Within(nn.Module):
    layer: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        return self.layer(use_running_average=False, momentum=0.5)(x)


class Hidden(nn.Module):
    use_running_average: bool
    momentum: float

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(x)


@pytest.mark.parametrize("layer", [nn.remat(Hidden), nn.jit(Hidden)], ids=str)
def test_freeze_within_transforms(layer: type[nn.Module]) -> None:
    """The last is one that `nn.jit` has traced before, with BatchNorm out of reach."""
    model = Within(layer)
    variables = model.init(jax.random.key(0), x)
    model.apply(variables, x, mutable=["batch_stats"])
    frozen = linen.freeze_batchnorm(model.apply)
    if layer.__name__ == "JitHidden":
        with pytest.raises(ValueError, match=r"batch_stats/JitHidden_0/BatchNorm_0/mean changes"):
            frozen(variables, x, mutable=["batch_stats"])
    else:
        _, updates = frozen(variables, x, mutable=["batch_stats"])
        assert same(updates["batch_stats"], variables["batch_stats"])


def test_random_rounding() -> None:
    model, recipe = nn.Dense(4), jq.int8_training()
    fmodel = linen.fake_quantized(model, recipe)
    variables = fmodel.init(jax.random.key(0), x)

    @jax.jit
    def grads(variables: Any) -> Any:
        def loss(trained: Any) -> Any:
            now = linen.updated(variables, trained)
            y, updates = fmodel.apply(now, x, mutable=["quant"])
            return (y**3).mean(), updates

        return jax.grad(loss, has_aux=True)(linen.trainable(variables))

    first, updates = grads(variables)
    second, _ = grads(linen.updated(variables, updates))
    assert same(grads(variables)[0], first) and not same(first, second)
    assert error(second["params"]["kernel"], first["params"]["kernel"]) < 0.05


def test_mistakes(trained: FakeQuantTensor, images: Any) -> None:
    fmodel, variables, x = trained.fmodel, trained.variables, images[0]
    for what, message in ((Net, "a class"), (Net().apply, "the module itself"), ({}, "got dict")):
        with pytest.raises(ValueError, match=rf"^linen\.fake_quantized: expected .*{message}"):
            linen.fake_quantized(what, LSQ)
    with pytest.raises(ValueError, match=r"expected a Recipe"):
        linen.fake_quantized(Net(), jq.w8a8)
    with pytest.raises(ValueError, match=r"expected a jq\.Schedule"):
        linen.fake_quantized(Net(), LSQ, schedule=100)
    with pytest.raises(ValueError, match=r"apply: the recipe needs a state.*with_state"):
        fmodel.apply(trained.float, x)
    with pytest.raises(ValueError, match=r"apply: the schedule counts steps"):
        linen.fake_quantized(Net(), jq.w8a8(), schedule=jq.Schedule(start=3)).apply(
            trained.float, x
        )
    with pytest.raises(ValueError, match=r"state: the variables have no 'quant' collection"):
        fmodel.state(trained.float, x)
    with pytest.raises(ValueError, match=r"expected a 'quant' collection as init makes it.*sites"):
        fmodel.apply({**trained.float, "quant": {"batches": 1, "sites": {}}}, x)
    with pytest.raises(ValueError, match=r"expected variables, a dict of collections, got int"):
        fmodel.apply(3, x)
    other = linen.fake_quantized(Net(), jq.Rule("**", weights=jq.int8()))
    for call in (other.apply, functools.partial(linen.convert, other)):
        with pytest.raises(ValueError, match=r"was made for another recipe; continue and convert"):
            call(variables, x)
    wide = nn.Sequential([nn.Dense(8), nn.Dense(4)])
    wide_variables = wide.init(jax.random.key(0), x[0, 0])
    strange = {**wide_variables, "quant": variables["quant"]}
    with pytest.raises(ValueError, match=r"was made for params of other shapes"):
        linen.fake_quantized(wide, LSQ).apply(strange, x[0, 0])
    with pytest.raises(ValueError, match=r"another model or recipe: .*layers_0.* is missing"):
        jax.jit(linen.fake_quantized(wide, LSQ).apply)(strange, x[0, 0])
    with pytest.raises(ValueError, match=r"expected a function, got a Net; pass its apply"):
        linen.freeze_batchnorm(Net())


class Own(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.variable("quant", "scale", jnp.ones, ())
        return nn.Dense(4)(x)


def test_a_collection_of_the_models_own() -> None:
    with pytest.raises(ValueError, match=r"already has a 'quant' collection"):
        linen.fake_quantized(Own(), jq.w8a8()).init(jax.random.key(0), x)
