"""Clip search: the factor that a search in NumPy finds, and arrays of any shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import PerBlock, PerChannel, PerGroup, PerTensor, QSpec
from jaxquant.encoders import Encoder, clip, rtn
from tests.encoders import gptq_reference as reference
from tests.encoders.test_gptq import moments, rows, weights


def found(w, h, scheme, group, steps=10, least=0.5):
    """The values of the cheapest factor for each group and column, float64."""
    choose, rounded = scheme
    w, h, out = np.asarray(w, np.float64), np.asarray(h, np.float64), []
    for start in range(0, len(w), group):
        part = w[start : start + group]
        own = h[start : start + group, start : start + group]
        best, least_cost = None, np.inf
        for i in range(steps):
            p = 1 - i * (1 - least) / steps
            values = rounded(part, choose(part * p))
            d = part - values
            cost = np.sum(d * (own @ d), axis=0)
            best = values if best is None else np.where(cost < least_cost, values, best)
            least_cost = np.minimum(cost, least_cost)
        out.append(best)
    return np.concatenate(out)


@pytest.mark.parametrize(
    ("spec", "scheme"),
    [
        (QSpec("int3"), reference.symmetric(3)),
        (QSpec("uint4", symmetric=False), reference.asymmetric(4)),
    ],
)
@pytest.mark.parametrize("group", [None, 24, 50])
def test_it_is_the_reference(spec, scheme, group):
    gran = PerChannel(1) if group is None else PerGroup(group, 0)
    spec = QSpec(spec.format, gran, symmetric=spec.symmetric)
    w, stats = weights(72, 12), moments(rows(72))
    q, info = clip()(w, spec, stats=stats)
    wanted = found(w, stats.hessian, scheme, group or 72)
    got = np.asarray(jq.dequantize(q.validate()), np.float64)
    differs = np.abs(got - wanted) > 1e-4 * np.abs(wanted).max()
    assert differs.mean() < 2e-3  # ties
    error = reference.output_error(w, got, stats.hessian)
    if not differs.any():
        assert error == pytest.approx(reference.output_error(w, wanted, stats.hessian), rel=1e-5)
    assert float(info.details["output_error"]) == pytest.approx(error, rel=1e-4)
    assert 0.5 < float(info.details["factor"]) < 1.0


def test_one_step_rounds_to_nearest():
    w, stats = weights(40, 8), moments(rows(40))
    for spec in (QSpec("int4", PerGroup(16, 0)), QSpec("nf4", PerChannel(1))):
        q, info = clip(steps=1)(w, spec, stats=stats, storage_last_axes=(0,))
        plain, _ = rtn()(w, spec, storage_last_axes=(0,))
        np.testing.assert_array_equal(q.codes, plain.codes)
        np.testing.assert_array_equal(q.scale, plain.scale)
        assert float(info.details["factor"]) == 1.0


@pytest.mark.parametrize(
    ("shape", "axes", "spec"),
    [
        ((4, 18, 10), (-3, -2), QSpec("int3", PerGroup(16, (0, 1)))),
        ((4, 18, 10), (-2, -3), QSpec("int3", PerGroup(16, (0, 1)))),
        ((72, 2, 5), (-3,), QSpec("int3", PerChannel((1, 2)))),
        ((10, 72), (-1,), QSpec("int3", PerTensor())),
        ((72, 10), (-2,), QSpec("mxfp4").at((0,), 2)),
        ((72, 10), (-2,), QSpec("nvfp4").at((0,), 2)),
    ],
)
def test_any_shape_and_never_worse_than_nearest(shape, axes, spec):
    w, x = weights(72, 10).reshape(shape), rows(72)
    if axes == (-2, -3):  # the statistics run over the same axes in another order
        x = x.reshape(-1, 4, 18).transpose(0, 2, 1).reshape(-1, 72)
    stats = moments(x, axes)
    q, info = clip()(w, spec, stats=stats)
    plain, one = clip(steps=1)(w, spec, stats=stats)
    assert jax.tree.structure(q.validate()) == jax.tree.structure(plain)
    assert float(info.details["output_error"]) <= 1.001 * float(one.details["output_error"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gran", "of_one"),
    [(PerGroup(16, 1), PerGroup(16, 0)), (PerChannel((0, 2)), PerChannel(1))],
    ids=["groups", "channels"],
)
def test_experts_and_layers_one_by_one(gran, of_one):
    w = weights(6 * 40, 8).reshape(2, 3, 40, 8)
    x = np.stack([rows(40, seed) for seed in range(6)]).reshape(2, 3, -1, 40)
    stats = moments(x, (-2,), (-3,))
    encode = jax.jit(lambda w, s: clip()(w, QSpec("int3", gran), batch_axes=1, stats=s))
    q, info = encode(jnp.asarray(w, jnp.bfloat16), stats)
    assert q.validate().batch == (2,) and info.details["factor"].shape == (2,)
    assert q.dtype == "bfloat16"
    near = w.astype(jnp.bfloat16).astype(np.float32)
    values = np.asarray(jq.dequantize(q, jnp.float32))
    for at in np.ndindex(2, 3):
        one, _ = clip()(near[at], QSpec("int3", of_one), stats=moments(x[at]))
        np.testing.assert_allclose(values[at], jq.dequantize(one), rtol=1e-5, atol=1e-6)


def test_axes_count_within_a_layer():
    w, stats = weights(2 * 40, 8).reshape(2, 40, 8), moments(np.stack([rows(40), rows(40, 1)]))
    encode = lambda w, s: clip()(w, QSpec("int4", PerChannel(1)), batch_axes=1, stats=s)[0]
    assert jax.eval_shape(encode, w, stats).scale.shape == (2, 1, 8)


def test_refusals():
    assert isinstance(clip(), Encoder) and clip() == clip() and len({clip(), clip(5)}) == 2
    w, stats = weights(40, 8), moments(rows(40))
    with pytest.raises(ValueError, match=r"clip: .* expected stats="):
        clip()(w, QSpec("int4", PerChannel(1)))
    for gran in (PerGroup(4, 1), PerBlock(4, 4), PerChannel((0, 1)), PerChannel(0)):
        with pytest.raises(ValueError, match="clip: expected PerTensor"):
            clip()(w, QSpec("int4", gran), stats=stats)
    for options in ({"steps": 0}, {"steps": True}, {"least": 0.0}, {"least": 1.5}):
        with pytest.raises(ValueError, match=r"clip: (steps|least)"):
            clip(**options)
