"""`quantize_params(donate=True)`: float arrays go as their codes come."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq

INT8 = jq.QSpec("int8", jq.PerChannel(1))
KERNELS = jq.Rule("**/kernel", weights=INT8)


def make(key: jax.Array) -> dict:
    one, two = jax.random.split(key)
    return {
        "a": {"kernel": jax.random.normal(one, (16, 8)), "bias": jnp.ones(8)},
        "b": {"kernel": jax.random.normal(two, (8, 4))},
    }


def alive(params: dict) -> list[bool]:
    return [not x.is_deleted() for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]


def test_what_is_quantized_is_deleted_and_nothing_else(key) -> None:
    params = make(key)
    expected, plain = jq.quantize_params(params, [KERNELS])
    assert all(alive(params))
    qparams, report = jq.quantize_params(params, [KERNELS], donate=True)
    assert params["a"]["kernel"].is_deleted() and params["b"]["kernel"].is_deleted()
    assert qparams["a"]["bias"] is params["a"]["bias"] and not qparams["a"]["bias"].is_deleted()
    chex.assert_trees_all_equal(qparams, expected)
    assert str(report) == str(plain)


def test_a_tied_array_is_deleted_after_its_last_use(key) -> None:
    w = jax.random.normal(key, (16, 16))
    rules = [
        jq.Rule("a/kernel", weights=INT8),
        jq.Rule("b/kernel", weights=jq.QSpec("int4", jq.PerChannel(0))),
        jq.Rule("c/kernel", weights=INT8),
    ]
    params = {name: {"kernel": w} for name in "abc"}
    expected, _ = jq.quantize_params(params, rules)
    qparams, _ = jq.quantize_params(params, rules, donate=True)
    assert w.is_deleted()
    chex.assert_trees_all_equal(qparams, expected)


def test_a_tied_array_that_is_kept_somewhere_is_not_deleted(key) -> None:
    w = jax.random.normal(key, (16, 16))
    qparams, _ = jq.quantize_params({"a": {"kernel": w}, "table": w}, [KERNELS], donate=True)
    assert qparams["table"] is w and not w.is_deleted()


def test_numpy_arrays_stay(key) -> None:
    w = np.asarray(jax.random.normal(key, (16, 8)))
    before = w.copy()
    jq.quantize_params({"a": {"kernel": w}}, [KERNELS], donate=True)
    np.testing.assert_array_equal(w, before)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([jq.Rule("**/none", weights=INT8)], "matches no parameter"),
        (
            [jq.Rule("a/kernel", weights=INT8), jq.Rule("b/*", weights=INT8, encoder=jq.gptq())],
            "needs statistics",
        ),
        (
            [
                jq.Rule("a/kernel", weights=INT8),
                jq.Rule("b/kernel", weights=INT8, encoder=jq.encoders.rtn(stochastic=True)),
            ],
            "b/kernel.*pass key",
        ),
    ],
)
def test_an_error_before_any_work_leaves_all_arrays(rules, message, key) -> None:
    params = make(key)
    with pytest.raises(ValueError, match=message):
        jq.quantize_params(params, rules, donate=True)
    assert all(alive(params))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("donate", [False, True])
def test_non_finite_values_leave_all_arrays(value, donate, key) -> None:
    params = make(key)
    params["b"]["kernel"] = params["b"]["kernel"].at[3, 1].set(value)
    with pytest.raises(ValueError, match=r"NaN or infinity in b/kernel \(1 of 32 values\)"):
        jq.quantize_params(params, [KERNELS], donate=donate)
    assert all(alive(params))


def test_traced_arrays_cannot_be_deleted(key) -> None:
    with pytest.raises(ValueError, match=r"a/kernel.*donate_argnums"):
        jax.jit(lambda p: jq.quantize_params(p, [KERNELS], donate=True)[0])(make(key))
