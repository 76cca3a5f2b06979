"""Times relative to float's, in one process and in turns, and the table they are printed in."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np


def ratios(calls: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], float]:
    """Median time of each call relative to that named `float`, and that one's milliseconds.

    Calls wait for their results. Each is made once before, to compile.
    """
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    unit = np.asarray(times.pop("float"))
    found = {name: float(np.median(np.asarray(t) / unit)) for name, t in times.items()}
    return found, float(np.median(unit)) * 1e3


def print_table(
    columns: Iterable[str], rows: Iterable[tuple[str, tuple[dict[str, float], float]]]
) -> None:
    """Prints rows as they come, `(name, ratios(...))`, then versions."""
    columns = list(columns)
    print(f"| time / float's | float, ms | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 2) + "|")
    for name, (found, unit) in rows:
        cells = " | ".join(f"{found[column]:.2f}" for column in columns)
        print(f"| {name} | {unit:.2f} | {cells} |", flush=True)
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("jaxquant", "jax", "jaxlib"))
    print(f"\n{versions}, Python {platform.python_version()}, {jax.default_backend()}")
