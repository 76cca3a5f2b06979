"""`fake_quant_params`: rounds weights only, as a transform of a pytree."""

from __future__ import annotations

from typing import Any

import jax

from jaxquant.interpret.sites import Sites, path_str
from jaxquant.params.plan import make_plans
from jaxquant.qat.leaves import at_bits, weight_estimator
from jaxquant.qat.state import QuantState, kinds_of, require_same
from jaxquant.qtensor import is_qtensor
from jaxquant.recipe import RecipeLike, as_recipe
from jaxquant.report import shown


def fake_quant_params(
    params: Any,
    recipe: RecipeLike,
    *,
    sites: Sites | None = None,
    quant_state: QuantState | None = None,
) -> Any:
    """The params tree with rounded weights, still float and trainable.

    `w' = S (round(w / S + Z) - Z)`, gradients by the estimators of the recipe's rules. Activations
    are not rounded, even if the rules have specs for them; see `fake_quantized` for both.

    Args:
      params: float params.
      recipe: the rules.
      sites: the result of `jaxquant.trace`; not needed if rules name their axes.
      quant_state: for estimators that learn.

    Raises:
      ValueError: as `jaxquant.quantize_params`; an estimator that learns, without a state.

    >>> import jax, jax.numpy as jnp, jaxquant as jq
    >>> rule = jq.Rule("w", weights=jq.QSpec("int2", jq.PerTensor(), range="qmax"))
    >>> loss = lambda p: (fake_quant_params(p, rule)["w"] * jnp.arange(3.0)).sum()
    >>> params = {"w": jnp.array([-1.0, 0.4, 0.8])}
    >>> float(loss(params)), jax.grad(loss)(params)["w"].tolist()
    (2.0, [0.0, 1.0, 2.0])
    """
    where = "fake_quant_params"
    chosen = as_recipe(recipe, where, params)
    flat, tree = jax.tree.flatten_with_path(params, is_leaf=is_qtensor)
    leaves = [(path_str(path), leaf) for path, leaf in flat]
    for path, leaf in leaves:
        if is_qtensor(leaf):
            raise ValueError(f"{where}: {shown(path)}: expected float params, got {leaf!r}")
    if quant_state is not None:
        require_same(quant_state, chosen, kinds_of(leaves), where)
    plans, _ = make_plans(leaves, chosen, sites)
    out = []
    for plan, (path, leaf) in zip(plans, leaves, strict=True):
        if plan.spec is None:
            out.append(leaf)
            continue
        estimator = weight_estimator(plan)
        if estimator.learns and (quant_state is None or not quant_state.of_weight(path)):
            raise ValueError(
                f"{where}: {shown(path)}: {estimator!r} learns; pass quant_state= from "
                "jaxquant.init_quant_state"
            )
        spec, learned = at_bits(plan, quant_state, 0)
        q = estimator.encode(
            leaf,
            learned,
            spec,
            storage_last_axes=plan.storage_last_axes,
            batch_axes=plan.batch_axes,
        )
        out.append(estimator.values(leaf, learned, q))
    return jax.tree.unflatten(tree, out)
