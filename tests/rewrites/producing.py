"""What tests of absorbers share: random params, and a check that factors change nothing."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.interpret.calls import trace_call
from jaxquant.rewrites.graph import graph_of
from jaxquant.rewrites.producers import absorbers
from jaxquant.rewrites.rescale import rescale
from tests.arrays import array

# what small functions are called with
X = array(np.random.default_rng(9).normal(size=(5, 6)))


def randomized(params, seed=0):
    rng = np.random.default_rng(seed)

    def draw(leaf):
        x = (
            rng.normal(size=leaf.shape) / max(leaf.shape[-2:][0], 1) ** 0.5
            if leaf.ndim > 1
            else (rng.uniform(0.5, 2.0, leaf.shape))
        )
        return jnp.asarray(x, leaf.dtype)

    return jax.tree.map(draw, params)


def find(fn, params, args, *paths):
    return absorbers(graph_of(trace_call(fn, params, args, {})), paths)


def names(found):
    assert not isinstance(found, str), found
    return {leaf.path: leaf.kind for leaf in found.producers}


def check(fn, params, args, paths, expected, seed=0):
    """The leaves that absorb, and that random factors leave the function as it is."""
    paths = (paths,) if isinstance(paths, str) else tuple(paths)
    found = find(fn, params, args, *paths)
    assert names(found) == expected
    shape = (*found.layers, found.channels)
    c = array(np.exp(np.random.default_rng(seed).normal(size=shape)))
    new, _ = rescale(fn, params, {paths: c}, *args)
    before, after = (np.asarray(jax.jit(fn)(p, *args)) for p in (params, new))
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, a), b in zip(
            jax.tree.leaves_with_path(params), jax.tree.leaves(new), strict=True
        )
        if not np.array_equal(a, b)
    }
    assert changed == {*paths, *expected}
    assert jax.tree.structure(params) == jax.tree.structure(new)
    return found


def drawn(shapes, seed=0):
    return randomized({k: jnp.zeros(v) for k, v in shapes.items()}, seed)
