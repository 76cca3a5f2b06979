"""Adam, AdamW, Lion and momentum of optax, with 8-bit state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax
from jax.typing import ArrayLike

from jaxquant.optim.quantize_state import quantize_state
from jaxquant.optim.spec import StateSpec

Mask = Any | Callable[[Any], Any] | None


def adam8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    block_size: int = 256,
    min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """`optax.adam` with both moments in 8 bits: the first signed, the second unsigned.

    `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`, and the step
    `-lr m' / (sqrt(v' + eps_root) + eps)` with `m' = m / (1 - b1^t)` and `v' = v / (1 - b2^t)`,
    computed before `m` and `v` are encoded. Arguments as for `optax.adam`; `block_size` and
    `min_size` as for `StateSpec`, and `static_args` for `optax.inject_hyperparams`. `mu_dtype`
    applies to arrays that stay float.

    Source: Kingma and Ba, "Adam" (2015); Dettmers et al., "8-bit Optimizers via Block-wise
    Quantization" (2021).

    >>> import jax.numpy as jnp
    >>> tx = adam8bit(0.1)
    >>> params = {"w": jnp.ones((64, 64))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> round(float(updates["w"][0, 0]), 4), state[0].mu["w"]
    (-0.1, Blocks(signed 8-bit[64, 64], tile=[4, 64]))
    """
    moments = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    return optax.chain(
        _held(moments, block_size, min_size), optax.scale_by_learning_rate(learning_rate)
    )


def adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Mask = None,
    *,
    nesterov: bool = False,
    block_size: int = 256,
    min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """`optax.adamw` with both moments in 8 bits; see `adam8bit`.

    `w = w - lr (step + weight_decay w)`, the decay only where `mask` is true. The decay does not
    depend on the gradient: a leaf whose gradient is not finite still decays.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019).
    """
    moments = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    return optax.chain(
        _held(moments, block_size, min_size),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def lion8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Mask = None,
    *,
    block_size: int = 256,
    min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """`optax.lion` with its momentum in 8 bits, signed.

    `w = w - lr (sign(b1 m + (1 - b1) g) + weight_decay w)`, then `m = b2 m + (1 - b2) g`.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms" (2023).
    """
    return optax.chain(
        _held(optax.scale_by_lion(b1, b2, mu_dtype), block_size, min_size),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def momentum8bit(
    learning_rate: optax.ScalarOrSchedule,
    momentum: ArrayLike = 0.9,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    *,
    block_size: int = 256,
    min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """`optax.sgd` with its momentum in 8 bits, signed.

    `m = momentum m + g`, `w = w - lr m`; with `nesterov` the step is `g + momentum m`.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning"
    (2013).
    """
    trace = optax.trace(momentum, nesterov, accumulator_dtype)
    return optax.chain(
        _held(trace, block_size, min_size), optax.scale_by_learning_rate(learning_rate)
    )


def _held(
    inner: optax.GradientTransformation, block_size: int, min_size: int
) -> optax.GradientTransformationExtraArgs:
    return quantize_state(inner, StateSpec(block_size, min_size), leafwise=True)
