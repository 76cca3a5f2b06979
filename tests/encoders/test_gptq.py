"""GPTQ against a float64 reference: formats, granularities, orders."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import PerChannel, PerGroup, QSpec
from jaxquant.encoders import gptq
from jaxquant.numerics import get
from jaxquant.observers import input_stats, inputs
from tests.encoders import gptq_reference as reference


def rows(k, seed=0, count=None):
    """Inputs whose columns are correlated and of unlike size."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((count or 4 * k, k)) * np.linspace(1.5, 0.1, k)
    mixing = rng.standard_normal((k, k)) / np.sqrt(k)
    return np.float32(hidden @ mixing * rng.uniform(0.3, 3.0, k))


@jax.jit
def _gathered(x):
    return inputs().update(inputs().init(x), x)


def moments(x, axes=(-2,), batched=()):
    """What `inputs` knows of rows: one program for each shape, whichever axes they are of."""
    stats = input_stats(_gathered(x))
    return dataclasses.replace(stats, axes=axes, batched=batched)


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


# the paper's algorithm, without what the reference implementation has as options
plain = functools.partial(gptq, act_order=False, grid="range")


@pytest.mark.parametrize(
    ("name", "group"),
    [(name, 16) for name in SCHEMES] + [(name, None) for name in ("int3", "uint4", "nf4")],
)
def test_it_is_the_reference(name, group):
    spec, scheme = SCHEMES[name]
    gran = PerChannel(1) if group is None else PerGroup(group, 0)
    w, stats = weights(72, 12), moments(rows(72))
    q, info = plain()(w, dataclasses.replace(spec, granularity=gran), stats=stats)
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


@pytest.mark.parametrize(
    ("block", "group"),
    [(7, None), (512, None), (40, 1), (16, 24), (1, 50), (512, 24), (40, 72), (128, 100)],
)
def test_blocks_change_nothing(block, group):
    gran = PerChannel(1) if group is None else PerGroup(group, 0)
    w, stats = weights(72, 6), moments(rows(72))
    q, _ = plain(block=block)(w, QSpec("int4", gran), stats=stats)
    wanted, scales, *_ = reference.gptq(w, stats.hessian, reference.symmetric(4), group)
    agree(q, wanted, w, stats.hessian, scales.mean())


@pytest.mark.parametrize(("group", "bits"), [(None, 4), (16, 2), (20, 4)])
def test_static_order(group, bits):
    gran = PerChannel(1) if group is None else PerGroup(group, 0)
    w, stats = weights(72, 12), moments(rows(72))
    order = np.argsort(-np.diag(stats.hessian), kind="stable")
    scheme = reference.symmetric(bits)
    wanted, scales, *_ = reference.gptq(w, stats.hessian, scheme, group, order=order)
    for act_order in (True, "static"):
        q, _ = plain(act_order=act_order)(w, QSpec(f"int{bits}", gran), stats=stats)
        agree(q, wanted, w, stats.hessian, scales.mean())
    if group is None:  # there are no groups to keep together
        other, _ = plain(act_order="dynamic")(w, QSpec(f"int{bits}", gran), stats=stats)
        np.testing.assert_array_equal(other.codes, q.codes)


@pytest.mark.parametrize("k", [64, 72])
def test_dynamic_order(k):
    """Whole groups by importance, columns inside them: the reference on permuted columns."""
    group = 16
    w, stats = weights(k, 12), moments(rows(k))
    h = np.asarray(stats.hessian)
    parts = [np.arange(g, min(g + group, k)) for g in range(0, k, group)]
    parts = sorted(parts, key=lambda p: -np.diag(h)[p].sum())
    parts = [p[np.argsort(-np.diag(h)[p], kind="stable")] for p in parts]
    if k % group:  # a group that is not full comes last here, for the reference to count along
        assert len(parts[-1]) < group
    order = np.concatenate(parts)
    moved, scales, *_ = reference.gptq(
        w[order], h[np.ix_(order, order)], reference.symmetric(3), group
    )
    q, _ = plain(act_order="dynamic")(w, QSpec("int3", PerGroup(group, 0)), stats=stats)
    agree(q, moved[np.argsort(order)], w, h, scales.mean())


@pytest.mark.slow
def test_shrinkage():
    w, stats, spec = weights(72, 12), moments(rows(72)), QSpec("int4", PerChannel(1))
    q, _ = plain(shrinkage=0.25, damping=0.05)(w, spec, stats=stats)
    wanted, scales, *_ = reference.gptq(
        w, stats.hessian, reference.symmetric(4), None, 0.05, shrinkage=0.25
    )
    agree(q, wanted, w, stats.hessian, scales.mean())
    q, _ = plain(shrinkage=1.0)(w, spec, stats=stats)
    np.testing.assert_array_equal(q.codes, jq.quantize(jnp.asarray(w), spec).codes)


@pytest.mark.parametrize("grid", ["mse", "hessian"])
@pytest.mark.parametrize("gran", [PerChannel(1), PerGroup(24, 0)])
def test_searched_grids_are_better(grid, gran):
    w, stats = weights(72, 48), moments(rows(72))
    w[::7] *= 4.0
    spec = QSpec("int3", gran)
    _, first = plain()(w, spec, stats=stats)
    q, info = plain(grid=grid)(w, spec, stats=stats)
    assert float(info.details["output_error"]) < float(first.details["output_error"])
    if isinstance(gran, PerChannel):  # fixed beforehand, so it can be found again
        importance = np.diag(stats.hessian) if grid == "hessian" else np.ones(72)
        _, rounded = reference.symmetric(3)
        wide = np.abs(w).max(0) / 3.5

        def cost(p):
            return np.sum(importance[:, None] * (w - rounded(w, (wide * p, None))) ** 2, 0)

        factors = 1 - np.arange(24) / 32
        best = factors[np.argmin([cost(p) for p in factors], axis=0)]
        np.testing.assert_allclose(np.ravel(q.scale), wide * best, rtol=1e-5)
