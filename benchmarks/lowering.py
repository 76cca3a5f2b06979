"""Measures the table of `suite/lowering_table.py` again, and says where it disagrees.

    python benchmarks/lowering.py                      # all rows; about five minutes on two cores
    python benchmarks/lowering.py --quick              # small shapes, three rounds: does it run?
    python benchmarks/lowering.py --rows '*groups*'    # a part

Each figure is a median over rounds in which all forms of a row and the float32 contraction take
turns: time relative to float32's of the same round. A row disagrees where another form took less
than nine tenths of the chosen one's time.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # as a script, it has only its folder

import jax
from rich.console import Console
from rich.progress import track

from benchmarks.suite import forms
from benchmarks.suite.lowering_table import TABLE, Row
from benchmarks.suite.measure import in_turns
from benchmarks.suite.report import versions
from jaxquant.ops.lowering import FUSES_SUMS

LOSES = 0.9


def small(row: Row) -> Row:
    """The row at shapes that take no time."""
    case = row.case
    if case.window:
        return dataclasses.replace(row, case=dataclasses.replace(case, rows=6, inputs=8, outputs=8))
    return dataclasses.replace(row, case=dataclasses.replace(case, inputs=256, outputs=32))


def names(row: Row) -> list[str]:
    """Forms that the JAX installed can make well; the chosen one is among them."""
    return [name for name in (row.form, *row.others) if FUSES_SUMS or not name.startswith("one l")]


def measured(row: Row, rounds: int) -> dict[str, float]:
    """Median time of each form relative to float32's."""
    x, q, w = forms.arguments(row.case)
    calls = {"float32": functools.partial(jax.jit(forms.plain(row.case)), x, w)}
    known = forms.forms_of(row.case)
    for name in dict.fromkeys((row.chosen, *names(row))):
        calls[name] = functools.partial(jax.jit(known[name]), x, q)
    for call in calls.values():
        jax.block_until_ready(call())
    times = in_turns(calls, rounds)
    unit = times.pop("float32")
    return {
        name: statistics.median(t / u for t, u in zip(taken, unit, strict=True))
        for name, taken in times.items()
    }


def verdict(row: Row, found: dict[str, float]) -> str:
    """Where another form is clearly faster, which."""
    best = min(found, key=found.__getitem__)
    faster = found[best] < LOSES * found[row.chosen]
    return f"disagrees: {best} is faster" if faster else ""


def main() -> int:
    """Prints the table as measured here, beside what it holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, three rounds")
    parser.add_argument("--rows", default="*", metavar="GLOB", help="rows by what they decide")
    parser.add_argument("--rounds", type=int, default=25, help="timings of each form")
    options = parser.parse_args()
    rows = [row for row in TABLE if fnmatch.fnmatch(row.what, options.rows)]
    if not rows:
        parser.error(
            f"no row matches {options.rows!r}; there are {', '.join(r.what for r in TABLE)}"
        )
    if options.quick:
        rows, options.rounds = [small(row) for row in rows], 3
    console, disagree = Console(highlight=False, soft_wrap=True), 0
    console.print("time / float32's, by form; the chosen form first")
    for row in track(rows, "measuring", console=console, transient=True):
        found = measured(row, options.rounds)
        said = verdict(row, found)
        disagree += bool(said)
        here = ", ".join(f"{name} {ratio:.2f}" for name, ratio in found.items())
        console.print(f"{row.what} ({row.case}): {here}" + (f" [red]{said}" if said else ""))
        for where, times in row.times.items():
            held = ", ".join(f"{name} {time:.2f}" for name, time in times.items())
            console.print(f"    {where}: {held}", style="dim")
    console.print(f"{disagree} of {len(rows)} rows disagree")
    console.print(", ".join(f"{k} {v}" for k, v in versions().items()), style="dim")
    return 0


if __name__ == "__main__":
    sys.exit(main())
