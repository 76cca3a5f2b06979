"""Codebooks: Lloyd's iteration, and the gradient of values that weights share."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import PerChannel, PerTensor, QSpec
from jaxquant.numerics import codebook_format
from jaxquant.ste import Moments, kmeans
from tests.ste import cases

EIGHT = QSpec(codebook_format(range(8)), PerTensor())


def codebook(x: np.ndarray, levels: int) -> jax.Array:
    """The values that training starts from."""
    spec = QSpec(codebook_format(range(levels)), PerTensor())
    return kmeans().init(x, spec)["codebook"]


def inertia(x: np.ndarray, centroids: np.ndarray) -> float:
    c = np.sort(np.asarray(centroids, np.float64))
    at = np.searchsorted((c[1:] + c[:-1]) / 2, x)
    return float(((x - c[at]) ** 2).sum())


def test_lloyd_is_as_good_as_scikit_learn():
    levels = 16
    cluster = pytest.importorskip("sklearn.cluster")
    x = cases.normal(4000, seed=41)
    found = codebook(x, levels)
    best = cluster.KMeans(levels, n_init=3, random_state=0).fit(x[:, None].astype(float)).inertia_
    linear = inertia(x, np.linspace(x.min(), x.max(), levels))
    print(f"{levels}: {inertia(x, found) / best:.4f} of scikit-learn's, {linear / best:.2f} linear")
    assert inertia(x, found) <= 1.001 * best
    assert inertia(x, found) < 0.7 * linear
    assert np.all(np.diff(found) > 0)


def optimum(x: np.ndarray, levels: int) -> float:
    """The least inertia: every way to cut sorted values into runs."""
    x = np.sort(x.astype(np.float64))
    cuts = itertools.combinations(range(1, len(x)), levels - 1)
    runs = (np.split(x, cut) for cut in cuts)
    return min(sum(((r - r.mean()) ** 2).sum() for r in run) for run in runs)


def test_lloyd_is_optimal_where_the_optimum_is_known():
    spots = np.array([-7.0, -1.0, 0.5, 3.0], np.float32)
    np.testing.assert_array_equal(codebook(np.repeat(spots, 5), 4), spots)
    # more levels than values: all of them are there
    assert set(np.asarray(codebook(np.repeat(spots[:2], 10), 4)).tolist()) >= {-7.0, -1.0}
    np.testing.assert_array_equal(codebook(np.full(20, 2.5, np.float32), 4), 2.5)
    # one value far from all others takes one level, not half of them
    far = np.r_[cases.normal(19, seed=42), 100.0].astype(np.float32)
    assert inertia(far, codebook(far, 4)) <= 1.05 * optimum(far, 4)


@pytest.mark.parametrize("reassign", [False, True])
def test_gradient_of_a_value_is_the_sum_over_its_members(reassign):
    spec, levels = EIGHT, 8
    w, g = cases.normal(seed=43), cases.normal(seed=44)
    estimator = kmeans(reassign=reassign)
    made = estimator.init(w, spec, storage_last_axes=(0,))
    assert made["codebook"].shape == (levels,) and set(made) == {"codebook", *estimator.constants}
    codebook = np.random.default_rng(45).permutation(np.asarray(made["codebook"]))  # as trained
    at = np.abs(w[..., None] - codebook).argmin(-1) if reassign else np.asarray(made["codes"])
    constants = {n: made[n] for n in estimator.constants}

    def values(w, codebook):
        learned = {"codebook": codebook, **constants}
        q = estimator.encode(w, learned, spec, storage_last_axes=(0,))
        return estimator.values(w, learned, q), q

    y, pull, q = jax.vjp(values, jnp.asarray(w), jnp.asarray(codebook), has_aux=True)
    q.validate()
    np.testing.assert_array_equal(y, codebook[at])
    np.testing.assert_array_equal(y, jq.dequantize(q))
    dw, dcodebook = pull(jnp.asarray(g))
    np.testing.assert_array_equal(dw, g if reassign else 0)
    want = np.array([g[at == k].sum(dtype=np.float64) for k in range(levels)])
    np.testing.assert_allclose(dcodebook, want, rtol=1e-5, atol=1e-5)
    # the values are linear in the codebook: finite differences are exact
    if not reassign:
        moved = values(jnp.asarray(w), jnp.asarray(codebook + 0.5))[0]
        total = float(jnp.sum(g * (moved - y)))
        assert total == pytest.approx(0.5 * want.sum(), abs=1e-4)


def test_codes_stay_where_they_were_when_training_began():
    w = cases.normal(seed=46)
    made = kmeans().init(w, EIGHT)
    assert made["codes"].dtype == jnp.uint8 and made["codes"].shape == w.shape
    np.testing.assert_array_equal(
        made["codes"], np.abs(w[..., None] - np.asarray(made["codebook"])).argmin(-1)
    )
    moved = kmeans().encode(-w, made, EIGHT)
    np.testing.assert_array_equal(jq.dequantize(moved), made["codebook"][made["codes"]])
    again = kmeans(reassign=True).encode(-w, made, EIGHT)
    assert np.abs(jq.dequantize(again) + w).max() < np.abs(jq.dequantize(moved) + w).max()


def test_what_it_does_not_do():
    w = cases.normal()
    for spec in (QSpec("int4", PerTensor()), QSpec("nf4", PerChannel(0))):
        with pytest.raises(ValueError, match="kmeans takes PerTensor"):
            kmeans().init(w, spec)
    with pytest.raises(ValueError, match="an array with values"):
        kmeans().init(np.zeros((0, 3), np.float32), EIGHT)
    made = kmeans().init(w, EIGHT)
    with pytest.raises(ValueError, match="has 16 values, the codebook learned 8"):
        kmeans().encode(w, made, QSpec("nf4", PerTensor()))
    with pytest.raises(ValueError, match="cannot become int4"):
        kmeans().rescaled(made, EIGHT, QSpec("int4"))
    with pytest.raises(ValueError, match=r"KMeans\(.*\) trains weights"):
        kmeans().init_activation(Moments(*(jnp.ones(()),) * 5), QSpec("int8", PerTensor()))
