"""One row for each primitive: none is forgotten, and every walk has its rules for them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import primitives as known

import jaxquant as jq
from jaxquant.interpret import control_flow, flatten, layout, primitives
from jaxquant.interpret.values import known_nonneg, nonneg
from jaxquant.rewrites import forms, layout_rules

# Primitives that compute with values in ways of their own: nothing is known of their results, and
# quantized operands are dequantized. One that JAX adds has to be put here or given a row.
NO_ROW = """
    after_all all_gather all_to_all approx_top_k axis_index bitcast_convert_type call cholesky
    create_token cumlogsumexp custom_lin custom_linear_solve device_put eig eigh empty2 fft get
    hessenberg householder_product lu pmax pmin polynomial ppermute psum qr ragged_all_to_all
    random_bits random_fold_in random_gamma random_seed random_split reduce reduce_and reduce_or
    reduce_window reduce_xor rng_bit_generator rng_uniform scatter scatter-add scatter-max
    scatter-min scatter-mul schur select_and_gather_add select_and_scatter select_and_scatter_add
    svd swap threefry2x32 top_k triangular_solve tridiagonal tridiagonal_solve
"""
# Moves that a walk does not follow, so that its own way of knowing nothing applies.
NOT_FOLLOWED = {
    "layout": {"none", "round", "concatenate", "stack", "pad", "reduce", "window"},
    "fold.layout_rules": {"barrier", "gather", "stack"},
    "fold.forms": {
        *("barrier", "round", "slice", "dynamic_slice", "split", "gather", "concatenate"),
        *("stack", "pad", "reduce", "window"),
    },
}


def test_every_primitive_has_a_row_or_is_listed():
    names = {getattr(known, name).name for name in dir(known) if name.endswith("_p")}
    assert names - primitives.TABLE.keys() <= set(NO_ROW.split())
    assert not primitives.TABLE.keys() & set(NO_ROW.split())


@pytest.mark.parametrize(
    ("walk", "rules"),
    [
        ("layout", layout._RULES),
        ("fold.layout_rules", layout_rules.MOVING),
        ("fold.forms", forms._LAYOUT),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_every_move_is_followed_or_listed(walk, rules):
    table = primitives.TABLE
    followed = {row.move for name, row in table.items() if row.move and name in rules}
    moves = {row.move for row in table.values() if row.move}
    assert moves - followed == NOT_FOLLOWED[walk]


def test_what_is_entered_has_a_rule():
    entered = {n for n, row in primitives.TABLE.items() if row.kind in ("call", "control")}
    assert control_flow.RULES.keys() == entered
    assert flatten.Flattener.rules.keys() <= entered


ONE = jnp.linspace(-2.0, 3.0, 7, dtype=jnp.float32)
INNER = jax.jit(lambda x: x * x)


@pytest.mark.parametrize(
    ("fn", "known"),
    [
        (lambda x: jnp.exp(x), True),
        (lambda x: x * 2.0, False),
        (lambda x: jnp.abs(x) * 2.0, True),
        (lambda x: jnp.abs(x) * -2.0, False),
        (lambda x: jax.lax.max(x, 0.0), True),
        (lambda x: jax.lax.min(x, 1.0), False),
        (lambda x: jax.lax.integer_pow(x, 2), True),
        (lambda x: jax.lax.integer_pow(x, 3), False),
        (lambda x: jax.lax.select(x > 0, jnp.abs(x), jnp.exp(x)), True),
        (lambda x: jax.lax.select(x > 0, jnp.abs(x), x), False),
        (lambda x: jnp.abs(x).astype(jnp.int8), False),  # which wraps around
        (lambda x: jnp.abs(x).astype(jnp.bfloat16), True),
        (lambda x: jax.lax.sort(jnp.abs(x)), True),
        (lambda x: jax.lax.concatenate([jnp.abs(x), x], 0), False),
        (lambda x: jax.lax.optimization_barrier((jnp.abs(x), x))[0], True),
        (lambda x: jax.lax.optimization_barrier((jnp.abs(x), x))[1], False),
        (lambda x: jax.lax.cummin(jnp.abs(x)), True),
        (lambda x: INNER(jnp.abs(x)), True),
        (lambda x: jnp.abs(x) - 1.0, False),
    ],
)
def test_signs_are_those_of_values(fn, known):
    jaxpr, signs = jax.make_jaxpr(fn)(ONE).jaxpr, {}
    for eqn in jaxpr.eqns:
        results = nonneg(eqn, [known_nonneg(signs, v) for v in eqn.invars])
        signs.update(zip(eqn.outvars, results, strict=True))
    assert signs[jaxpr.outvars[0]] == known
    if known:
        assert (np.asarray(fn(ONE)) >= 0).all()


@pytest.mark.parametrize("place", [jax.lax.with_sharding_constraint, jax.sharding.reshard])
def test_a_quantized_value_is_placed_and_stays_quantized(place):
    kind = "Explicit" if place is jax.sharding.reshard else "Auto"
    axes = (getattr(jax.sharding.AxisType, kind),)
    mesh = jax.make_mesh((1,), ("x",), axis_types=axes)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh):
        params, x = {"w": jnp.ones((8, 4))}, jnp.ones((2, 8))
        _, report = jq.ptq(lambda p, x: x @ place(p["w"], whole), params, jq.w8a8(), x)
    assert not report.events
