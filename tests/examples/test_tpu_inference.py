"""The TPU example: what a quantized decode step is compiled from, read without a TPU."""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Examples are scripts beside each other, not a package.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

import tpu_inference as example

import jaxquant as jq

TINY = dataclasses.replace(example.QUICK, vocab=64, layers=2, width=64, mlp=96, length=16)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_every_contraction_is_on_int8(platform, capsys):
    result = example.main(["--quick", "--platform", platform])
    # Seven dense layers, the scores, the values, and the logits from the tied embedding; key and
    # value, gate and up are alike, and one function each.
    assert result.contractions.total() == 8
    assert {c.types for c in result.contractions} == {("i8", "i8", "i32")}
    assert result.aliased == 2
    assert result.reread
    assert result.stored_bytes < 0.27 * result.float_bytes
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert f"exported for {platform}" in printed
    assert "updated in place" in printed


def test_weight_only_keeps_float_operands():
    result = example.lower(TINY, jq.w8a16(), "tpu", batch=2)
    assert {c.types[0] for c in result.contractions} == {"bf16"}
    assert result.aliased == 2


def test_quantized_decoding_follows_float():
    config = dataclasses.replace(TINY, dtype="float32")
    model = example.Decoder(config)
    tokens, cache, position = args = example.inputs(config, 2)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), args)
    variables = model.init(jax.random.key(0), *zeros)
    qvariables, _ = jq.ptq(model.apply, variables, jq.w8a8(), *args)
    step, qstep = jax.jit(model.apply), jax.jit(jq.quantized(model.apply), donate_argnums=2)
    cache, qcache = zeros[1], jax.tree.map(jnp.copy, zeros[1])
    for position in range(4):
        tokens = jnp.array([3, 5]) + position
        logits, cache = step(variables, tokens, cache, jnp.int32(position))
        qlogits, qcache = qstep(qvariables, tokens, qcache, jnp.int32(position))
        error = np.linalg.norm(qlogits - logits) / np.linalg.norm(logits)
        assert error < 0.05
    assert qcache["keys"].shape == cache["keys"].shape
