"""k-means on a line in plain NumPy, float64: Lloyd's iteration and the optimum."""

import numpy as np


def inertia(x, centroids, weights=None):
    """`sum w (x - nearest)^2`."""
    x, c = np.asarray(x, np.float64).ravel(), np.asarray(centroids, np.float64).ravel()
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64).ravel()
    return float((w * (x[:, None] - c).__pow__(2).min(1)).sum())


def lloyd(x, centroids, steps, weights=None):
    """So many steps from given centroids; those without members stay."""
    x, c = np.asarray(x, np.float64).ravel(), np.sort(np.asarray(centroids, np.float64))
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64).ravel()
    for _ in range(steps):
        at = np.abs(x[:, None] - c).argmin(1)
        for k in range(len(c)):
            mine = at == k
            if w[mine].sum() > 0:
                c[k] = (w[mine] * x[mine]).sum() / w[mine].sum()
    return c


def optimum(x, levels, weights=None):
    """The least inertia of any partition, by dynamic programming over all cuts."""
    x = np.asarray(x, np.float64).ravel()
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64).ravel()
    order = np.argsort(x)
    x, w = x[order], w[order]
    n = len(x)
    cost = np.zeros((n + 1, n + 1))
    for j in range(n):
        for i in range(j + 1, n + 1):
            if w[j:i].sum() > 0:
                mean = (w[j:i] * x[j:i]).sum() / w[j:i].sum()
                cost[j, i] = (w[j:i] * (x[j:i] - mean) ** 2).sum()
    least = cost[0]
    for _ in range(levels - 1):
        least = np.array([min(least[j] + cost[j, i] for j in range(i + 1)) for i in range(n + 1)])
    return float(least[n])
