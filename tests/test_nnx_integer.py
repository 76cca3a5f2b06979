"""NNX models with BatchNorm: integers throughout, folding, and state that moves on."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq
import jaxquant.nnx

pytestmark = pytest.mark.usefixtures("uncontracted")

X = jax.random.normal(jax.random.key(1), (2, 6, 6, 3))
RECIPE = jq.w8a8_integer(jq.observers.minmax())


class Net(nnx.Module):
    """Convolution, BatchNorm, relu, dropout, convolution."""

    def __init__(self, rngs: nnx.Rngs):
        self.c1 = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.c2 = nnx.Conv(8, 4, (3, 3), rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.c2(self.drop(nnx.relu(self.bn(self.c1(x)))))


def trained() -> Net:
    model = Net(nnx.Rngs(0))
    for seed in range(2):
        model(jax.random.normal(jax.random.key(seed), X.shape))
    scale = model.bn.scale
    scale[...] = jnp.linspace(-1.5, 2.0, 8)
    model.eval()
    return model


def test_batchnorm_stays_in_integers() -> None:
    model = trained()
    qmodel, report = jq.nnx.ptq(model, RECIPE, batches=[X])
    (edge,) = report.edges
    assert str(edge) == "c1/kernel -> c2/kernel: int8"
    assert {row.path for row in report.leaves} == {
        *(f"{c}/{n}" for c in ("c1", "c2") for n in ("kernel", "bias")),
        "bn/scale",
        "bn/bias",
    }
    jitted = nnx.jit(lambda m, x: m(x))
    y, float_y = jitted(qmodel, X), model(X)
    np.testing.assert_allclose(y, float_y, atol=0.05 * float(jnp.abs(float_y).max()))
    text = jitted.lower(qmodel, X).as_text()
    convs = re.findall(r"stablehlo.convolution.*", text)
    assert len(convs) == 2 and all("-> tensor<2x6x6x" in c and "i32>" in c for c in convs)
    between = text[text.index(convs[0]) : text.index(convs[1])]
    assert not re.search(r"convert .*xi8>\) -> tensor<.*f32>", between)
    # the same integers as the pure function
    graphdef, state = nnx.split(model)

    def fn(state: Any, x: Any) -> Any:
        return nnx.merge(graphdef, state)(x)

    qstate, plain = jq.ptq(fn, state, RECIPE, batches=[X])
    assert [str(e) for e in plain.edges] == [str(edge)]
    np.testing.assert_array_equal(jax.jit(jq.quantized(fn))(qstate, X), y)


@pytest.mark.slow
def test_state_moves_on_in_training_mode() -> None:
    model, recipe = trained(), jq.w8a8(attention=False)
    qmodel, _ = jq.nnx.ptq(model, recipe, X)
    qmodel.train()
    nnx.jit(lambda m, x: m(x))(qmodel, X)
    twin = trained()
    twin.train()
    twin(X)
    np.testing.assert_allclose(qmodel.model.bn.mean[...], twin.bn.mean[...], atol=0.02)
    assert qmodel.model.drop.rngs.count[...] == twin.drop.rngs.count[...] > 2
    assert jnp.abs(model.bn.mean[...] - twin.bn.mean[...]).max() > 1e-3


def test_folding_gives_a_model() -> None:
    model = trained()
    folded, info = jq.nnx.fold_batchnorm(model, X)
    assert type(folded) is Net and len(info) == 1
    assert str(info).splitlines()[2].split() == ["bn", "c1/kernel", "yes"]
    np.testing.assert_allclose(folded(X), model(X), atol=1e-5)
    np.testing.assert_array_equal(folded.bn.scale[...], jnp.ones(8))
    np.testing.assert_array_equal(model.bn.scale[...], jnp.linspace(-1.5, 2.0, 8))
    qmodel, _ = jq.nnx.ptq(model, jq.w8a8(), X)
    with pytest.raises(ValueError, match=r"nnx\.fold_batchnorm: the model is quantized already"):
        jq.nnx.fold_batchnorm(qmodel, X)
    with pytest.raises(ValueError, match=r"NNX module Net; call jaxquant\.nnx\.fold_batchnorm"):
        jq.fold_batchnorm(model, X)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"nnx\.ptq: expected an iterable of batches"):
        jq.nnx.ptq(model, jq.w8a8_integer(), batches=X)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        jq.nnx.fold_batchnorm(model, X)
