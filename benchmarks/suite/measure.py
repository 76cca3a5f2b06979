"""Times of a case's contenders, in turns, relative to float32's."""

from __future__ import annotations

import dataclasses
import fnmatch
import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from rich.console import Console

from benchmarks.suite.cases import Case
from benchmarks.suite.contenders import FORMATS, Contender, Jitted


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured of one contender in one case.

    Attributes:
      case: name of the case.
      contender: name of the contender.
      ratio: median over rounds of its time over float32's in the same round.
      low: first quartile of these.
      high: third quartile.
      ms: median milliseconds of a call.
      tracing: seconds to trace and lower; `None` for peers outside of JAX.
      compiling: seconds to compile, or to make it ready.
      program: characters of the lowered program.
      error: of its output relative to float32's, in the Euclidean norm; `None` outside of JAX.
      problem: why it could not be measured; all figures are 0 then.
    """

    case: str
    contender: str
    ratio: float = 0.0
    low: float = 0.0
    high: float = 0.0
    ms: float = 0.0
    tracing: float | None = None
    compiling: float | None = None
    program: int | None = None
    error: float | None = None
    problem: str | None = None


def measure(
    case: Case, contenders: Mapping[str, Contender], peers: bool, rounds: int, console: Console
) -> list[Result]:
    """Times all contenders that take part in a case."""
    program = case.make()
    calls: dict[str, Callable[[], Any]] = {}
    found: dict[str, Result] = {}
    exact: Any = None
    with console.status(case.name) as status:
        for name, make in contenders.items():
            if not _takes_part(case, name, peers):
                continue
            status.update(f"{case.name}: compiling {name}")
            try:
                made = make(program)
                if made is None:
                    continue
                calls[name], found[name] = _compiled(case.name, name, made)
                output = jax.block_until_ready(calls[name]())
                if isinstance(made, Jitted):
                    exact = output if name == "float32" else exact
                    found[name] = dataclasses.replace(found[name], error=_error(output, exact))
            except Exception as error:
                if name in FORMATS and name != "bfloat16":  # our own are to work
                    raise
                first = str(error).strip().split("\n")[0][:200]
                found[name] = Result(case.name, name, problem=f"{type(error).__name__}: {first}")
                calls.pop(name, None)
        status.update(f"{case.name}: {rounds} rounds")
        times = in_turns(calls, rounds)
    unit = times["float32"]
    for name, taken in times.items():
        low, ratio, high = np.quantile(taken / unit, (0.25, 0.5, 0.75))
        found[name] = dataclasses.replace(
            found[name],
            ratio=float(ratio),
            low=float(low),
            high=float(high),
            ms=float(np.median(taken)) * 1e3,
        )
    for name, result in found.items():
        text = result.problem or f"{result.ratio:.2f} ({result.low:.2f} to {result.high:.2f})"
        console.print(f"{case.name}: {name} {text}", style="dim")
    calls.clear()
    jax.clear_caches()
    gc.collect()
    return list(found.values())


def in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each call in each round; every other round in the opposite order.

    In turns, what else the machine does falls on all alike; and weights have been put out of caches
    by those of the others, as in a model that is larger than one layer.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for n in range(rounds):
        order = list(calls.items())
        for name, call in order[:: -1 if n % 2 else 1]:
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {name: np.asarray(taken) for name, taken in times.items()}


def _error(output: Any, exact: Any) -> float:
    found, want = (
        np.concatenate([np.ravel(np.asarray(a, np.float64)) for a in jax.tree.leaves(tree)])
        for tree in (output, exact)
    )
    return float(np.linalg.norm(found - want) / np.linalg.norm(want))


def _takes_part(case: Case, name: str, peers: bool) -> bool:
    if name not in FORMATS and not peers:
        return False
    return case.formats is None or any(fnmatch.fnmatch(name, glob) for glob in case.formats)


def _compiled(case: str, name: str, made: Any) -> tuple[Callable[[], Any], Result]:
    if not isinstance(made, Jitted):
        return made.call, Result(case, name, compiling=made.seconds)
    start = time.perf_counter()
    lowered = jax.jit(made.fn).lower(*made.args)
    tracing = time.perf_counter() - start
    size = len(lowered.as_text())
    start = time.perf_counter()
    compiled = lowered.compile()
    compiling = time.perf_counter() - start
    result = Result(case, name, tracing=tracing, compiling=compiling, program=size)
    return lambda: compiled(*made.args), result
