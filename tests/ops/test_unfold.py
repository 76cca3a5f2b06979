"""Rows that a weight meets: rows times the weight as a matrix must be the contraction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant.encoders import to_matrix
from jaxquant.interpret.record import dimensions
from jaxquant.ops import unfold
from tests.arrays import array


def normal(*shape, seed=0):
    return array(np.random.default_rng(seed).standard_normal(shape))


def product(fn, x, w, weight="rhs", rest=()):
    """`rows @ W` of the first contraction in `fn(x, w)`, and the result itself."""
    eqns = jax.make_jaxpr(fn)(x, w).jaxpr.eqns
    names = ("dot_general", "conv_general_dilated", "ragged_dot_general")
    (eqn,) = (e for e in eqns if e.primitive.name in names)
    side = "lhs" if weight == "rhs" else "rhs"
    rows = unfold(eqn.primitive.name, eqn.params, side, x, w.shape, rest)
    contracted, batched = dimensions(eqn, weight)
    matrix = to_matrix(w, tuple(contracted), tuple(batched))
    return jnp.matmul(rows, matrix, precision="highest"), rows


DOTS = {
    "dense": ((5, 6), (6, 3), (((1,), (0,)), ((), ()))),
    "tokens": ((2, 5, 6), (6, 3), (((2,), (0,)), ((), ()))),
    "attention output": ((2, 5, 4, 3), (4, 3, 7), (((2, 3), (0, 1)), ((), ()))),
    "axes in another order": ((2, 3, 5, 4), (4, 3, 7), (((1, 3), (1, 0)), ((), ()))),
    "experts": ((2, 5, 6), (2, 6, 3), (((2,), (1,)), ((0,), (0,)))),
    "two batch axes": ((5, 2, 6, 4), (4, 2, 6, 3), (((2,), (2,)), ((1, 3), (1, 0)))),
    "vector": ((6,), (6, 3), (((0,), (0,)), ((), ()))),
}


@pytest.mark.parametrize("name", DOTS)
@pytest.mark.parametrize("weight", ["rhs", "lhs"])
def test_dot_general(name, weight):
    x_shape, w_shape, (contract, batch) = DOTS[name]
    x, w = normal(*x_shape), normal(*w_shape, seed=1)

    def fn(x, w):
        if weight == "rhs":
            return lax.dot_general(x, w, (contract, batch), precision="highest")
        return lax.dot_general(w, x, (contract[::-1], batch[::-1]), precision="highest")

    got, rows = product(fn, x, w, weight)
    wanted, lead = fn(x, w), len(batch[0])
    if weight == "lhs":  # free axes of the weight come first
        free = w.ndim - lead - len(contract[0])
        wanted = jnp.moveaxis(wanted, range(lead, lead + free), range(-free, 0))
    np.testing.assert_allclose(got.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-5)
    assert rows.dtype == x.dtype and rows.ndim == lead + 2


@pytest.mark.parametrize(
    ("numbers", "x_shape", "w_shape", "options"),
    [
        (("NHWC", "HWIO", "NHWC"), (2, 7, 6, 3), (3, 2, 3, 4), {"padding": "SAME"}),
        (
            ("NHWC", "HWIO", "NHWC"),
            (2, 9, 8, 3),
            (3, 2, 3, 4),
            {"padding": ((1, 0), (2, 1)), "window_strides": (2, 3), "rhs_dilation": (2, 1)},
        ),
        (("NCHW", "OIHW", "NCHW"), (2, 3, 7, 6), (4, 3, 3, 2), {"padding": "VALID"}),
        (("NHWC", "OHWI", "NCHW"), (2, 7, 6, 3), (4, 3, 2, 3), {"padding": "SAME"}),
        (
            ("NWC", "WIO", "NWC"),
            (2, 7, 3),
            (4, 3, 5),
            {"padding": ((2, 1),), "lhs_dilation": (2,)},
        ),
    ],
)
def test_convolutions(numbers, x_shape, w_shape, options):
    x, w = normal(*x_shape), normal(*w_shape, seed=1)
    options = {"window_strides": (1,) * (x.ndim - 2), **options}
    fn = lambda x, w: lax.conv_general_dilated(
        x, w, dimension_numbers=numbers, precision="highest", **options
    )
    got, _ = product(fn, x, w)
    wanted = jnp.moveaxis(fn(x, w), numbers[2].index("C"), -1)
    np.testing.assert_allclose(got.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-5)


def test_ragged():
    x, w = normal(9, 6), normal(3, 6, 4, seed=1)
    sizes = jnp.array([2, 0, 5])  # the last two rows belong to none
    fn = lambda x, w: lax.ragged_dot(x, w, sizes, precision="highest")
    got, rows = product(fn, x, w, rest=(sizes,))
    assert rows.shape == (3, 9, 6)
    np.testing.assert_allclose(got.sum(0)[:7], fn(x, w)[:7], rtol=1e-5, atol=1e-5)
    assert not np.asarray(rows[1]).any() and not np.asarray(rows[:, 7:]).any()
    np.testing.assert_array_equal(rows[2, 2:7], x[2:7])


def test_refusals():
    x, w = normal(2, 7, 6, 4), normal(3, 3, 2, 8, seed=1)
    for count in ("feature_group_count", "batch_group_count"):
        kernel = w if count == "feature_group_count" else normal(3, 3, 4, 8)
        fn = functools.partial(
            lax.conv_general_dilated,
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            **{count: 2},
        )
        with pytest.raises(ValueError, match=f"{count}=2"):
            product(fn, x, kernel)
    plain = lambda w, x: lax.conv_general_dilated(
        w, x, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    with pytest.raises(ValueError, match="whose kernel is the activation"):
        product(lambda x, w: plain(w, x), normal(3, 3, 4, 8), x, weight="lhs")
    with pytest.raises(ValueError, match="expected a contraction"):
        unfold("add", {}, "lhs", x, w.shape)
    with pytest.raises(ValueError, match="'lhs' or 'rhs'"):
        unfold("dot_general", {}, "left", x, w.shape)
    fn = lambda x, w: lax.ragged_dot(x, w, jnp.array([2, 3, 4]))
    with pytest.raises(ValueError, match="the sizes of the groups"):
        product(fn, normal(9, 6), normal(3, 6, 4))
    numbers = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    with pytest.raises(ValueError, match="one matrix for each group"):
        unfold(
            "ragged_dot_general",
            {"ragged_dot_dimension_numbers": numbers},
            "lhs",
            normal(9, 6),
            (9, 4),
            (jnp.array([4, 5]),),
        )
