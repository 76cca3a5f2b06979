"""Folding BatchNorm on arrays: the function stays, the identity that is left is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.rewrites.batchnorm import BatchNormSite, fold, fold_site


def arrays(rng, shape, axes, var=None):
    channels = tuple(shape[a] for a in axes)

    def draw():
        return rng.normal(size=channels).astype(np.float32)

    return {
        "kernel": rng.normal(size=shape).astype(np.float32),
        "gamma": draw(),  # of both signs
        "beta": draw(),
        "mean": 3 * draw(),
        "var": np.exp(2 * draw()) if var is None else np.full(channels, var, np.float32),
        "bias": draw(),
    }


@pytest.mark.parametrize(
    ("shape", "axes", "missing", "var"),
    [
        ((5, 4), (1,), (), None),
        ((4, 5), (0,), ("bias",), None),
        ((3, 3, 2, 6), (3,), ("gamma",), None),
        ((3, 3, 2, 6), (-1,), ("beta",), 1e-12),
        ((2, 5, 3), (0, 2), ("gamma", "beta", "bias"), None),
        ((5, 3, 2), (2, 0), (), 0.0),
    ],
)
def test_fold_is_the_equation(shape, axes, missing, var):
    eps = 1e-5
    given = arrays(np.random.default_rng(0), shape, axes, var)
    given |= dict.fromkeys(missing)
    new = fold(**jax.tree.map(jnp.asarray, given), eps=eps, channel_axis=axes)

    # the scale and shift of the contraction's output, per channel, in float64
    def scale_shift(p):
        part = {k: None if v is None else np.asarray(v, np.float64) for k, v in p.items()}
        a = 1 / np.sqrt(part["var"] + eps)
        a = a if part["gamma"] is None else a * part["gamma"]
        bias = 0 if part["bias"] is None else part["bias"]
        return a, (bias - part["mean"]) * a + (0 if part["beta"] is None else part["beta"])

    def along(a):
        order = np.argsort([x % len(shape) for x in axes])
        full = [shape[i] if i in [x % len(shape) for x in axes] else 1 for i in range(len(shape))]
        return a.transpose(order).reshape(full)

    a, shift = scale_shift(given)
    b, kept = scale_shift(new._asdict())
    np.testing.assert_allclose(b, 1, rtol=1e-7)
    np.testing.assert_allclose(new.kernel, given["kernel"] * along(a), rtol=1e-6)
    np.testing.assert_allclose(kept, shift, rtol=1e-5, atol=1e-6 * np.abs(shift).max())
    for name, array in given.items():
        found = getattr(new, name)
        assert (found is None) == (array is None)
        if array is not None:
            assert found.shape == array.shape and found.dtype == array.dtype
    assert new.bias is None or not np.any(new.bias)


def test_what_is_left_scales_by_exactly_one():
    eps = np.concatenate([10.0 ** np.arange(-12, 0), [0.0, 0.3, 0.7, 1e-5, 1e-3, 3e-8, 2.5e-7]])
    left = [fold(jnp.ones((1, 1)), None, None, jnp.zeros(1), jnp.ones(1), e, 1).var[0] for e in eps]
    got = jax.jit(lambda v, e: jax.lax.rsqrt(v + e))(jnp.stack(left), jnp.float32(eps))
    assert got.tolist() == [1.0] * len(eps)


def test_mistakes_are_named():
    kernel, c = jnp.ones((2, 3)), jnp.ones(3)
    with pytest.raises(ValueError, match=r"expected gamma of shape \[3\].*got \[2\]"):
        fold(kernel, jnp.ones(2), None, c, c, 1e-5, 1)
    for eps in (1e-5, 1.0):  # below zero, and zero itself
        with pytest.raises(ValueError, match=r"var \+ eps > 0"):
            fold(kernel, None, None, c, -c, eps, 1)
    site = BatchNormSite("w", (1,), "bn/mean", "bn/var", 1e-5)
    with pytest.raises(ValueError, match="no leaf 'bn/mean'"):
        fold_site({"w": kernel, "bn/var": c}, site)
    with pytest.raises(ValueError, match=r"bn/mean has shape \[2\], expected \[3\]"):
        fold_site({"w": kernel, "bn/var": c, "bn/mean": jnp.ones(2)}, site)
    with pytest.raises(ValueError, match=r"bn/var: .*var \+ eps > 0"):
        fold_site({"w": kernel, "bn/var": -c, "bn/mean": c}, site)
