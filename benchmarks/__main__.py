"""How fast quantized models are, beside float and beside other libraries, in one process.

    pip install -e ".[bench]"
    python -m benchmarks                                  # all cases; about an hour on two cores
    python -m benchmarks --quick                          # small cases, few rounds: does it run?
    python -m benchmarks --cases 'dense*' --formats 'w8*' # a part
    python -m benchmarks --json figures.json --plot figures.svg

Every figure is a median over rounds in which all contenders of a case take turns: time relative to
that of float32 in the same round, with quartiles. Peers take part where they are installed. In
brackets: programs that are compiled, but not run.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from rich.console import Console

from benchmarks.suite import cases, contenders, measure, report
from benchmarks.suite.contenders import FORMATS

UNRELATED = 0.9
"""An output that has nothing to do with float32's is off by more than its own norm."""


def main(argv: list[str] | None = None) -> int:
    """Runs the suite, prints the table, writes what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="small cases, few rounds, no models")
    parser.add_argument("--cases", default="*", metavar="GLOBS", help="comma-separated")
    parser.add_argument("--formats", default="*", metavar="GLOBS", help="comma-separated")
    parser.add_argument("--no-peers", action="store_true", help="jaxquant alone")
    parser.add_argument("--rounds", type=int, help="timings of each contender (default 25)")
    parser.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write the figures here")
    parser.add_argument("--plot", type=pathlib.Path, metavar="PATH", help="draw the figures here")
    parser.add_argument("--markdown", type=pathlib.Path, metavar="PATH", help="write tables here")
    parser.add_argument(
        "--from-json", type=pathlib.Path, metavar="PATH", help="print or plot these, run nothing"
    )
    options = parser.parse_args(argv)
    console = Console(highlight=False)
    if options.from_json:
        figures = report.read(options.from_json)
    else:
        try:
            chosen = cases.chosen(options.cases, options.quick)
            formats = contenders.chosen(options.formats)
        except ValueError as error:
            console.print(f"[red]{error}")
            return 2
        rounds = options.rounds or (3 if options.quick else 25)
        results = []
        for case in chosen:
            found = measure.measure(case, formats, not options.no_peers, rounds, console)
            results.extend(found)
            if options.json:  # after every case: what is measured is not lost
                report.write(options.json, report.Figures(report.versions(), results))
        figures = report.Figures(report.versions(), results)
    report.show(figures, console)
    if options.markdown:
        options.markdown.write_text(report.markdown(figures))
    if options.plot:
        report.plot(figures, options.plot)
        console.print(f"drawn: {options.plot}")
    off = [r for r in figures.results if (r.error or 0.0) > UNRELATED and r.contender in FORMATS]
    wrong = off if options.quick else []  # a deep model on random data may be off by as much
    for result in wrong:
        console.print(f"[red]{result.case}: {result.contender} is off by {result.error:.2f}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
