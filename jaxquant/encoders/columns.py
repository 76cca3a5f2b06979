"""GPTQ's recursion over the columns of a layer, blocked, as nested loops.

With `H = M M^T`, `M` upper triangular, `W` the weights `[K, N]`, `Q` the rounded weights and
`D = W - Q`, the output error is `tr(D^T H D) = |M^T D|^2`. Row `j` of `M^T D` depends on
`D_1 .. D_j` alone, so rows are rounded one after another, and each compensates for the errors of
earlier rows:

    w'_j = W_j + (sum_{i<j} M_ij D_i) / M_jj,    Q_j = round(w'_j),    e_j = M_jj (w'_j - Q_j)

and `|M^T D|^2 = sum_j |e_j|^2`. This is GPTQ: `U = M^-1` is its Cholesky factor of `H^-1`, `U_jj =
1 / M_jj`, and its updates `W_j -= U_ij e_i` result in `w'_j`. With `M`, no matrix is inverted, and
a block reads the errors of earlier blocks instead of updating the weights of later ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxquant.numerics import Format, decode
from jaxquant.qtensor import scaled_codes

Grid = tuple[Array, Array | None]
"""Scales and zero points, float32 `[rows, N]` or `[1, N]`, shared by all rows."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The nested blocks of rows.

    Attributes:
      levels: sizes of the nested blocks, each a multiple of the next.
      group: index of the level whose blocks are groups, each with a grid chosen at its start;
        `None` if grids are fixed in advance.
    """

    levels: tuple[int, ...]
    group: int | None = None


def rounded(w: Array, grid: Grid, fmt: Format) -> Array:
    """The nearest values that a grid can represent, `S (q - Z)`."""
    scale, zero = grid
    values = decode(scaled_codes(w, scale, zero, fmt), fmt, jnp.float32)
    return scale * (values if zero is None else values - zero)


def round_columns(
    w: Array,
    factor: Array,
    fmt: Format,
    plan: Plan,
    grid: Grid | None,
    choose: Callable[[Array, Array], Grid],
) -> tuple[Array, Grid, Array]:
    """Rounds the rows of `W` in order; see the module docstring.

    Args:
      w: `[K, N]` float32; `K` is a multiple of the first level.
      factor: `M`, `[K, K]` upper triangular.
      fmt: the format of the codes.
      plan: block sizes.
      grid: the grids of all rows, if `plan.group` is `None`.
      choose: `(updated rows [group, N], first row) -> grid [1, N]`, if it is not.

    Returns:
      `D = W - Q` `[K, N]`; the grids, `[groups, N]` if chosen by `choose`; `sum_j |e_j|^2`.
    """

    def rows(m: Array, w: Array, past: Array, grid: Grid) -> tuple[Array, Array]:
        """The innermost block: one row after another."""

        def row(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            d, loss = carry
            column = lax.dynamic_slice_in_dim(m, j, 1, 1)  # [n, 1]
            pivot = lax.dynamic_slice_in_dim(column, j, 1, 0)  # [1, 1]
            feedback = _row(past, j) + _product(column, d)
            now = _row(w, j)
            target = now + feedback / pivot
            q = rounded(target, _grid_rows(grid, j, 1, m.shape[0]), fmt)
            loss = loss + jnp.square(pivot * (target - q))
            return lax.dynamic_update_slice_in_dim(d, now - q, j, 0), loss

        start = jnp.zeros_like(w), jnp.zeros_like(w[:1])
        return lax.fori_loop(0, m.shape[0], row, start)

    def walk(
        depth: int, m: Array, w: Array, past: Array | None, grid: Grid | None, first: Array
    ) -> tuple[Array, Grid | None, Array]:
        """`D` of some rows; `past` is the contribution of earlier errors to `M^T D`."""
        size = plan.levels[depth]
        total, columns = w.shape

        def one(i: Array, carry: tuple[Array, Grid | None, Array]) -> tuple:
            d, grids, loss = carry
            at = i * size
            strip = lax.dynamic_slice_in_dim(m, at, size, 1)  # [total, size]
            if past is None:
                feedback = before(strip, d, i, size)
            else:  # few rows: one product over all, rows from `at` on are zero
                feedback = _product(strip, d) + lax.dynamic_slice_in_dim(past, at, size, 0)
            corner = lax.dynamic_slice_in_dim(strip, at, size, 0)
            weights = lax.dynamic_slice_in_dim(w, at, size, 0)
            if plan.group == depth:
                # the updated weights: w + U_gg^T feedback, U_gg the inverse of the corner
                update = lax.linalg.triangular_solve(
                    corner, feedback, left_side=True, lower=False, transpose_a=True
                )
                inner: Grid | None = choose(weights + update, first + at)
            else:
                inner = None if grid is None else _grid_rows(grid, at, size, total)
            below: Grid | None = None
            if depth + 1 < len(plan.levels):
                new, below, cost = walk(depth + 1, corner, weights, feedback, inner, first + at)
            else:
                assert inner is not None
                new, cost = rows(corner, weights, feedback, inner)
            if grids is not None:
                chosen = inner if plan.group == depth else below
                assert chosen is not None
                count = size // plan.levels[plan.group or 0]
                grids = _put(grids, chosen, i * count)
            return lax.dynamic_update_slice_in_dim(d, new, at, 0), grids, loss + cost

        grids = None
        if plan.group is not None and plan.group >= depth:
            grids = _blank(choose, total // plan.levels[plan.group], w, plan.levels[plan.group])
        start = jnp.zeros_like(w), grids, jnp.zeros((1, columns), jnp.float32)
        return lax.fori_loop(0, total // size, one, start)

    d, grids, loss = walk(0, factor, w, None, grid, jnp.int32(0))
    out = grids if plan.group is not None else grid
    assert out is not None
    return d, out, jnp.sum(loss)


def before(columns: Array, d: Array, i: Array, size: int) -> Array:
    """`sum_r m_r^T d_r` over the rows before block `i`: half of all rows on average.

    Args:
      columns: `[total, size]`.
      d: `[total, N]`.
      i: the block, `[]`.
      size: rows per block.
    """

    def add(j: Array, total: Array) -> Array:
        m, rows = (lax.dynamic_slice_in_dim(a, j * size, size, 0) for a in (columns, d))
        return total + _product(m, rows)

    return lax.fori_loop(0, i, add, jnp.zeros((columns.shape[1], d.shape[1]), jnp.float32))


def energy_in_blocks(hessian: Array, w: Array, size: int) -> Array:
    """`tr(W^T H W)` with half the products: `H` is symmetric, `[K, K]`, `K` a multiple of `size`.

    >>> energy_in_blocks(jnp.array([[2.0, 1.0], [1.0, 3.0]]), jnp.ones((2, 1)), 1).tolist()
    7.0
    """

    def add(i: Array, total: Array) -> Array:
        columns = lax.dynamic_slice_in_dim(hessian, i * size, size, 1)
        corner = lax.dynamic_slice_in_dim(columns, i * size, size, 0)
        rows = lax.dynamic_slice_in_dim(w, i * size, size, 0)
        feedback = 2 * before(columns, w, i, size) + _product(corner, rows)
        return total + jnp.sum(rows * feedback)

    return lax.fori_loop(0, hessian.shape[0] // size, add, jnp.float32(0))


def _product(m: Array, d: Array) -> Array:
    """`m^T d`."""
    contracted = (((0,), (0,)), ((), ()))
    return lax.dot_general(m, d, contracted, precision=lax.Precision.HIGHEST)


def _row(a: Array, j: Array) -> Array:
    return lax.dynamic_slice_in_dim(a, j, 1, 0)


def _grid_rows(grid: Grid, at: Array, size: int, total: int) -> Grid:
    """`size` rows of a grid from row `at`; a grid shared by all rows is returned unchanged."""

    def part(a: Array | None) -> Array | None:
        if a is None or a.shape[0] != total:
            return a
        return lax.dynamic_slice_in_dim(a, at, size, 0)

    scale = part(grid[0])
    assert scale is not None
    return scale, part(grid[1])


def _blank(choose: Callable[[Array, Array], Grid], count: int, w: Array, size: int) -> Grid:
    """Zeros for the grids of `count` groups."""
    shape = jax.ShapeDtypeStruct((size, w.shape[1]), jnp.float32)
    scale, zero = jax.eval_shape(choose, shape, jax.ShapeDtypeStruct((), jnp.int32))

    def zeros(a: jax.ShapeDtypeStruct) -> Array:
        return jnp.zeros((count, a.shape[1]), a.dtype)

    return zeros(scale), None if zero is None else zeros(zero)


def _put(grids: Grid, new: Grid, at: Array) -> Grid:
    scale = lax.dynamic_update_slice_in_dim(grids[0], new[0], at, 0)
    if grids[1] is None or new[1] is None:
        return scale, None
    return scale, lax.dynamic_update_slice_in_dim(grids[1], new[1], at, 0)
