"""Weights whose scales are quantized themselves, on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from tests.test_nested_scales import weight


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("part", [(None, "d"), ("d", None)])
def test_on_a_mesh(part, explicit):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,), devices=jax.devices()[:2])
    w, x = weight(64, 32), weight(4, 64, seed=1)

    def fn(params, x):
        out = jax.NamedSharding(mesh, jax.P(None, part[1])) if explicit else None
        return jnp.dot(x, params["w"], out_sharding=out)

    want, _ = jq.ptq(lambda p, x: x @ p["w"], {"w": w}, jq.nf4(16, double=True), x)
    want = jq.quantized(lambda p, x: x @ p["w"])(want, x)
    with jax.set_mesh(mesh):
        held = {"w": jax.device_put(w, jax.NamedSharding(mesh, jax.P(*part)))}
        x = jax.device_put(x, jax.NamedSharding(mesh, jax.P()))
        qparams, _ = jq.ptq(fn, held, jq.nf4(16, double=True), x)
        assert qparams["w"].scale.dtype == jnp.uint8
        got = jax.jit(jq.quantized(fn))(qparams, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
