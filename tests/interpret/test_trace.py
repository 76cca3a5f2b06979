"""`trace` finds every contraction, names it, and knows which of the parameter's axes it sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxquant as jq

from .programs import PROGRAMS, helpers, normal, stack, v, w, x


def sites(name: str) -> jq.interpret.Sites:
    program = PROGRAMS[name]
    return jq.trace(program.fn, program.params, *program.args, kwargs=dict(program.kwargs))


@pytest.mark.parametrize(
    ("name", "key", "contracted", "scanned"),
    [
        ("mlp", "w", (0,), ()),
        ("weight on the left", "w", (0,), ()),
        ("transposed weight", "w", (1,), ()),
        ("tied both ways", "w#1", (1,), ()),
        ("several contracted axes", "w", (0, 1), ()),
        ("batch axis", "w", (1,), ()),
        ("scan", "w", (1,), (0,)),
        ("scan over the last axis", "w", (0,), (1,)),
        ("recurrent", "hidden", (0,), ()),
        ("decode loop", "w", (0,), ()),
        ("loop index into a stack", "w", (1,), ()),
        ("fused and split", "qkv#2", (0,), ()),
        ("fused and reshaped", "qkv", (0,), ()),
        ("joined", "v", (0,), ()),
        ("scaled weight", "w", (0,), ()),
        ("embedding", "e", (1,), ()),
        ("tied embedding", "e#1", (1,), ()),
        ("experts", "w", (1,), ()),
        ("convolutions", "k", (0, 1, 2), ()),
        ("convolutions", "t", (0, 1, 2), ()),
        ("nested containers", "0/a/1", (0,), ()),
    ],
)
def test_axes(name: str, key: str, contracted: tuple[int, ...], scanned: tuple[int, ...]) -> None:
    site = sites(name)[key]
    assert site.contracted == contracted
    assert site.scanned == scanned


def test_repeats_are_numbered_in_execution_order() -> None:
    def fn(p, x):
        return (x @ p["w"]) @ p["w"].T @ p["w"]

    found = jq.trace(fn, {"w": w}, x)
    assert list(found) == ["w", "w#1", "w#2"]
    assert [s.contracted for s in found.values()] == [(0,), (1,), (0,)]


def test_two_calls_of_one_helper_are_two_sites() -> None:
    params = {f"w{i}": stack[0] for i in range(4)}
    assert list(jq.trace(helpers, params, x)) == ["w0", "w1", "w2", "w3"]


def test_attention_is_named_by_the_parameters_that_feed_it() -> None:
    def attend(p, h):
        q, k, val = (h @ p[n] for n in "qkv")
        return jax.nn.softmax(q @ k.T) @ val

    def fn(p, h):
        return attend(p["enc"]["b"], attend(p["enc"]["a"], h))

    square = normal(50, 16, 16)
    layer = dict.fromkeys("qkv", square)
    found = jq.trace(fn, {"enc": {"a": layer, "b": layer}}, x)
    free = [s.key for s in found.values() if s.param is None]
    assert free == ["enc/a", "enc/a#1", "enc/b", "enc/b#1"]


def test_attention_is_named_by_its_scope_where_there_is_one() -> None:
    def fn(p, h):
        with jax.named_scope("Model/enc"):
            h = h @ p["enc"]["q"]
            with jax.named_scope("mix"):
                return h @ h.T

    found = jq.trace(fn, {"enc": {"q": normal(51, 16, 16), "mix": {"unused": w}}}, x)
    assert list(found) == ["enc/q", "enc/mix"]


def test_what_never_contracts_is_told_with_what_it_met() -> None:
    def fn(p, x):
        return x @ p["w"] + p["b"][None] + jnp.sum(x @ (p["m"] * p["n"]))

    found = jq.trace(fn, {"w": w, "b": normal(52, 32), "m": w, "n": w, "never": v}, x)
    assert list(found) == ["w"]
    assert dict(found.met) == {"b": "add", "m": "mul", "n": "mul"}
    assert set(found.leaves) == {"w", "b", "m", "n", "never"}


def test_loops_record_a_site_once() -> None:
    def fn(p, x):
        def body(h, _):
            return jnp.tanh(h @ p["w"]), None

        h = lax.scan(body, x, None, length=3)[0]
        return lax.while_loop(lambda h: h.sum() < 1, lambda h: jnp.abs(h @ p["w"]) + 1, h)

    found = jq.trace(fn, {"w": normal(53, 16, 16)}, x)
    assert list(found) == ["w", "w#1"]


def test_shapes_are_enough() -> None:
    struct = jax.ShapeDtypeStruct
    huge = {"w": struct((1 << 20, 1 << 20), jnp.bfloat16)}
    found = jq.trace(lambda p, x: x @ p["w"], huge, struct((8, 1 << 20), jnp.bfloat16))
    assert found["w"].shape == (1 << 20, 1 << 20)


def test_quantized_params_have_the_same_sites() -> None:
    program = PROGRAMS["attention"]
    qparams, _ = jq.ptq(program.fn, program.params, jq.w8a8(), *program.args)
    before = jq.trace(program.fn, program.params, *program.args)
    after = jq.trace(program.fn, qparams, *program.args)
    assert before.sites == after.sites


def test_the_table_reads_well() -> None:
    lines = str(sites("scan")).splitlines()
    assert lines[0].split() == ["site", "primitive", "operands", "axes"]
    assert "scan 0, sum 1, keep 2" in lines[1]
