"""k-means as an encoder: against NumPy, against scikit-learn, and on arrays that are not nice."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import jaxquant as jq
from jaxquant import PerChannel, PerGroup, PerTensor, QSpec, dequantize, kmeans, palette
from jaxquant.encoders import Encoder, kmeans_codebook
from jaxquant.observers import input_stats, inputs
from tests.encoders.kmeans_reference import inertia, lloyd, optimum


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def nearest(x, codebook):
    c = np.asarray(codebook, np.float64)
    return np.searchsorted((c[1:] + c[:-1]) / 2, np.asarray(x, np.float64), side="left")


def test_it_is_a_value():
    assert isinstance(kmeans(), Encoder)
    assert len({kmeans(), kmeans(), kmeans(exact=True)}) == 2
    assert kmeans().observer is None
    assert kmeans(weighted=True).observer == inputs()


@pytest.mark.parametrize("size", [3000, 20000])
def test_it_ends_where_no_step_of_numpy_helps(size):
    x = normal(1, size)
    found = kmeans_codebook(x, 6)
    again = lloyd(x, found, 1)
    assert inertia(x, again) >= (1 - 1e-5) * inertia(x, found)
    assert np.all(np.diff(found) > 0)


@pytest.mark.parametrize(("size", "levels"), [(7, 3), (40, 4), (90, 8)])
@pytest.mark.parametrize("weighted", [False, True])
def test_exact_is_the_optimum(size, levels, weighted):
    x = normal(size, size)
    w = np.abs(normal(size + 1, size)) if weighted else None
    found = kmeans_codebook(x, levels, exact=True, weights=w)
    assert inertia(x, found, w) == pytest.approx(optimum(x, levels, w), rel=1e-4)


def test_scikit_learn_is_no_better():
    cluster = pytest.importorskip("sklearn.cluster")
    x = normal(3, 15000)
    best = cluster.KMeans(16, n_init=10, random_state=0).fit(np.asarray(x)[:, None]).inertia_
    assert inertia(x, kmeans_codebook(x, 16)) <= 1.001 * best
    assert inertia(x, kmeans_codebook(x, 16, exact=True)) <= 1.001 * best


@settings(max_examples=4)  # each has shapes, and so programs, of its own
@given(st.integers(1, 5), st.integers(3, 24), st.integers(3, 40), st.integers(1, 3))
def test_codes_are_the_nearest_values(layers, rows, columns, bits):
    w = normal(rows * columns, layers, rows, columns)
    q, info = kmeans()(w, palette(bits), batch_axes=1, storage_last_axes=(0,))
    q.validate()
    assert q.codebook.shape == (layers, 2**bits)
    for values, codebook, layer in zip(
        *map(np.asarray, (dequantize(q), q.codebook, w)), strict=True
    ):
        want = codebook[nearest(layer, codebook)]
        np.testing.assert_allclose(values, want, rtol=1e-6, atol=1e-6)
    assert np.sum(info.details["counts"]) == w.size


@pytest.mark.parametrize(
    "spec",
    [
        palette(3),
        palette(3, channels=8),
        QSpec(palette(2).format, PerChannel()),
        QSpec(palette(2).format, PerGroup(12)),
    ],
)
def test_layers_one_by_one_and_jit_give_the_same(spec):
    w, spec = normal(4, 3, 20, 37), spec.at((0,), 2)
    q, info = kmeans()(w, spec, batch_axes=1, storage_last_axes=(0,))
    q.validate()
    assert info.sqnr_db > 10
    assert np.sum(info.details["counts"]) == w.size  # padding is not counted
    for codes, codebook, layer in zip(*map(np.asarray, (q.codes, q.codebook, w)), strict=True):
        one, _ = kmeans()(layer, spec, storage_last_axes=(0,))
        np.testing.assert_array_equal(codes, one.codes)
        np.testing.assert_allclose(codebook, one.codebook, rtol=1e-6)
    compiled, _ = jax.jit(lambda w: kmeans()(w, spec, batch_axes=1, storage_last_axes=(0,)))(w)
    np.testing.assert_array_equal(q.codes, compiled.codes)


def test_a_codebook_for_each_group_of_channels():
    w = normal(5, 24, 20) * np.repeat(np.float32(10.0) ** np.arange(5, dtype=np.float32), 4)
    q, info = kmeans(exact=True)(w, palette(2, channels=4).at((0,), 2), storage_last_axes=(0,))
    assert q.codebook.shape == (5, 1, 4)
    assert info.details["counts"].shape == (5, 1, 4)
    for group in range(5):
        part = w[:, 4 * group : 4 * group + 4]
        assert inertia(part, np.asarray(q.codebook)[group, 0]) == pytest.approx(
            optimum(part, 4), rel=1e-3
        )
    uneven, _ = kmeans()(w[:, :18], palette(2, channels=4).at((0,), 2), storage_last_axes=(0,))
    own = np.asarray(dequantize(uneven))[:, 16:]
    assert inertia(w[:, 16:18], np.asarray(uneven.codebook)[4, 0]) == pytest.approx(
        np.sum((own - w[:, 16:18]) ** 2), rel=1e-4
    )


@pytest.mark.parametrize("size", [64, 200])
@pytest.mark.parametrize(
    "values", [[0.0], [0.1], [-1.3, 0.7], [1e-3, -5.0, 0.1, 0.2, 0.7], [3e38, -3e38, 1e38]]
)
def test_fewer_values_than_levels_come_back(values, size):
    w = np.random.default_rng(0).choice(np.float32(values), (size, size))
    q, info = kmeans()(jnp.asarray(w), palette(3))
    np.testing.assert_allclose(dequantize(q), w, rtol=1e-6)
    assert np.sum(np.asarray(info.details["counts"]) > 0) == len(values)
    assert np.isfinite(np.asarray(q.codebook)).all()


@pytest.mark.parametrize("scale", [1e-43, 1e-39, 1e-30, 1e30])
def test_tiny_and_huge_arrays(scale):
    w = (np.random.default_rng(1).standard_normal((100, 200)) * scale).astype(np.float32)
    q, info = kmeans()(w, palette(4))
    assert np.isfinite(np.asarray(q.codebook)).all()
    if scale >= 1e-30:
        assert info.sqnr_db == pytest.approx(20.2, abs=0.3)
    else:  # subnormal: no further off than what a processor may flush
        assert float(np.abs(np.asarray(dequantize(q)) - w).max()) < 1e-37


def test_a_value_far_out_costs_the_others_nothing():
    w = normal(6, 99999)
    far = np.append(w, np.float32(1e6))
    found = np.asarray(kmeans_codebook(far, 16))
    assert inertia(w, found[:-1]) <= 1.01 * inertia(w, kmeans_codebook(w, 15))


@pytest.mark.slow
def test_weights_say_what_counts(key):
    w, x = normal(7, 48, 2), normal(8, 300, 48) * np.float32(10.0 ** np.linspace(-2, 1, 48))
    stats = input_stats(inputs().update(inputs().init(x), x))
    fisher = np.diagonal(stats.hessian)[:, None]
    plain, _ = kmeans()(w, palette(3), storage_last_axes=(0,))
    by_inputs, _ = kmeans(weighted=True)(w, palette(3), storage_last_axes=(0,), stats=stats)
    by_array, _ = kmeans(weighted=True)(w, palette(3), storage_last_axes=(0,), stats=fisher)
    np.testing.assert_array_equal(by_inputs.codes, by_array.codes)

    def error(q):
        return np.sum(fisher * (np.asarray(dequantize(q)) - w) ** 2)

    least = optimum(w, 8, np.broadcast_to(fisher, w.shape))
    assert error(by_inputs) == pytest.approx(least, rel=1e-3)
    assert error(plain) > 1.1 * least
    own = kmeans_codebook(w, 8, weights=fisher)
    np.testing.assert_allclose(by_inputs.codebook, own, rtol=1e-5)
    none = kmeans_codebook(w, 8, weights=jnp.zeros(()))
    np.testing.assert_allclose(none, plain.codebook, rtol=1e-4, atol=1e-4)


def test_weights_of_several_axes_and_of_experts():
    w, x = normal(9, 2, 6, 5, 4), np.abs(normal(10, 2, 50, 20))
    state = jax.jit(lambda x: inputs().update(inputs().init(x), x))(x)
    stats = input_stats(state, axes=(-1, -2), batched=(-4,))
    q, _ = kmeans(weighted=True)(w, palette(2), stats=stats)
    diagonal = np.diagonal(stats.hessian, axis1=-2, axis2=-1).reshape(2, 4, 5)
    laid = diagonal.transpose(0, 2, 1)[:, None]
    own = kmeans_codebook(w, 4, weights=laid)
    np.testing.assert_allclose(q.codebook, own, rtol=1e-5)


def test_mistakes_are_named():
    w = normal(11, 8, 4)
    with pytest.raises(ValueError, match=r"codebook of 256 values for the array of 32 values"):
        kmeans()(w, palette(8))
    with pytest.raises(ValueError, match=r"codebook of 16 values for each group of 8 values"):
        kmeans()(w, palette(4, channels=1).at((0,), 2))
    with pytest.raises(ValueError, match="codebook format"):
        kmeans()(w, jq.QSpec("int4", PerTensor()))
    with pytest.raises(ValueError, match="needs statistics"):
        kmeans(weighted=True)(w, palette(2))
    x = normal(12, 10, 8)
    bare = inputs(hessian=False)
    state = jax.jit(lambda x: bare.update(bare.init(x), x))(x)
    with pytest.raises(ValueError, match="expected second moments"):
        kmeans(weighted=True)(w, palette(2), stats=input_stats(state))
    with pytest.raises(ValueError, match="weights of shape"):
        kmeans(weighted=True)(w, palette(2), stats=np.ones(3, np.float32))
    with pytest.raises(ValueError, match="codebook of 9 values for 8 values"):
        kmeans_codebook(np.ones(8, np.float32), 9)
    with pytest.raises(ValueError, match="levels"):
        kmeans_codebook(np.ones(8, np.float32), 0)
