"""GPTQ against a float64 reference: formats, granularities, orders."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import PerBlock, PerChannel, PerGroup, PerTensor, QSpec
from jaxquant.encoders import Encoder, gptq, to_matrix
from jaxquant.numerics import get
from jaxquant.observers import input_stats, inputs
from tests.encoders import gptq_reference as reference


def rows(k, seed=0, count=None):
    """Inputs whose columns are correlated and of unlike size."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((count or 4 * k, k)) * np.linspace(1.5, 0.1, k)
    mixing = rng.standard_normal((k, k)) / np.sqrt(k)
    return np.float32(hidden @ mixing * rng.uniform(0.3, 3.0, k))


def moments(x, axes=(-2,), batched=()):
    observer, x = inputs(), jnp.asarray(x)
    return input_stats(observer.update(observer.init(x), x), axes, batched)


def weights(k, n, seed=1):
    return np.float32(np.random.default_rng(seed).standard_normal((k, n)))


def agree(q, wanted, w, hessian, scale):
    """Few values may differ, where a rounding was a tie; the error at the output may not."""
    got = np.asarray(jq.dequantize(q), np.float64).reshape(wanted.shape)
    differs = np.abs(got - wanted) > 1e-3 * scale
    assert differs.mean() < 2e-3
    ours, theirs = (reference.output_error(w, v, hessian) for v in (got, wanted))
    assert ours == pytest.approx(theirs, rel=1e-5 if not differs.any() else 1e-2)


SCHEMES = {
    **{f"int{b}": (QSpec(f"int{b}"), reference.symmetric(b)) for b in range(2, 9)},
    **{
        f"uint{b}": (QSpec(f"uint{b}", symmetric=False), reference.asymmetric(b))
        for b in (2, 3, 4, 8)
    },
    "nf4": (QSpec("nf4"), reference.codebook(get("nf4").codebook)),
    "fp4": (
        QSpec("float4_e2m1fn"),
        reference.codebook([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]),
    ),
}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("group", [None, 16])
def test_it_is_the_reference(name, group):
    spec, scheme = SCHEMES[name]
    gran = PerChannel(1) if group is None else PerGroup(group, 0)
    w, stats = weights(72, 12), moments(rows(72))
    q, info = gptq()(w, dataclasses.replace(spec, granularity=gran), stats=stats)
    wanted, scales, zeros, loss = reference.gptq(w, stats.hessian, scheme, group)
    agree(q, wanted, w, stats.hessian, scales.mean())
    q.validate()
    if group is None:
        np.testing.assert_allclose(np.ravel(q.scale), scales[0], rtol=1e-6)
    if q.zero_point is not None and group is None:
        np.testing.assert_array_equal(np.ravel(q.zero_point), zeros[0])
    assert float(info.details["loss"]) == pytest.approx(loss, rel=1e-2)
    assert float(info.details["output_error"]) == pytest.approx(
        reference.output_error(w, jq.dequantize(q), stats.hessian), rel=1e-4
    )
