"""Values of sites through control flow, read only: each contraction meets its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxquant.interpret.calls import trace_call
from jaxquant.interpret.evaluate import Interpreter
from jaxquant.interpret.observe import places_of
from jaxquant.interpret.policy import Contraction, Policy
from jaxquant.interpret.slots import SiteValues, Slot
from tests.interpret.programs import normal

D, L = 8, 3
traced: list[str] = []


class Scaled(Policy):
    """Multiplies the result of each contraction by a value of its own."""

    def contract(self, ip: Interpreter, site: Contraction) -> Any:
        traced.append(site.keys[0])
        return super().contract(ip, site) * ip.slots.values[Slot(ip.call_path, "lhs")]


@jax.jit
def helper(x: Any, w: Any) -> Any:
    return jnp.tanh(x @ w)


def test_every_site_reads_its_own_value() -> None:
    mesh = jax.make_mesh((1,), ("b",), (jax.sharding.AxisType.Auto,))
    split = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("b"), P()), out_specs=P("b"))

    def fn(p: Any, x: Any) -> Any:
        x = helper(helper(x, p["a"]), p["b"])
        x = lax.scan(lambda x, w: (jax.checkpoint(helper)(x, w), None), x, p["c"], reverse=True)[0]
        x = lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ p["d"]), x)
        x = lax.scan(lambda x, y: (jnp.tanh((x + y) @ p["e"]), None), x, jnp.ones((2, 1, D)))[0]
        x = lax.cond(x[0, 0] > 0, lambda x: x @ p["f"], lambda x: x @ p["g"], x)
        return split(x, p["h"])

    params = {name: normal(n, D, D) for n, name in enumerate("abdefgh")} | {"c": normal(9, L, D, D)}
    x = normal(10, 4, D)
    call = trace_call(fn, params, (x,), {})
    places = places_of(call)
    assert {p.keys[0]: p.lead for p in places} == {n: (L,) if n == "c" else () for n in params}
    own = {
        p.keys[0]: jnp.linspace(1.1, 1.3, L) if p.lead else 1.0 + n for n, p in enumerate(places)
    }
    values = {p.slot: jnp.asarray(own[p.keys[0]]) for p in places}

    @jax.jit
    def run(leaves: Any, values: Any) -> Any:
        slots = SiteValues(dict(zip((p.slot for p in places), values, strict=True)))
        return call.run(Interpreter(Scaled(), call.param_paths, slots), leaves)

    got = run(call.leaves, list(values.values()))
    # the second call of the helper is the first one's, given another value
    assert traced.count("a") == 1 and "b" not in traced
    weights = {
        k: v * jnp.reshape(own[k], (-1, 1, 1) if k == "c" else ()) for k, v in params.items()
    }
    np.testing.assert_allclose(got, jax.jit(fn)(weights, x), rtol=1e-5)
