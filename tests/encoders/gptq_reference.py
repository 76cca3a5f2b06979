"""GPTQ in float64 NumPy, as the paper has it: with the inverse, column after column."""

from __future__ import annotations

import numpy as np


def symmetric(bits):
    """Scale and zero point of the `half` rule for weights `[group, N]`, and their rounding."""
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def choose(w):
        scale = np.abs(w).max(0) / (qmax + 0.5)
        return np.where(scale == 0, 1.0, scale), np.zeros(w.shape[1])

    def rounded(w, grid):
        scale, _ = grid
        v = w / scale
        v = np.where(v < -qmax, v * (1 + 2**-21), v)  # the negative extreme rounds out to qmin
        return np.clip(np.rint(v), qmin, qmax) * scale

    return choose, rounded


def asymmetric(bits):
    def choose(w):
        low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
        scale = (high - low) / (2**bits - 1)
        scale = np.where(scale == 0, 1.0, scale)
        return scale, np.clip(-np.rint(low / scale), 0, 2**bits - 1)

    def rounded(w, grid):
        scale, zero = grid
        return (np.clip(np.rint(w / scale) + zero, 0, 2**bits - 1) - zero) * scale

    return choose, rounded


def codebook(values):
    values = np.asarray(values, np.float64)

    def choose(w):
        scale = np.abs(w).max(0) / np.abs(values).max()
        return np.where(scale == 0, 1.0, scale), np.zeros(w.shape[1])

    def rounded(w, grid):
        scale, _ = grid
        bounds = (values[:-1] + values[1:]) / 2
        return values[np.searchsorted(bounds, w / scale)] * scale

    return choose, rounded


def gptq(w, hessian, scheme, group=None, damping=0.01, order=None, shrinkage=0.0):
    """`(Q, scales [groups, N], zeros, loss)`; `order`: columns in the order they are rounded.

    With an order all grids are fixed beforehand, else each when its group begins.
    """
    choose, rounded = scheme
    w, h = np.array(w, np.float64), np.array(hessian, np.float64)
    k = len(w)
    diagonal = np.diag(h).copy()
    dead = diagonal == 0
    w[dead] = 0
    h = (1 - shrinkage) * h + shrinkage * np.diag(diagonal)
    h[dead, dead] = diagonal[~dead].mean()
    h += damping * diagonal[~dead].mean() * np.eye(k)
    group = group or k
    fixed = [choose(w[g : g + group]) for g in range(0, k, group)]
    static = order is not None or group == k
    order = np.arange(k) if order is None else np.asarray(order)
    inverse = np.linalg.inv(h[np.ix_(order, order)])
    upper = np.linalg.cholesky(inverse).T
    w = w[order]
    q, grids, loss = np.zeros_like(w), list(fixed), 0.0
    for j in range(k):
        g = order[j] // group
        if not static and j % group == 0:
            grids[g] = choose(w[j : j + group])
        q[j] = rounded(w[j], grids[g])
        error = (w[j] - q[j]) / upper[j, j]
        loss += np.sum(error**2)  # over 2, and H is half of the paper's
        w[j:] -= np.outer(upper[j, j:], error)
    back = np.argsort(order)
    return q[back], np.stack([g[0] for g in grids]), np.stack([g[1] for g in grids]), loss


def output_error(w, q, hessian):
    """`tr(D^T H D) / tr(W^T H W)`."""
    w, d, h = (np.asarray(a, np.float64) for a in (w, np.asarray(w) - np.asarray(q), hessian))
    return np.sum(d * (h @ d)) / np.sum(w * (h @ w))
