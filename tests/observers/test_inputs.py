"""Second moments of inputs: sums, merging, means, and what a file keeps of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import QSpec
from jaxquant.capture.storage import described
from jaxquant.observers import Observer, finish_stacked, input_stats, inputs
from tests.observers.cases import same

ROWS = (
    np.random.default_rng(0).standard_normal((3, 2, 20, 6)).astype(np.float32)
)  # batches, experts


def seen(batches, observer=None):
    observer = observer or inputs()
    state = observer.init(jnp.asarray(batches[0]))
    for batch in batches:
        state = observer.update(state, jnp.asarray(batch))
    return state


def test_it_is_an_observer():
    assert isinstance(inputs(), Observer) and inputs().sees_rows
    assert inputs() == inputs() != inputs(hessian=False)
    assert described(inputs(hessian=False)) == {"class": "Inputs", "fields": {"hessian": False}}
    assert repr(inputs()) == "inputs()" and "False" in repr(inputs(hessian=False))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sums_and_means(dtype):
    x = np.asarray(jnp.asarray(ROWS, dtype), np.float64)
    stats = input_stats(seen(jnp.asarray(ROWS, dtype)), (-2,), (-3,))
    flat = x.transpose(1, 0, 2, 3).reshape(2, 60, 6)
    np.testing.assert_array_equal(stats.rows, [60, 60])
    np.testing.assert_allclose(stats.absmax, np.abs(flat).max(1), rtol=1e-6)
    np.testing.assert_allclose(stats.absmean, np.abs(flat).mean(1), rtol=1e-5)
    hessian = np.einsum("erk,erl->ekl", flat, flat) / 60
    np.testing.assert_allclose(stats.hessian, hessian, rtol=1e-5, atol=1e-6)
    assert stats.axes == (-2,) and stats.batched == (-3,)


def test_rows_of_zeros_are_not_counted():
    x = ROWS[0].copy()
    x[0, 5:] = 0
    stats = input_stats(seen([x]), (-2,), (-3,))
    assert stats.rows.tolist() == [5, 20]
    np.testing.assert_allclose(stats.hessian[0], x[0, :5].T @ x[0, :5] / 5, rtol=1e-5, atol=1e-6)


def test_without_second_moments():
    state = seen(ROWS, inputs(hessian=False))
    assert "hessian" not in state and input_stats(state).hessian is None
    np.testing.assert_array_equal(state["abssum"], seen(ROWS)["abssum"])


def test_merging_is_a_monoid():
    a, b, c = (seen([batch]) for batch in ROWS)
    merge = inputs().merge
    same(merge(inputs().init(ROWS[0]), a), a)
    same(merge(merge(a, b), c), merge(a, merge(b, c)), rtol=1e-5)
    same(merge(merge(a, b), c), seen(ROWS), rtol=1e-5)


def test_batches_that_are_not_finite_change_nothing():
    for bad in (np.nan, np.inf, 3e38):  # the last one's square is not
        x = ROWS[1].copy()
        x[1, 3, 2] = bad
        state = seen([ROWS[0], x, ROWS[2]])
        assert int(state["bad"]) == 1 and int(state["updates"]) == 3
        same({**state, "bad": 0, "updates": 0}, {**seen(ROWS[::2]), "bad": 0, "updates": 0})
        with pytest.raises(ValueError, match="non-finite values in 1 of 3 batches"):
            input_stats(state)
        with pytest.raises(ValueError, match="non-finite"):
            inputs().finish(state, QSpec("int8"))


def test_nothing_seen():
    blank = inputs().init(jax.ShapeDtypeStruct((5, 6), jnp.float32))
    with pytest.raises(ValueError, match="no batches seen"):
        input_stats(blank)
    with pytest.raises(ValueError, match="no batches seen"):
        inputs().finish(blank, QSpec("int8"))
    with pytest.raises(ValueError, match=r"expected rows .*got \[6\]"):
        inputs().init(jax.ShapeDtypeStruct((6,), jnp.float32))


def test_layers_are_stacked():
    state = jax.vmap(lambda x: inputs().update(inputs().init(x), x))(jnp.asarray(ROWS))
    stats = input_stats(state, (-2,), (-3,))
    assert stats.hessian.shape == (3, 2, 6, 6) and stats.rows.shape == (3, 2)
    one = input_stats(seen(ROWS[1:2]), (-2,), (-3,))
    np.testing.assert_allclose(stats.hessian[1], one.hessian, rtol=1e-6)
    high = finish_stacked(inputs(), state, QSpec("int8"), 1).high
    np.testing.assert_array_equal(high, np.abs(ROWS).max((1, 2, 3)))
    np.testing.assert_array_equal(inputs().range(state).high, high)
    assert jax.tree.map(lambda a: a[0], stats).axes == (-2,)  # static


def test_it_traces():
    stats = jax.jit(lambda x: input_stats(inputs().update(inputs().init(x), x)))(ROWS[0])
    np.testing.assert_allclose(stats.hessian, input_stats(seen(ROWS[:1])).hessian, rtol=1e-6)


@pytest.mark.parametrize("k", [512, 515])
def test_many_columns(k):
    """`x^T x` in strips."""
    x = np.random.default_rng(1).standard_normal((2, 16, k)).astype(np.float32)
    wanted = np.einsum("erk,erl->ekl", x.astype(np.float64), x)
    hessian = np.asarray(seen([x])["hessian"])
    np.testing.assert_allclose(hessian, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(hessian, hessian.transpose(0, 2, 1))
