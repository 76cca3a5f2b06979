"""Folds a BatchNorm into the kernel before it; a shift per channel remains."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Folded(NamedTuple):
    """The arrays that `fold` returns, each of the shape and dtype of the one it replaces.

    Attributes:
      kernel: the kernel, scaled per channel.
      gamma: ones; `None` where there was none.
      beta: the shift; `None` where there was none, then `mean` holds it.
      mean: zeros, or the negative shift.
      var: `1 - eps`, so that `rsqrt(var + eps)` is exactly 1 in its dtype.
      bias: zeros; `None` where there was none.
    """

    kernel: Array
    gamma: Array | None
    beta: Array | None
    mean: Array
    var: Array
    bias: Array | None


def fold(
    kernel: Array,
    gamma: Array | None,
    beta: Array | None,
    mean: Array,
    var: Array,
    eps: float,
    channel_axis: int | tuple[int, ...],
    bias: Array | None = None,
) -> Folded:
    """Moves the scale of a BatchNorm into the kernel whose output it normalises.

    With `a = gamma / sqrt(var + eps)` and `y` the contraction without its bias,

        (y + bias - mean) a + beta = a y + ((bias - mean) a + beta),

    so the kernel is multiplied by `a` along its output channels, and the BatchNorm becomes the
    identity plus the shift in brackets. This shift is in `beta`; the contraction's bias is 0.

    Args:
      kernel: float array, such as `[height, width, in, out]` or `[in, out]`.
      gamma: scale `[channels]`, or `None` for 1.
      beta: shift `[channels]`, or `None` for 0.
      mean: running mean `[channels]`.
      var: running variance `[channels]`.
      eps: added to the variance.
      channel_axis: axis of `kernel` that the channels run along; one for each axis of the
        statistics, in their order, if they have several (layers of a scan).
      bias: bias of the contraction `[channels]`, or `None` for 0.

    Raises:
      ValueError: the shapes do not fit, or `var + eps` is not positive.

    Source: Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, section 3.2.

    >>> import jax.numpy as jnp
    >>> one = jnp.ones(1)
    >>> new = fold(jnp.full((2, 1), 3.0), 2 * one, one, 5 * one, 4 * one, 0.0, 1)
    >>> new.kernel.tolist(), new.beta.tolist(), new.mean.tolist(), new.var.tolist()
    ([[3.0], [3.0]], [-4.0], [0.0], [1.0])
    """
    axes = (channel_axis,) if isinstance(channel_axis, int) else tuple(channel_axis)
    axes = tuple(a % kernel.ndim for a in axes)
    channels = tuple(kernel.shape[a] for a in axes)
    vectors = {"gamma": gamma, "beta": beta, "mean": mean, "var": var, "bias": bias}
    for name, x in vectors.items():
        if x is not None and tuple(x.shape) != channels:
            raise ValueError(
                f"fold: expected {name} of shape {list(channels)}, as the kernel "
                f"{list(kernel.shape)} has along {axes}; got {list(x.shape)}"
            )
    wide = jnp.promote_types(jnp.float32, kernel.dtype)
    variance = var.astype(wide) + eps
    if not isinstance(variance, jax.core.Tracer) and not bool((variance > 0).all()):
        raise ValueError(f"fold: expected var + eps > 0 in every channel, eps = {eps:g}")
    a = 1.0 / jnp.sqrt(variance)
    a = a if gamma is None else a * gamma.astype(wide)
    shift = (-mean.astype(wide) if bias is None else bias.astype(wide) - mean.astype(wide)) * a
    shift = shift if beta is None else shift + beta.astype(wide)
    scaled = kernel.astype(wide) * _along(a, axes, kernel.ndim)
    return Folded(
        kernel=scaled.astype(kernel.dtype),
        gamma=None if gamma is None else jnp.ones_like(gamma),
        beta=None if beta is None else shift.astype(beta.dtype),
        mean=(-shift).astype(mean.dtype) if beta is None else jnp.zeros_like(mean),
        var=jnp.full_like(var, _one_less(eps, var.dtype)),
        bias=None if bias is None else jnp.zeros_like(bias),
    )


def _along(a: Array, axes: tuple[int, ...], ndim: int) -> Array:
    """`a` with `ndim` axes: its axes at `axes`, all others of size 1."""
    order = np.argsort(axes)
    sizes = dict(zip(axes, a.shape, strict=True))
    return a.transpose(order).reshape([sizes.get(i, 1) for i in range(ndim)])


def _one_less(eps: float, dtype: Any) -> Any:
    """`1 - eps` in `dtype`: adding `eps` again rounds to exactly 1.

    The difference is off by at most half an ulp of the numbers below 1, a quarter of an ulp of
    those above: the sum is nearer to 1 than to its neighbours, or a tie, which rounds to even 1.
    """
    one = np.ones((), dtype)
    return one - np.asarray(eps, dtype)


@dataclasses.dataclass(frozen=True)
class BatchNormSite:
    """One BatchNorm and the contraction that feeds it, as key paths of parameters.

    Attributes:
      kernel: kernel of the contraction.
      channel_axes: axes of the kernel that the statistics have, in their order.
      mean: running mean.
      var: running variance.
      eps: added to the variance.
      scale: gamma, if there is one.
      bias: beta, if there is one.
      kernel_bias: bias of the contraction, if there is one.
    """

    kernel: str
    channel_axes: tuple[int, ...]
    mean: str
    var: str
    eps: float
    scale: str | None = None
    bias: str | None = None
    kernel_bias: str | None = None


def fold_site(leaves: Mapping[str, Array], site: BatchNormSite) -> dict[str, Array]:
    """The new leaves of one site, by key path; see `fold`.

    Statistics may have further axes of size 1 and keep them: `[1, 1, 1, channels]`.

    Args:
      leaves: all leaves that the site names, by key path.
      site: their roles.

    Raises:
      ValueError: a leaf is missing, or the leaves do not fit each other.

    >>> import jax.numpy as jnp
    >>> leaves = {"w": jnp.eye(2), "mean": jnp.zeros((1, 2)), "var": jnp.full((1, 2), 0.25)}
    >>> new = fold_site(leaves, BatchNormSite("w", (1,), "mean", "var", 0.0))
    >>> new["w"].tolist(), new["var"].tolist()
    ([[2.0, 0.0], [0.0, 2.0]], [[1.0, 1.0]])
    """
    names = {
        "gamma": site.scale,
        "beta": site.bias,
        "mean": site.mean,
        "var": site.var,
        "bias": site.kernel_bias,
    }
    for path in (site.kernel, *names.values()):
        if path is not None and path not in leaves:
            raise ValueError(f"fold: no leaf {path!r}; the leaves are {', '.join(leaves)}")
    kernel = leaves[site.kernel]
    channels = tuple(kernel.shape[a] for a in site.channel_axes)

    def squeezed(path: str | None) -> Any:
        if path is None:
            return None
        if leaves[path].size != math.prod(channels):
            raise ValueError(
                f"fold: {path} has shape {list(leaves[path].shape)}, expected {list(channels)}: "
                f"axes {site.channel_axes} of {site.kernel} {list(kernel.shape)}"
            )
        return leaves[path].reshape(channels)

    arrays = {name: squeezed(path) for name, path in names.items()}
    try:
        new = fold(kernel, eps=site.eps, channel_axis=site.channel_axes, **arrays)
    except ValueError as error:
        raise ValueError(f"{site.var}: {error}") from error
    out = {site.kernel: new.kernel}
    for name, path in names.items():
        if path is not None:
            out[path] = getattr(new, name).reshape(leaves[path].shape)
    return out
