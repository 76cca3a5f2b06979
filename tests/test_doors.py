"""The doors rhyme: the same verbs and the same order for functions, Linen and NNX."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant.observers import minmax
from tests.arrays import normal

X = normal(0, 3, 8)
PARAMS = {"query": normal(1, 8, 4), "value": normal(2, 8, 4)}
OWN = {"key": 2.0, "stats": 3.0, "save": 1.0, "progress": 0.5, "train": False, "method": 1.0}

# what a function and its params are to each door
SUBJECTS = {"fn": ("fn", "params"), "linen": ("model", "variables"), "nnx": ("model",)}
VERBS = {
    "ptq": ("recipe", "*args"),
    "capture": ("recipe",),
    "fold_batchnorm": ("*args",),
    "fake_quantized": ("recipe",),
}


def door(name):
    return jq if name == "fn" else getattr(jq, name)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", SUBJECTS)
def test_arguments_come_in_one_order(name, verb):
    parameters = inspect.signature(getattr(door(name), verb)).parameters.values()
    order = [(p.kind.name == "VAR_POSITIONAL" and f"*{p.name}") or p.name for p in parameters]
    subject = SUBJECTS[name]
    if verb == "fake_quantized":  # params come with each call
        subject = subject[:1]
    assert tuple(order[: len(subject) + len(VERBS[verb])]) == (*subject, *VERBS[verb])


def fn(params, x, *, key, stats, save, progress, train, method):
    assert not train
    return x @ params["query"] * key + x @ params["value"] * (stats + save + progress + method)


RULE = jq.Rule(
    "**", weights=jq.int8(), activations=jq.int8(granularity=jq.PerTensor()), observer=minmax()
)


def test_keywords_of_the_model_are_its_own():
    """Names that jaxquant has as well: in every door that calls a function."""
    qparams, _ = jq.ptq(fn, PARAMS, jq.int8(), X, kwargs=OWN)
    got = jq.quantized(fn)(qparams, X, **OWN)
    want = fn(PARAMS, X, **OWN)
    assert jnp.abs(got - want).max() < 0.02 * jnp.abs(want).max()
    stats = jq.capture(fn, PARAMS, minmax(), batches=[X], kwargs=OWN)
    static, _ = jq.ptq(fn, PARAMS, RULE, batches=[X], kwargs=OWN)
    assert [key for key, _ in stats.sites] == ["query", "value"]
    assert static["value"].calibration is not None
    assert {site.param for site in jq.trace(fn, PARAMS, X, kwargs=OWN).sites} == set(PARAMS)
    jq.init_quant_state(fn, PARAMS, jq.w8a8(), X, kwargs=OWN)
    with pytest.raises(ValueError, match="no BatchNorm with running statistics"):
        jq.fold_batchnorm(fn, PARAMS, X, kwargs=OWN)


def test_keywords_may_be_shapes_where_nothing_is_run():
    def dense(params, *, x):
        return x @ params["query"]

    kwargs = {"x": jax.ShapeDtypeStruct(X.shape, X.dtype)}
    qparams, _ = jq.ptq(dense, PARAMS, jq.int8(), kwargs=kwargs)
    assert isinstance(qparams["query"], jq.QTensor)


class Linen(nn.Module):
    """A layer whose keywords have names of jaxquant's."""

    @nn.compact
    def __call__(self, x, *, key, stats):
        return nn.Dense(4)(x) * key * stats


class NNX(nnx.Module):
    """The same in NNX."""

    def __init__(self):
        self.dense = nnx.Linear(8, 4, rngs=nnx.Rngs(0))

    def __call__(self, x, *, key, stats, params=1.0, state=1.0):
        return self.dense(x) * key * stats * params * state


def test_keywords_of_flax_models_are_their_own():
    kwargs = {"key": 2.0, "stats": 3.0}
    model = Linen()
    variables = model.init(jax.random.key(0), X, **kwargs)
    qvariables, _ = jq.linen.ptq(model, variables, jq.int8(), X, kwargs=kwargs)
    assert isinstance(qvariables["params"]["Dense_0"]["kernel"], jq.QTensor)
    assert jq.linen.capture(model, variables, minmax(), batches=[X], kwargs=kwargs).batches == 1
    kwargs |= {"params": 1.0, "state": 1.0}
    qmodel, _ = jq.nnx.ptq(NNX(), jq.int8(), X, kwargs=kwargs)
    assert qmodel(X, **kwargs).shape == (3, 4)
    assert jq.nnx.capture(NNX(), minmax(), batches=[X], kwargs=kwargs).batches == 1
    with pytest.raises(ValueError, match="no BatchNorm with running statistics"):
        jq.nnx.fold_batchnorm(NNX(), X, kwargs=kwargs)
    assert jq.nnx.fake_quantized(NNX(), jq.w8a8(), X, kwargs=kwargs)(X, **kwargs).shape == (3, 4)


@pytest.mark.parametrize("wrong", [[("key", 1.0)], {1: 2.0}], ids=str)
def test_what_are_no_keywords(wrong):
    with pytest.raises(ValueError, match=r"ptq: kwargs: expected the function's keyword arguments"):
        jq.ptq(fn, PARAMS, jq.int8(), X, kwargs=wrong)
