"""What Linen does besides computing: variables, random numbers, methods, binding, interceptors."""

from __future__ import annotations

import threading
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax.core import freeze

import jaxquant as jq
from jaxquant import linen
from tests.linen.models import (
    Boxed,
    Decorated,
    Setup,
    Stateful,
    Transformer,
    error,
    intercepted,
    normal,
    same,
)

pytestmark = pytest.mark.usefixtures("uncontracted")

RECIPE = jq.w8a8()
x = normal(8, 32)


def close(a: Any, b: Any) -> bool:
    """Whether structures are the same, and leaves but for quantization."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return jax.tree.all(jax.tree.map(lambda a, b: error(a, b) < 0.05, a, b))


class Models:
    """A model with its float and its quantized variables."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.float = jax.jit(model.init)(jax.random.key(0), x)
        self.quantized, _ = jq.ptq(model.apply, self.float, RECIPE, x)
        self.doors = [
            (linen.quantized(model).apply, self.quantized),
            (linen.quantized(model, RECIPE).apply, self.float),
            (intercepted(model), self.quantized),
            (intercepted(model, RECIPE), self.quantized),
            (intercepted(model, RECIPE), self.float),
        ]


@pytest.fixture(scope="module")
def stateful() -> Models:
    return Models(Stateful())


@pytest.fixture(scope="module")
def methods() -> Models:
    return Models(Setup())


@pytest.mark.parametrize(
    "mutable", [["batch_stats"], ["batch_stats", "intermediates"], nn.DenyList("params")], ids=str
)
@pytest.mark.parametrize("capture", [False, True])
def test_variables_and_dropout(stateful: Models, mutable: Any, capture: bool) -> None:
    options = {
        "train": True,
        "rngs": {"dropout": jax.random.key(3)},
        "mutable": mutable,
        "capture_intermediates": capture,
    }
    y, updated = stateful.model.apply(stateful.float, x, **options)
    for door, variables in stateful.doors:
        out, changed = door(variables, x, **options)
        assert close(out, y) and close(changed, updated)
        for a, b in zip(_hidden(changed), _hidden(updated), strict=True):
            assert ((a == 0) == (b == 0)).all()  # the dropout mask of the float model


def _hidden(variables: Any) -> list[jax.Array]:
    """The sown values, which dropout comes right before."""
    return list(variables.get("intermediates", {}).get("hidden", ()))


def test_all_collections_mutable(stateful: Models) -> None:
    for door, variables in stateful.doors:
        _, updated = door(
            variables, x, train=True, rngs={"dropout": jax.random.key(3)}, mutable=True
        )
        # what came in float goes out as it came, what came in quantized too
        assert same(updated["params"], variables["params"])
        assert not same(updated["batch_stats"], variables["batch_stats"])


def test_capture_by_filter(methods: Models) -> None:
    options = {"capture_intermediates": lambda module, name: name in ("encode", "__call__")}
    _, captured = methods.model.apply(methods.float, x, **options)
    for door, variables in methods.doors:
        assert close(door(variables, x, **options)[1], captured)


def test_random_numbers_go_on(methods: Models) -> None:
    def twice(variables: Any) -> list[Any]:
        bound = methods.model.bind(variables, rngs={"dropout": jax.random.key(2)})
        return [bound(x, train=True) for _ in range(2)]

    first, second = twice(methods.float)
    assert not close(first, second)
    with nn.intercept_methods(linen.interceptor(RECIPE)):
        for variables in (methods.float, methods.quantized):
            assert close(twice(variables), [first, second])


@pytest.mark.parametrize(
    "method",
    ["encode", Setup.encode, lambda m, x: m.double(m.encode(x)), lambda m, x: m.head(m.encode(x))],
    ids=["name", "function", "two methods", "submodule"],
)
def test_methods(methods: Models, method: Any) -> None:
    y = methods.model.apply(methods.float, x, method=method)
    for door, variables in methods.doors:
        assert 0 < error(door(variables, x, method=method), y) < 0.03


def test_methods_that_return_no_arrays(methods: Models) -> None:
    for door, variables in methods.doors:
        assert door(variables, method="facts") == ("setup", 3)


def test_bound_models(methods: Models) -> None:
    bound = methods.model.bind(methods.float)
    exact = bound(x), bound.encode(x), bound.head(bound.encode(x))
    with nn.intercept_methods(linen.interceptor(RECIPE)):
        for variables in (methods.float, methods.quantized):
            bound = methods.model.bind(variables)
            assert error(bound.w, methods.float["params"]["w"]) < 0.01  # made in setup, as an array
            assert close((bound(x), bound.encode(x), bound.head(bound.encode(x))), exact)
            assert same(bound.variables, variables)


def test_init_steps_aside(methods: Models) -> None:
    with nn.intercept_methods(linen.interceptor(RECIPE)):
        variables = jax.jit(methods.model.init)(jax.random.key(0), x)
    assert same(variables, methods.float)
    assert same(linen.quantized(methods.model, RECIPE).init(jax.random.key(0), x), methods.float)


def test_other_interceptors_act_once() -> None:
    def double(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = next_fun(*args, **kwargs)
        return 2 * y if context.method_name == "__call__" else y

    model = nn.Sequential([nn.Dense(8), nn.Dense(8)])
    variables = model.init(jax.random.key(0), x)
    qvariables, _ = jq.ptq(model.apply, variables, RECIPE, x)
    with nn.intercept_methods(double):
        y = model.apply(variables, x)
        with nn.intercept_methods(linen.interceptor()):
            assert close(model.apply(qvariables, x), y)
    with nn.intercept_methods(linen.interceptor()), nn.intercept_methods(double):
        assert close(model.apply(qvariables, x), y)


def test_one_interceptor_in_two_threads(methods: Models) -> None:
    shared, results = linen.interceptor(), []
    exact = methods.model.apply(methods.float, x)

    def work() -> None:
        with nn.intercept_methods(shared):
            results.append(methods.model.apply(methods.quantized, x))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2 and all(close(y, exact) for y in results)


def test_frozen_variables(methods: Models) -> None:
    y = methods.model.apply(methods.float, x)
    frozen = freeze(methods.float)
    qfrozen, _ = jq.ptq(methods.model.apply, frozen, RECIPE, x)
    assert type(qfrozen) is type(frozen)
    assert close(linen.quantized(methods.model, RECIPE).apply(frozen, x), y)
    assert close(intercepted(methods.model)(qfrozen, x), y)


def test_boxes_hold_qtensors() -> None:
    model = Boxed()
    variables = jax.jit(model.init)(jax.random.key(0), x)
    qvariables, _ = jq.ptq(model.apply, variables, RECIPE, x)
    box = qvariables["params"]["Dense_0"]["kernel"]
    assert isinstance(box, nn.Partitioned) and box.names == ("model", None)
    assert isinstance(box.unbox(), jq.QTensor)
    unboxed = nn.meta.unbox(qvariables)
    assert isinstance(unboxed["params"]["Dense_0"]["kernel"], jq.QTensor)
    y = jax.jit(linen.quantized(model).apply)
    assert same(y(unboxed, x), y(qvariables, x))


def test_gradients_and_partition(methods: Models) -> None:
    trainable, rest = jq.partition(methods.quantized)

    def loss(apply: Any, trainable: Any, x: Any) -> Any:
        return jnp.sum(apply(jq.combine(trainable, rest), x) ** 2)

    grads = [
        jax.jit(jax.grad(lambda t, x, door=door: loss(door, t, x), argnums=(0, 1)))(trainable, x)
        for door in (linen.quantized(methods.model).apply, intercepted(methods.model))
    ]
    assert same(grads[0], grads[1])
    bias = jax.grad(lambda v: jnp.sum(methods.model.apply(v, x) ** 2))(methods.float)
    assert error(grads[0][0]["params"]["head"]["bias"], bias["params"]["head"]["bias"]) < 0.05


def test_model_wrapper(methods: Models) -> None:
    qmodel = linen.quantized(methods.model, RECIPE)
    assert (qmodel.model, qmodel.recipe) == (methods.model, RECIPE)
    qvariables, report = linen.ptq(
        methods.model, methods.float, RECIPE, jax.ShapeDtypeStruct(x.shape, x.dtype)
    )
    assert same(qvariables, methods.quantized)
    assert report["params/w"].quantized
    shape = jax.eval_shape(qmodel.apply, methods.float, x)
    assert (shape.shape, shape.dtype) == ((8, 16), jnp.float32)


def test_report_follows_the_variables() -> None:
    tokens = jnp.arange(12).reshape(2, 6)
    variables = jax.eval_shape(Transformer().init, jax.random.key(0), tokens)
    sites = jq.trace(Transformer().apply, variables, tokens)
    assert sites["params/layers/gate"].scanned == (0,)
    assert [site.primitive for site in sites.of("params/embed/embedding")] == [
        "gather",
        "dot_general",
    ]
    free = [site.key for site in sites.sites if site.param is None]
    assert free == [f"layers/MultiHeadDotProductAttention_0{k}" for k in ("", "#1")]


BIASES = jq.Recipe([jq.Rule("**/bias", weights=jq.int8())])
TYPO = jq.Recipe([jq.Rule("**/kernels", weights=jq.int8())])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [(None, "no QTensor"), (TYPO, "matches no parameter"), (BIASES, "quantizes no parameter")],
)
def test_nothing_to_quantize(methods: Models, recipe: Any, message: str) -> None:
    for door in (linen.quantized(methods.model, recipe).apply, intercepted(methods.model, recipe)):
        with pytest.raises(ValueError, match=message):
            door(methods.float, x)


def test_float_variables_within_nn_jit() -> None:
    model, rows = Decorated(), normal(6, 32)
    variables = jax.eval_shape(model.init, jax.random.key(0), rows)
    variables = jax.tree.map(lambda a: normal(*a.shape), variables)
    with pytest.raises(ValueError, match=r"within nn\.jit"):
        intercepted(model, RECIPE)(variables, rows)
    exact = model.apply(variables, rows)
    y = linen.quantized(model, RECIPE).apply(variables, rows)
    assert 0 < error(y, exact) < 0.03
    assert same(model.apply(variables, rows), exact)


def test_modules_of_two_binds(methods: Models) -> None:
    class Calls(nn.Module):
        def __call__(self, other, x):
            return other(x)

    other = methods.model.bind(methods.quantized)
    bound = Calls().bind({"params": {}})
    with (
        nn.intercept_methods(linen.interceptor()),
        pytest.raises(ValueError, match="modules of one apply"),
    ):
        bound(other, x)


def test_an_error_leaves_no_trace(methods: Models) -> None:
    interceptor = linen.interceptor()
    with nn.intercept_methods(interceptor):
        with pytest.raises(ValueError, match="cannot be traced with these params"):
            methods.model.apply(methods.quantized, normal(3, 5))
        assert methods.model.apply(methods.quantized, x).shape == (8, 16)


def test_ptq_needs_a_module(methods: Models) -> None:
    with pytest.raises(
        ValueError, match=r"^linen\.ptq: expected the module itself, got its method"
    ):
        linen.ptq(methods.model.apply, methods.float, RECIPE, x)


@pytest.mark.parametrize("recipe", [jq.w8a8, "w8a8", [jq.w8a8()]], ids=range(3))
def test_what_is_no_recipe(methods: Models, recipe: Any) -> None:
    with pytest.raises(ValueError, match=r"^linen\.quantized: expected a Recipe"):
        linen.quantized(methods.model, recipe)
    with pytest.raises(ValueError, match=r"^linen\.interceptor: expected a Recipe"):
        linen.interceptor(recipe)


def test_what_is_no_module(methods: Models) -> None:
    for model, message in ((methods.model.apply, "its method apply"), (nn.Dense, "make an inst")):
        with pytest.raises(ValueError, match=f"^linen.quantized: expected .*{message}"):
            linen.quantized(model)


def test_other_methods_of_the_float_model() -> None:
    model = nn.Dense(4)
    rows, qmodel = normal(2, 8), linen.quantized(model, jq.Rule("**", weights=jq.int8()))
    y, variables = qmodel.init_with_output(jax.random.key(0), rows)
    assert same(y, model.apply(variables, rows))
    assert "Dense" in qmodel.tabulate(jax.random.key(0), rows)
    with pytest.raises(AttributeError, match="interceptor"):
        _ = qmodel.bind
    with pytest.raises(AttributeError, match=r"qmodel\.model"):
        _ = qmodel.features
    # quantized variables under a recipe: nothing is left to quantize, and nothing wrong
    qvariables, _ = linen.ptq(model, variables, jq.int8(), rows)
    rule = jq.Rule("kernel", weights=jq.int8())
    assert same(
        linen.quantized(model, rule).apply(qvariables, rows), qmodel.apply(qvariables, rows)
    )
