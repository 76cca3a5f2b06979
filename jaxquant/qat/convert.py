"""`convert`: trained float params to quantized params."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxquant.encoders import Encoder, Info, measure
from jaxquant.interpret.sites import Sites, path_str
from jaxquant.params import check_finite, encode_leaf
from jaxquant.params.placement import automatic
from jaxquant.params.plan import Plan, identity
from jaxquant.ptq.fuse import with_offsets
from jaxquant.qat.leaves import encoded, with_grid
from jaxquant.qat.schedule import Schedule
from jaxquant.qat.state import QuantState, kinds_of, require_same
from jaxquant.qtensor import QSpec, QTensor, is_qtensor
from jaxquant.recipe import Recipe, RecipeLike, as_recipe
from jaxquant.report import shown


def convert(
    params: Any,
    quant_state: QuantState,
    recipe: RecipeLike,
    *,
    schedule: Schedule | None = None,
) -> Any:
    """Converts float params trained with `fake_quantized(fn)` to params for `quantized(fn)`.

    Codes, scales, zero points and codebooks are those that training computes with this state, so
    that `quantized(fn)` and `fake_quantized(fn, recipe)` give the same result. With a schedule,
    this holds from its last phase on.

    Args:
      params: the trained float params.
      quant_state: their training state.
      recipe: their training recipe.
      schedule: the schedule of training, to check that its last phase has begun.

    Returns:
      The params with `QTensor`s for the leaves that the recipe quantizes.

    Raises:
      ValueError: the state was made for another recipe or other params; a param or a learned array
        is not finite; the last phase of the schedule has not begun.

    >>> import jax, jax.numpy as jnp, jaxquant as jq
    >>> fn, recipe = lambda p, x: x @ p["w"], jq.w8a8()
    >>> params, x = {"w": jax.random.normal(jax.random.key(0), (64, 8))}, jnp.ones((2, 64))
    >>> state = jq.init_quant_state(fn, params, recipe, x)
    >>> trained, state = jq.fake_quantized(fn, recipe)(params, x, quant_state=state)
    >>> served = jq.quantized(fn)(jq.convert(params, state, recipe), x)
    >>> bool((trained == served).all())
    True
    """
    where = "convert"
    chosen = as_recipe(recipe, where, params)
    flat, tree = jax.tree.flatten_with_path(params, is_leaf=is_qtensor)
    leaves = [(path_str(path), leaf) for path, leaf in flat]
    for path, leaf in leaves:
        if is_qtensor(leaf):
            raise ValueError(f"{where}: {shown(path)}: expected float params, got {leaf!r}")
    require_same(quant_state, chosen, kinds_of(leaves), where)
    _check_phase(quant_state, chosen, schedule, where)
    plans = {plan.path: plan for plan in quant_state.layout.plans}
    check_finite([(p, x) for p, x in leaves if jnp.issubdtype(jnp.result_type(x), jnp.floating)])
    _check_learned(quant_state, where)

    done: dict[Any, QTensor] = {}
    out = []
    for path, leaf in leaves:
        plan = plans.get(path)
        if plan is None or plan.spec is None:
            out.append(leaf)
            continue
        shared = (identity(path, leaf), path if _own(quant_state, path) else None)
        if shared not in done:
            q = encode_leaf(leaf, plan, _AsTrained(plan, chosen, quant_state), None).q
            done[shared] = with_grid(q, plan, quant_state)
        out.append(done[shared])
    qparams = jax.tree.unflatten(tree, out)
    sites = {site.key: site for plan in quant_state.layout.plans for site in plan.sites}
    return with_offsets(qparams, Sites(tuple(sites.values()), {}, {}))


def _check_phase(state: QuantState, recipe: Recipe, schedule: Schedule | None, where: str) -> None:
    if schedule is None or isinstance(state.step, jax.core.Tracer):
        return
    last = schedule.phases(recipe)[-1].start
    if int(state.step) < last:
        raise ValueError(
            f"{where}: at step {int(state.step)} the schedule does not yet round as the recipe "
            f"says; its last phase begins at step {last}"
        )


def _own(state: QuantState, path: str) -> bool:
    """Whether the state has values for this leaf, which a leaf tied to it lacks."""
    learned = (*state.learned.values(), state.constants)
    return bool(state.ranges) or any(path in arrays for arrays in learned)


def _check_learned(state: QuantState, where: str) -> None:
    for path, leaf in jax.tree.leaves_with_path(state.learned):
        if not isinstance(leaf, jax.core.Tracer) and not np.isfinite(np.asarray(leaf)).all():
            raise ValueError(
                f"{where}: {path_str(path)}: the learned array is not finite; take the state of an "
                "earlier step"
            )


@dataclasses.dataclass(frozen=True)
class _AsTrained(Encoder):
    """The encoder of one leaf: codes as in training."""

    plan: Plan
    recipe: Recipe
    state: QuantState

    def __call__(
        self,
        w: Array,
        spec: QSpec,
        *,
        key: Array | None = None,
        storage_last_axes: tuple[int, ...] = (),
        batch_axes: int = 0,
        stats: Any = None,
    ) -> tuple[QTensor, Info]:
        """Encodes `w` by the plan; the other arguments are ignored."""
        with automatic(self.state) as state:
            q = encoded(w, self.plan, self.recipe, state)
        return q, measure(w, q)
