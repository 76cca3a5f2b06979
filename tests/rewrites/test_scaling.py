"""`smoothquant` and `awq` on arrays, against the papers' formulas written in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import PerChannel, PerGroup, PerTensor, QSpec
from jaxquant.observers.inputs import InputStats
from jaxquant.recipe import Rewrite
from jaxquant.rewrites.awq import awq
from jaxquant.rewrites.smoothquant import smoothquant
from tests.reference import grid, scales

SPECS = [
    QSpec("int8", PerChannel(1)),
    QSpec("int4", PerGroup(16, axis=0)),
    QSpec("int3", PerGroup(20, axis=0), symmetric=False),
    QSpec("int4", PerTensor()),
    QSpec("nf4", PerGroup(16, axis=0)),
]


def inputs_of(seed, rows=200, width=48, outliers=3):
    """Correlated inputs, a few channels of them large, as a trained model has."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, width)) @ rng.normal(size=(width, width)) / np.sqrt(width)
    x[:, rng.choice(width, outliers, replace=False)] *= 20.0
    return x.astype(np.float32)


def stats_of(x, hessian=True):
    """Statistics of inputs `[*batch, rows, K]`, in float64."""
    wide = x.astype(np.float64)
    h = np.swapaxes(wide, -1, -2) @ wide / x.shape[-2]
    return InputStats(
        rows=jnp.full(x.shape[:-2], x.shape[-2], jnp.float32),
        absmax=jnp.asarray(np.abs(x).max(-2)),
        absmean=jnp.asarray(np.abs(wide).mean(-2), jnp.float32),
        hessian=jnp.asarray(h, jnp.float32) if hessian else None,
        axes=(-2,),
        batched=(),
    )


def weights_of(seed, *widths, rows=48):
    rng = np.random.default_rng(seed)
    return [rng.standard_t(5, size=(rows, n)).astype(np.float32) for n in widths]


def quantize_dequantize(w, spec):
    """Every value's nearest on its grid."""
    values = grid(spec.format.name)
    scale, zero = scales(w, spec)
    at = w / scale + zero
    # the negative extreme lies half way between two codes and takes the outer one
    at = np.where(at < values[0] + 0.51, at - 1e-6, at) if spec.symmetric else at
    return (values[np.abs(at[..., None] - values).argmin(-1)] - zero) * scale


def smooth_reference(x, weights, alpha):
    top = np.max([np.abs(w).max(1) for w in weights], axis=0).astype(np.float64)
    big = np.abs(x).max(0).astype(np.float64)
    c = np.maximum(big, 1e-5) ** alpha / np.maximum(top, 1e-5) ** (1 - alpha)
    live = big > 0
    c = c / np.exp(np.log(c[live]).mean())
    return np.where(live, c, 1.0)


def awq_reference(x, weights, specs, ratios, means=None):
    """Errors of all ratios on the samples themselves, and their factors."""
    mean = np.abs(x.astype(np.float64)).mean(0)
    errors, factors = [], []
    for r in ratios:
        s = mean**r if means is None else mean**r / (means ** (1 - r) + 1e-4)
        s = np.maximum(s, 1e-4)
        s = s / np.sqrt(s.max() * s.min())
        error = 0.0
        for w, spec in zip(weights, specs, strict=True):
            scaled = (w * s[:, None].astype(np.float32)).astype(np.float32)
            back = quantize_dequantize(scaled, spec) / s[:, None]
            error += ((x.astype(np.float64) @ (back - w)) ** 2).sum() / len(x)
        errors.append(error)
        factors.append(s)
    return np.array(errors), np.array(factors)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothquant_is_the_formula(alpha):
    x, weights = inputs_of(0), weights_of(1, 24, 8)
    x[:, 5] = 0.0
    weights[0][7] = weights[1][7] = 0.0
    c, details = smoothquant(alpha)(
        [jnp.asarray(w) for w in weights], SPECS[:2], stats_of(x, hessian=False)
    )
    np.testing.assert_allclose(c, smooth_reference(x, weights, alpha), rtol=2e-5)
    assert float(details["alpha"]) == np.float32(alpha) and c[5] == 1.0


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_awq_is_the_formula(spec):
    x, weights = inputs_of(2), weights_of(3, 24, 8)
    specs = [spec, QSpec("int3", PerChannel(1))]
    c, details = awq()([jnp.asarray(w) for w in weights], specs, stats_of(x))
    errors, factors = awq_reference(x, weights, specs, np.arange(20) / 20)
    best = int(errors.argmin())
    np.testing.assert_allclose(details["rounded"], errors[0], rtol=1e-5)
    np.testing.assert_allclose(details["error"], errors[best], rtol=1e-5)
    assert round(float(details["ratio"]) * 20) == best
    np.testing.assert_allclose(c, factors[best], rtol=1e-5)
    assert best > 0 and details["error"] < details["rounded"]


def test_awq_with_the_magnitude_of_weights():
    x, weights = inputs_of(4), weights_of(5, 40)
    weights[0] *= np.exp(np.random.default_rng(6).normal(size=(48, 1))).astype(np.float32)
    spec = QSpec("int3", PerGroup(20, axis=0))
    grouped = np.concatenate([weights[0], np.zeros((12, 40))]).reshape(3, 20, 40)
    relative = np.abs(grouped) / np.abs(grouped).max(1, keepdims=True)
    means = relative.reshape(60, 40)[:48].mean(1)
    both = [awq_reference(x, weights, [spec], np.arange(20) / 20, m) for m in (None, means)]
    errors = np.concatenate([both[0][0], both[1][0]])
    c, details = awq(duo=True)([jnp.asarray(weights[0])], [spec], stats_of(x))
    best = int(errors.argmin())
    np.testing.assert_allclose(details["error"], errors[best], rtol=1e-5)
    assert bool(details["weights"]) == (best >= 20)
    np.testing.assert_allclose(c, np.concatenate([both[0][1], both[1][1]])[best], rtol=1e-5)


def test_smoothquant_searches_alpha():
    x, weights = inputs_of(7), weights_of(8, 24)
    args = [jnp.asarray(weights[0])], SPECS[:1], stats_of(x)
    c, details = smoothquant(None)(*args)

    def estimate(alpha):
        s = smooth_reference(x, weights, alpha)
        scaled = (weights[0] * s[:, None]).astype(np.float32)
        back = quantize_dequantize(scaled, SPECS[0]) / s[:, None]
        step = (np.abs(x).max(0) / s).max() / 127.5
        noise = step**2 / 12 * (scaled.astype(np.float64) ** 2).sum()
        return ((x.astype(np.float64) @ (back - weights[0])) ** 2).sum() / len(x) + noise

    errors = np.array([estimate(a) for a in np.linspace(0, 1, 21)])
    np.testing.assert_allclose(details["error"], errors.min(), rtol=1e-5)
    np.testing.assert_allclose(details["alpha"], 0.05 * errors.argmin(), atol=1e-6)
    np.testing.assert_allclose(c, smooth_reference(x, weights, float(details["alpha"])), rtol=1e-4)


REWRITES = [smoothquant(), smoothquant(None), awq(steps=5), awq(steps=3, duo=True)]


@pytest.mark.parametrize("rewrite", REWRITES, ids=repr)
def test_stacked_is_one_by_one(rewrite):
    specs = SPECS[:2]
    x = np.stack([np.stack([inputs_of(3 * i + j) for j in range(3)]) for i in range(2)])
    layers = [weights_of(10 + i, 8, 12) for i in range(6)]
    weights = [np.stack([w[n] for w in layers]).reshape(2, 3, 48, -1) for n in range(2)]
    c, details = rewrite([jnp.asarray(w) for w in weights], specs, stats_of(x))
    assert c.shape == (2, 3, 48) and c.dtype == jnp.float32
    for i in range(2):
        for j in range(3):
            one, told = rewrite([jnp.asarray(w[i, j]) for w in weights], specs, stats_of(x[i, j]))
            np.testing.assert_allclose(c[i, j], one, rtol=1e-5)
            for name, value in told.items():
                np.testing.assert_allclose(details[name][i, j], value, rtol=1e-4)


@pytest.mark.parametrize("rewrite", REWRITES, ids=repr)
def test_values_jit_and_half_precision(rewrite):
    assert isinstance(rewrite, Rewrite) and hash(rewrite) and rewrite.online
    assert rewrite.observer.hessian is (rewrite != smoothquant())
    x, [w] = inputs_of(20), weights_of(21, 8)
    half, specs, stats = jnp.asarray(w, jnp.bfloat16), SPECS[1:2], stats_of(x)
    c, details = rewrite([half], specs, stats)
    again, told = jax.jit(lambda w, s: rewrite([w], specs, s))(half, stats)
    np.testing.assert_allclose(c, again, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), details, told)
    wide, _ = rewrite([half.astype(jnp.float32)], specs, stats)
    np.testing.assert_array_equal(c, wide)


@pytest.mark.parametrize("rewrite", REWRITES, ids=repr)
def test_channels_without_inputs_keep_one(rewrite):
    x, [w] = inputs_of(22), weights_of(23, 8)
    x[:, [3, 30]] = 0.0
    c, _ = rewrite([jnp.asarray(w)], SPECS[:1], stats_of(x))
    assert c[3] == c[30] == 1.0 and bool(jnp.isfinite(c).all()) and bool((c > 0).all())
    c, _ = rewrite([jnp.asarray(w)], SPECS[:1], stats_of(np.zeros_like(x)))
    np.testing.assert_array_equal(c, 1.0)


def test_awq_does_not_grow_with_ratios_or_layers():
    def equations(steps, layers):
        x = np.stack([inputs_of(i) for i in range(layers)])
        w = jnp.asarray(np.stack([weights_of(i, 8)[0] for i in range(layers)]))
        stats = stats_of(x)
        text = str(jax.make_jaxpr(lambda w, s: awq(steps)([w], SPECS[1:2], s))(w, stats))
        return text.count(" = ")

    assert equations(3, 2) == equations(20, 4)


@pytest.mark.parametrize("rewrite", REWRITES, ids=repr)
def test_mistakes(rewrite):
    w, stats = jnp.ones((48, 8)), stats_of(inputs_of(0))

    def refused(match, weights=(w,), specs=SPECS[:1], **other):
        bad = dataclasses.replace(stats, **other) if other else stats
        with pytest.raises(ValueError, match=match):
            rewrite(list(weights), specs, bad)

    refused("as many specs as weights", specs=SPECS[:2])
    refused("as many specs as weights", weights=(), specs=())
    refused(r"expected weights \[48, 'N'\]", weights=(w[1:],))
    refused("expected float weights", weights=(w.astype(jnp.int32),))
    refused("absmax holds values that are not finite", absmax=stats.absmax.at[3].set(jnp.nan))
    refused("at least one row", rows=jnp.zeros(()))
    if rewrite.observer.hessian:
        refused(r"statistics of observers.inputs\(\)", hessian=None)
        refused("hessian holds values", hessian=stats.hessian.at[0, 1].set(jnp.inf))
    with pytest.raises(ValueError, match="got None"):
        rewrite([w], SPECS[:1], None)


def test_options_are_checked():
    for alpha in (-0.1, 1.5, True):
        with pytest.raises(ValueError, match="alpha"):
            smoothquant(alpha)
    with pytest.raises(ValueError, match="steps"):
        awq(steps=0)
