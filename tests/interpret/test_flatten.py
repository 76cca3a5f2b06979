"""Straight programs: what is inlined and unrolled, what is marked, where they are cut."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from jaxquant.interpret.calls import trace_call
from jaxquant.interpret.flatten import Flat, flatten, mark_of
from jaxquant.interpret.segments import groups_of, segments_of


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda s: jnp.ones(s), tree, is_leaf=lambda s: isinstance(s, tuple))


def flat_of(fn: Any, params: Any, *args: Any, chosen: tuple[str, ...] = ()) -> Flat:
    call = trace_call(fn, params, args, {})
    return flatten(call, frozenset(chosen or call.param_paths))


def marked(flat: Flat) -> list[tuple[str, tuple[int, ...]]]:
    return [(m.path, m.piece) for m in flat.marks]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        y = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x)[None])[0]
        x = x + y
        return x + nn.Dense(4)(nn.gelu(nn.Dense(8)(nn.RMSNorm()(x)))), None


class Layers(nn.Module):
    scan: bool
    layers: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.scan:
            for _ in range(self.layers):
                x, _ = Block()(x, None)
            return x
        blocks = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return blocks()(x, None)[0]


@pytest.mark.parametrize("scan", [False, True])
def test_layers_are_cut_at_four_activations_each_and_alike(scan: bool) -> None:
    model, x = Layers(scan), jnp.ones((5, 4))
    flat = flat_of(model.apply, jax.jit(model.init)(jax.random.key(0), x), x)
    groups = groups_of(flat)
    # query, key and value read one activation
    assert [len(group.marks) for group in groups] == [3, 1, 1, 1] * 3
    segments = segments_of(flat, groups)
    # the first layer begins at the input, the last keeps nothing for the one after
    assert len({segment.key for segment in segments}) <= 6
    assert segments[4].key == segments[8].key and segments[5].key == segments[9].key
    if scan:
        assert all(mark.piece == (n // 6,) for n, mark in enumerate(flat.marks))


def run(flat: Flat, leaves: dict[Any, Any], inputs: list[Any]) -> list[np.ndarray]:
    """The marked activations, by segments."""
    rest = iter(inputs)
    env = {
        v: leaves[name] if name is not None else next(rest)
        for v, name in zip(flat.jaxpr.invars, flat.names, strict=True)
    }
    env.update(zip(flat.jaxpr.constvars, flat.consts, strict=True))
    seen = []
    for segment in segments_of(flat, groups_of(flat)):
        out = jax.jit(segment.run)([env[v] for v in segment.inputs])
        env.update(zip(segment.outputs, out, strict=True))
        seen.append(np.asarray(out[0]))
        for v in segment.dropped:
            del env[v]
    return seen


@pytest.mark.parametrize("scan", [False, True])
def test_segments_compute_what_the_function_does(scan: bool) -> None:
    model, x = Layers(scan), jax.random.normal(jax.random.key(1), (5, 4))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    flat = flat_of(model.apply, variables, x)
    call = trace_call(model.apply, variables, (x,), {})
    whole = dict(zip(call.param_paths, jax.tree.leaves(variables), strict=True))
    leaves = {n: whole[n[0]][n[1]] if n[1] else whole[n[0]] for n in flat.names if n is not None}
    seen = run(flat, leaves, [x])
    # what a layer's norm gives, by hand
    mean = np.mean(x, -1, keepdims=True)
    normed = (x - mean) / np.sqrt(np.var(x, -1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(seen[0][0], normed, rtol=1e-4, atol=1e-5)
    # and all of it, as the float function computes it with one more equation per mark
    floats: list[np.ndarray] = []

    def observing(p: Any, x: Any) -> Any:
        def intercept(nxt: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if isinstance(context.module, nn.DenseGeneral | nn.Dense) and not scan:
                floats.append(np.asarray(args[0]))
            return nxt(*args, **kwargs)

        with nn.intercept_methods(intercept):
            return model.apply(p, x)

    if not scan:
        observing(variables, x)
        expected = [f for n, f in enumerate(floats) if n % 6 not in (1, 2)]
        for got, want in zip(seen, expected, strict=True):
            np.testing.assert_allclose(got, want.reshape(got.shape), rtol=2e-4, atol=2e-5)


def test_helpers_and_custom_rules_are_inlined_and_nested_scans_unrolled() -> None:
    @jax.jit
    def helper(x: Any, w: Any) -> Any:
        return jnp.tanh(x @ w)

    @jax.custom_jvp
    def rule(x: Any, w: Any) -> Any:
        return x @ w

    rule.defjvp(lambda primals, tangents: (rule(*primals), tangents[0]))

    def fn(p: Any, x: Any) -> Any:
        def outer(x: Any, ws: Any) -> Any:
            return lax.scan(lambda x, w: (helper(x, w), None), x, ws, reverse=True)

        x = lax.scan(outer, rule(x, p["a"]), p["nested"])[0]
        return helper(x, p["b"])

    flat = flat_of(fn, shapes({"a": (4, 4), "b": (4, 4), "nested": (2, 3, 4, 4)}), jnp.ones((2, 4)))
    order = [("nested", (i, j)) for i in range(2) for j in (2, 1, 0)]
    assert marked(flat) == [("a", ()), *order, ("b", ())]
    assert flat.lengths == {"nested": (2, 3)}
    names = {eqn.primitive.name for eqn in flat.jaxpr.eqns if mark_of(eqn) is None}
    assert not names & {"scan", "jit", "pjit", "custom_jvp_call"}


def test_loops_over_time_stay_whole() -> None:
    def fn(p: Any, xs: Any) -> Any:
        h, _ = lax.scan(lambda h, x: (jnp.tanh(x @ p["w"] + h @ p["u"]), None), xs[0], xs)
        return lax.while_loop(lambda h: h.sum() > 9, lambda h: h @ p["v"], h) @ p["o"]

    flat = flat_of(fn, shapes(dict.fromkeys("wuvo", (4, 4))), jnp.ones((3, 2, 4)))
    assert marked(flat) == [("o", ())]
    assert {"scan", "while"} <= {eqn.primitive.name for eqn in flat.jaxpr.eqns}


def test_a_parameter_used_twice_has_two_marks() -> None:
    flat = flat_of(
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], shapes({"w": (4, 4)}), jnp.ones((2, 4))
    )
    assert marked(flat) == [("w", ())] * 2
    assert len(groups_of(flat)) == 2


def test_activations_that_are_computed_alike_are_one() -> None:
    def fn(p: Any, x: Any) -> Any:
        a = x.reshape(6, 4).astype(jnp.bfloat16) @ p["a"]
        b = x.reshape(6, 4).astype(jnp.bfloat16) @ p["b"]
        c = (2 * x.reshape(6, 4)).astype(jnp.bfloat16) @ p["c"]
        return a, b, c

    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), shapes(dict.fromkeys("abc", (4, 5))))
    flat = flat_of(fn, params, jnp.ones((2, 3, 4)))
    assert [group.marks for group in groups_of(flat)] == [(0, 1), (2,)]


def test_one_activation_contracted_over_other_axes_is_not_shared() -> None:
    def fn(p: Any, x: Any) -> Any:
        return x @ p["a"], x.T @ p["b"], jnp.einsum("ij,ik->jk", x, p["c"])

    flat = flat_of(fn, shapes(dict.fromkeys("abc", (4, 4))), jnp.ones((4, 4)))
    assert len(groups_of(flat)) == 3


def test_what_follows_from_parameters_alone_is_not_kept() -> None:
    def fn(p: Any, x: Any) -> Any:
        table = jnp.sin(p["t"])[None]
        x = jnp.tanh(x @ p["a"] + table)
        return (x + table) @ p["b"]

    flat = flat_of(
        fn, shapes({"t": (4,), "a": (4, 4), "b": (4, 4)}), jnp.ones((2, 4)), chosen=("a", "b")
    )
    first, second = segments_of(flat, groups_of(flat))
    kept = {*first.outputs, *second.outputs}
    assert all(v.aval.shape == (2, 4) for v in kept)
