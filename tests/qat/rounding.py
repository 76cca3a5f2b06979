"""Rounding operands in NumPy and float64, and where gradients pass."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxquant import QSpec
from tests import reference


def codes(x: np.ndarray, axis: Any, qmax: int = 127) -> tuple[np.ndarray, np.ndarray]:
    """`round(x / S)` for `S = amax / (qmax + 1/2)`; the negative extreme rounds out."""
    scale = np.abs(x).max(axis=axis, keepdims=True) / (qmax + 0.5)
    q = np.clip(np.round(x / scale * (1 + 1e-7)), -qmax - 1, qmax)
    return q.astype(np.int64), scale


@dataclasses.dataclass
class Rounded:
    """An operand on its grid: values, where gradients pass, and slopes in its step."""

    values: np.ndarray
    inside: np.ndarray
    slope: np.ndarray | None = None


def limits(spec: QSpec) -> tuple[float, float]:
    values = reference.grid(spec.format.name)
    return values[0], values[-1]


def on_scale(x: np.ndarray, scale: Any, zero: Any, spec: QSpec) -> Rounded:
    """`S (clip(round(x / S) + Z) - Z)`; all that is at most half a step outside passes."""
    low, high = limits(spec)
    v = x / scale
    # the negative extreme is a tie that rounds out
    codes = np.clip(np.round(v * (1 + 1e-7)) + zero, low, high)
    inside = (v >= low - zero - 0.5001) & (v <= high - zero + 0.5001)
    return Rounded(scale * (codes - zero), inside)


def by_step(x: np.ndarray, step: Any, spec: QSpec) -> Rounded:
    """LSQ: arXiv 1902.08153, equations 1 and 3."""
    low, high = limits(spec)
    v = x / step
    inside = (v > low) & (v < high)
    slope = np.where(inside, np.round(v) - v, np.where(v <= low, low, high))
    return Rounded(np.clip(np.round(v), low, high) * step, inside, slope)


def gain(count: int, spec: QSpec) -> float:
    return 1 / np.sqrt(count * limits(spec)[1])


def near(got: Any, want: np.ndarray, rtol: float = 1e-5) -> None:
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=rtol * np.abs(want).max())
