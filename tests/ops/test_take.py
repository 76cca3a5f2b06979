import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant import PerChannel, PerGroup, PerTensor, QSpec, quantize
from jaxquant.ops import gather
from jaxquant.qtensor import dequantize
from tests.arrays import normal

ROWS = lax.GatherDimensionNumbers((2,), (0,), (0,))
SPECS = {
    "row": QSpec("int8", PerChannel(0)),
    "tensor": QSpec("int8", PerTensor()),
    "group": QSpec("int4", PerGroup(8, 1)),
    "uneven group": QSpec("int4", PerGroup(9, 1)),
    "asymmetric": QSpec("uint8", PerChannel(0), symmetric=False),
    "nvfp4": QSpec("nvfp4", PerGroup(8, 1)),
    "float8": QSpec("float8_e4m3fn", PerChannel((0, 1))),
}


def take(q, indices, numbers=ROWS, sizes=None, **rest):
    sizes = sizes or (1, q.shape[1])
    return gather(q, indices, dimension_numbers=numbers, slice_sizes=sizes, **rest)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_equals_rows_of_the_dequantized(name, mode):
    q = quantize(normal(0, 30, 20), SPECS[name])
    indices = jnp.array([[0, 29, 7], [-1, 30, 100]])[..., None]
    got = jax.jit(lambda q, i: take(q, i, mode=mode))(q, indices)
    expected = lax.gather(dequantize(q), indices, ROWS, (1, 20), mode=mode)
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)


def test_fill_value_and_other_places_of_the_slice():
    q = quantize(normal(0, 30, 20), SPECS["row"])
    indices = jnp.array([[3, 40]])[..., None]
    got = take(q, indices, mode="fill", fill_value=7.0)
    np.testing.assert_array_equal(got[0, 1], 7.0)
    first = lax.GatherDimensionNumbers((0,), (0,), (0,))
    np.testing.assert_array_equal(
        take(q, indices, first, mode="clip"),
        lax.gather(dequantize(q), indices, first, (1, 20), mode="clip"),
    )


def test_stacked_tables_and_several_indices():
    w = normal(0, 3, 10, 4, 5)
    q = quantize(w, QSpec("int8", PerChannel((0, 1))), batch_axes=1)
    both = lax.GatherDimensionNumbers((1,), (0, 1, 2), (2, 0, 1))
    indices = jnp.array([[3, 2, 9], [0, 0, 0]])
    np.testing.assert_array_equal(
        take(q, indices, both, (1, 1, 1, 5)),
        lax.gather(dequantize(q), indices, both, (1, 1, 1, 5)),
    )
    inner = lax.GatherDimensionNumbers((0, 2, 3), (1,), (1,))
    np.testing.assert_array_equal(
        take(q, indices[:, :1], inner, (3, 1, 4, 5)),
        lax.gather(dequantize(q), indices[:, :1], inner, (3, 1, 4, 5)),
    )


def test_under_vmap():
    q = quantize(normal(0, 3, 10, 4), QSpec("nvfp4", PerGroup(4, 1)), batch_axes=1)
    indices = jnp.array([[1], [9]])[..., None]
    got = jax.vmap(take, in_axes=(0, None))(q, indices)
    np.testing.assert_array_equal(got, dequantize(q)[:, indices[..., 0]])


def test_other_kinds_are_left_to_the_caller():
    table = normal(0, 16, 8)
    slices = lax.GatherDimensionNumbers((1, 2), (), (0,))
    one = jnp.array([[2]])
    row = quantize(table, SPECS["row"])
    assert take(row, one, slices, (2, 8)) is None
    assert take(row, one, sizes=(1, 4)) is None
    numbers = lax.GatherDimensionNumbers((1,), (0,), (0,))
    assert take(quantize(table, QSpec("int4", PerGroup(8, 0))), one, numbers) is None
    columns = lax.GatherDimensionNumbers((1,), (1,), (1,))
    assert take(quantize(table, QSpec("int4", PerChannel(0))), one, columns, (16, 1)) is None


def test_only_the_rows_taken_are_dequantized():
    q = quantize(normal(0, 5000, 16), SPECS["row"])
    text = jax.jit(take).lower(q, jnp.array([[1]])[..., None]).as_text()
    assert "tensor<5000x16xi8>" in text
    assert "5000x16xf32" not in text
