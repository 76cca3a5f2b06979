"""The suite's figures: as a table, as JSON, as a plot."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.suite.contenders import FORMATS
from benchmarks.suite.measure import Result

PACKAGES = (
    *("jaxquant", "jax", "jaxlib", "flax"),
    *("qwix", "onnxruntime", "torch", "torchao"),
)
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "asimddp")


@dataclasses.dataclass(frozen=True)
class Figures:
    """Results, and what they were measured with."""

    versions: dict[str, str]
    results: list[Result]


def versions() -> dict[str, str]:
    """Of packages, Python, and the machine."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    found["device"] = device.device_kind if device.platform != "cpu" else _cpu()
    found["cores"] = str(len(os.sched_getaffinity(0)))
    return found


def _cpu() -> str:
    text = pathlib.Path("/proc/cpuinfo")
    if not text.exists():
        return platform.processor() or platform.machine()
    fields = dict(
        (part.strip() for part in line.split(":", 1))
        for line in text.read_text().splitlines()
        if ":" in line
    )
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    name = fields.get("model name", platform.machine())
    return " ".join([name, *(f for f in FEATURES if f in flags)])


def write(path: pathlib.Path, figures: Figures) -> None:
    """Writes figures as JSON, whole or not at all."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(dataclasses.asdict(figures), indent=1) + "\n")
    partial.replace(path)


def read(path: pathlib.Path) -> Figures:
    """Figures that `write` wrote."""
    found: dict[str, Any] = json.loads(path.read_text())
    return Figures(found["versions"], [Result(**result) for result in found["results"]])


def show(figures: Figures, console: Console) -> None:
    """Prints a table for each family of cases: ratios, and what compiling takes."""
    for family, results in _families(figures).items():
        table = _table(family, results, _cell)
        if _width(table, console) > console.width:
            table = _table(family, results, _short)
        # a narrow terminal breaks lines; a figure that is cut off says nothing
        width = max(_width(table, console), console.width)
        Console(file=console.file, width=width, highlight=False).print(table)
    for result in figures.results:
        if result.problem:
            console.print(f"{result.case}: {result.contender}: {result.problem}", style="dim")
    used = ", ".join(f"{name} {version}" for name, version in figures.versions.items())
    console.print(used, style="dim")


def markdown(figures: Figures) -> str:
    """The same tables for a document: a median to a cell, quartiles left to the JSON."""
    lines: list[str] = []
    for family, results in _families(figures).items():
        found = {(r.case, r.contender): r for r in results}
        cases = list(dict.fromkeys(r.case for r in results))
        titles = [case.removeprefix(f"{family}/") for case in cases]
        units = found[cases[-1], "float32"]
        lines += [f"| {family} | {' | '.join(titles)} | tracing | compiling | program |"]
        lines += ["|---" * (len(cases) + 4) + "|"]
        for name in dict.fromkeys(r.contender for r in results):
            row = [_short(found.get((case, name))) for case in cases]
            last = found.get((cases[-1], name))
            row += [_relative(last, units, t) for t in ("tracing", "compiling", "program")]
            lines += [f"| {name} | {' | '.join(row)} |"]
        lines += [""]
    used = ", ".join(f"{name} {version}" for name, version in figures.versions.items())
    return "\n".join([*lines, used, ""])


def _width(table: Table, console: Console) -> int:
    """How many columns a table takes, however many there are."""
    return console.measure(table, options=console.options.update_width(1000)).maximum


def _families(figures: Figures) -> dict[str, list[Result]]:
    """Results by what they are of: the case's first word, or all but the number of its rows."""
    families: dict[str, list[Result]] = {}
    for result in figures.results:
        first, _, rows = result.case.rpartition("/")
        family = first if rows.isdigit() else first.partition("/")[0]
        families.setdefault(family, []).append(result)
    return families


def _short(result: Result | None) -> str:
    return _cell(result).partition(" (")[0]


def _relative(result: Result | None, unit: Result, title: str) -> str:
    value, of = (getattr(r, title) if r else None for r in (result, unit))
    return f"{value / of:.2f}" if value is not None and of else ""


def _table(family: str, results: list[Result], cell: Callable[[Result | None], str]) -> Table:
    cases = list(dict.fromkeys(result.case for result in results))
    table = Table(
        title=f"{family}: time / float32's" + (" (quartiles)" if cell is _cell else ""),
        caption="tracing, compiling, program: relative to float32's, in the last column's case",
        box=box.SIMPLE_HEAD,
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for case in cases:
        table.add_column(case.removeprefix(f"{family}/"), justify="right")
    for title in ("tracing", "compiling", "program"):
        table.add_column(title, justify="right")
    found = {(r.case, r.contender): r for r in results}
    units = found[cases[-1], "float32"]
    for name in dict.fromkeys(result.contender for result in results):
        row = [cell(found.get((case, name))) for case in cases]
        last = found.get((cases[-1], name))
        row += [_relative(last, units, t) for t in ("tracing", "compiling", "program")]
        table.add_row(name, *row)
    return table


def _cell(result: Result | None) -> str:
    if result is None:
        return ""
    if result.problem:
        return "refused"
    if result.contender == "float32":
        return f"{result.ms:.3g} ms"
    return f"{result.ratio:.2f} ({result.low:.2f}-{result.high:.2f})"


def plot(figures: Figures, path: pathlib.Path) -> None:
    """Draws ratios of every case on a logarithmic axis, float32 a line at 1."""
    from matplotlib.figure import Figure

    shown = [r for r in figures.results if not r.problem and r.contender != "float32"]
    cases = list(dict.fromkeys(r.case for r in shown))
    names = list(dict.fromkeys(r.contender for r in shown))
    figure = Figure(figsize=(11, 0.42 * len(cases) + 2.2), layout="constrained")
    axes = figure.subplots()
    own = [n for n in names if n in FORMATS]
    peers = [n for n in names if n not in own]
    for group, markers in ((own, "osD^vPX<>"), (peers, "x+1234*|_")):
        for n, name in enumerate(group):
            points = [
                (r.ratio, cases.index(r.case), r.low, r.high) for r in shown if r.contender == name
            ]
            x, y, low, high = zip(*points, strict=True)
            offset = (names.index(name) / max(len(names) - 1, 1) - 0.5) * 0.7
            at = [value + offset for value in y]
            colour = f"C{n}" if group is own else "0.45"
            axes.hlines(at, low, high, color=colour, linewidth=1, alpha=0.6)
            axes.plot(x, at, markers[n % len(markers)], color=colour, label=name, markersize=5)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set(
        xscale="log", xlabel="time / float32's (lower is faster)", ylim=(len(cases) - 0.5, -0.5)
    )
    axes.set_yticks(range(len(cases)), cases)
    axes.grid(axis="x", which="both", alpha=0.25)
    for edge in range(len(cases) - 1):
        axes.axhline(edge + 0.5, color="0.9", linewidth=0.8)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    used = ", ".join(f"{k} {v}" for k, v in figures.versions.items())
    figure.suptitle("jaxquant and peers, in turns in one process", fontsize=11)
    figure.supxlabel(used, fontsize=6, color="0.4")
    figure.savefig(path)
