"""What is alike is one function of the lowered program, so programs stay near the float ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jaxquant as jq


class Layer(nn.Module):
    """Attention and MLP, each with a norm before and a sum after."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        y = nn.RMSNorm()(x)
        q, k, v = (nn.Dense(width, use_bias=False)(y)[..., None, :] for _ in range(3))
        x = x + nn.Dense(width, use_bias=False)(nn.dot_product_attention(q, k, v)[..., 0, :])
        y = nn.gelu(nn.Dense(4 * width, use_bias=False)(nn.RMSNorm()(x)))
        return x + nn.Dense(width, use_bias=False)(y)


def lowered(fn, *args) -> str:
    return jax.jit(lambda *a: fn(*a)).trace(*args).lower().as_text()


@pytest.mark.parametrize(
    "recipe", [jq.w8a8(), jq.w4a16(), jq.w4a8(), jq.w8a16()], ids=lambda r: r.name
)
def test_twelve_layers_take_at_most_half_as_many_lines_again(recipe):
    x = jnp.ones((1, 16, 256))
    layer = Layer()
    keys = jax.random.split(jax.random.key(0), 12)
    params = [jax.eval_shape(layer.init, key, x) for key in keys]

    def fn(params, x):
        for p in params:
            x = layer.apply(p, x)
        return x

    sites = jq.trace(fn, params, x)
    qparams = jax.eval_shape(lambda p: jq.quantize_params(p, recipe, sites=sites)[0], params)
    lines = [lowered(f, p, x).count("\n") for f, p in ((fn, params), (jq.quantized(fn), qparams))]
    assert lines[1] <= 1.5 * lines[0]


def test_layers_that_share_an_input_share_its_quantization():
    def fn(params, x):
        return [x @ w for w in params] + [2 * x @ params[0]]

    params = [jnp.ones((64, 32))] * 3
    x = jnp.ones((4, 64))
    qparams, _ = jq.ptq(fn, params, jq.w8a8(), x)
    text = lowered(jq.quantized(fn), qparams, x)
    assert text.count("stablehlo.round_nearest_even") == 1
    assert text.count("stablehlo.dot_general") == 1
    assert text.count("call @") == 5  # four contractions, and their common quantization


def test_layers_on_calibrated_grids_are_alike_but_for_the_grids():
    def fn(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return x

    params = [jnp.eye(64)] * 5
    batches = [jax.random.normal(jax.random.key(n), (4, 64)) for n in range(2)]
    qparams, _ = jq.ptq(fn, params, jq.w8a8_static(), batches=batches, progress=False)
    text = lowered(jq.quantized(fn), qparams, batches[0])
    assert text.count("stablehlo.dot_general") == 1
    assert text.count("call @_quantized_dot(") == 5
