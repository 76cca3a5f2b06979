"""Plants single faults in `jaxquant/`, runs the tests that reach each, and says how many fail.

A line that tests run is not yet a line whose result they check. Record first, on the same sources,
which test reaches which line (`pip install pytest-cov`), then plant:

    pytest --cov=jaxquant --cov-branch --cov-context=test --cov-report= --durations=0 -vv > times
    python tests/mutants.py --durations times --json mutants.json

`--only mutants.json` plants the very same faults again, in this checkout or another (`--repo`).
Neither mutmut nor cosmic-ray fits: neither draws a sample with a seed, cosmic-ray runs one command
for every mutant whatever it touches, and mutmut forks a process in which JAX has threads already.

A mutant meets up to 40 tests recorded on its line, the quickest first; then the whole of their
files, as what JAX traced for one test is not recorded for the next. A line that runs on import only
has the tests of its room. `tests/faults.py` says what is changed.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.faults import Mutant, all_candidates, named, sample

STEP_ONE = 40
LATE = "survived within the limit"
PYTEST = ["-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "--no-header", "-m", "not slow"]
PYTEST += ["-W", "ignore::pytest.PytestCollectionWarning"]  # a file named for its doctests
LEFT_BEHIND = shutil.ignore_patterns(".git", "__pycache__", "*venv", ".*_cache", ".coverage*")


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: caught, survived, LATE, unclear, not reached or gone."""

    mutant: Mutant
    result: str
    by: str = ""
    seconds: float = 0.0
    before: str = ""
    after: str = ""

    def row(self) -> dict[str, object]:
        own = {k: v for k, v in asdict(self).items() if k != "mutant"}
        return {"room": self.mutant.room, **asdict(self.mutant), **own}


class Coverage:
    """Which lines tests reach, and which tests reach a line."""

    def __init__(self, file: Path) -> None:
        import coverage

        assert file.exists(), f"no coverage data at {file}: see the docstring for how to record it"
        self.data = coverage.CoverageData(str(file))
        self.data.read()
        names = sorted(self.data.measured_files())  # in whatever folder it was recorded
        self.names = {"jaxquant/" + f.rpartition("/jaxquant/")[2]: f for f in names}

    def reached(self, mutants: list[Mutant]) -> set[Mutant]:
        lines = {f: set(self.data.lines(name) or ()) for f, name in self.names.items()}
        return {m for m in mutants if m.line in lines.get(m.file, ())}

    def tests(self, mutants: list[Mutant]) -> dict[Mutant, list[str]]:
        """Node ids, without `|run` or `|setup`; none for a line that runs on import only."""
        found = {}
        for file in {m.file for m in mutants}:
            contexts = self.data.contexts_by_lineno(self.names[file])
            for m in (m for m in mutants if m.file == file):
                found[m] = sorted({c.rpartition("|")[0] for c in contexts.get(m.line, ())} - {""})
        return found


def batches(tests: list[str], room: list[str], durations: dict[str, float]) -> Iterator[list[str]]:
    """What to run, one pytest after the other: the tests of the line, then each of their files."""
    files = Counter(t.partition("::")[0] for t in tests)
    far = lambda test: test.partition("::")[0] not in room
    if tests:
        yield sorted(tests, key=lambda t: (durations.get(t, 1.0), far(t), t))[:STEP_ONE]
    for file in sorted(files, key=lambda f: (f not in room, -files[f], f)) or room:
        yield [file]


def read_durations(file: Path | None) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for line in file.read_text().splitlines() if file else ():
        if found := re.match(r"\s*([\d.]+)s (?:call|setup|teardown)\s+(\S.*)", line):
            total[found[2].strip()] += float(found[1])
    return total


class Bench:
    """Runs pytest in copies of a checkout, each with at most one fault in it."""

    def __init__(self, repo: Path, folder: Path, jobs: int, limit: float) -> None:
        self.limit, self.stopped, self.lock = limit, False, threading.Lock()
        self.running: set[subprocess.Popen] = set()
        self.sound: dict[str, bool] = {}  # tests that were run without a fault
        self.known: set[str] = set()  # node ids and files
        self.copies: queue.Queue[Path] = queue.Queue()
        for n in range(jobs):
            shutil.copytree(repo, folder / str(n), ignore=LEFT_BEHIND, symlinks=True)
            self.copies.put(folder / str(n))

    def run(self, copy: Path, args: list[str], seconds: float) -> tuple[int | None, str, float]:
        """`(exit status or None for out of time, output, seconds since the last output)`."""
        # No .pyc: one of the same second and size would hide a fault. CI: Hypothesis's fixed seeds.
        # Unbuffered: each dot of pytest is seen at once.
        flags = ("PYTHONDONTWRITEBYTECODE", "CI", "PYTHONUNBUFFERED")
        env = dict(os.environ) | dict.fromkeys(flags, "1")
        env["PYTHONPATH"] = str(copy)
        with tempfile.TemporaryFile() as out:
            with self.lock:
                assert not self.stopped
                # Of its own session, so that what a test has started ends with it.
                job = subprocess.Popen(
                    [sys.executable, *args], cwd=copy, env=env, stdin=subprocess.DEVNULL,
                    stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
                self.running.add(job)
            try:
                code = job.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                silent = time.time() - os.fstat(out.fileno()).st_mtime
                self.end(job)
            assert not self.stopped  # a killed test says nothing
            out.seek(0)
            return code, out.read().decode(errors="replace"), silent

    def end(self, job: subprocess.Popen) -> None:
        with contextlib.suppress(ProcessLookupError):  # it is over, and left nothing behind
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        self.running.discard(job)

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
        for job in list(self.running):
            self.end(job)

    def prepare(self, files: set[str]) -> None:
        """Checks that the copies are what is imported, and asks pytest which tests there are."""
        for copy in list(self.copies.queue):
            code, where, _ = self.run(copy, ["-c", "import jaxquant as j; print(j.__file__)"], 300)
            assert code == 0 and Path(where.split("\n")[-2]).is_relative_to(copy), where
        there = sorted(f for f in files if (copy / f).exists())
        code, output, _ = self.run(copy, [*PYTEST, "--collect-only", *there], 1200)
        assert code == 0, f"without any fault, tests are not collected:\n{output[-3000:]}"
        self.known = {*there, *(line for line in output.splitlines() if "::" in line)}

    def plant(self, mutant: Mutant, runs: list[list[str]]) -> Outcome:
        copy, start = self.copies.get(), time.monotonic()
        path = copy / mutant.file
        text = path.read_bytes()
        for _ in range(5):
            try:
                path.write_bytes(mutant.planted(text))
                result, by = self.judge(copy, runs)
            finally:
                path.write_bytes(text)
            if result != "caught" or "::" not in by:
                break
            if by not in self.sound:
                self.sound[by] = self.run(copy, [*PYTEST, by], self.limit)[0] == 0
            if self.sound[by]:
                break
            result = "unclear"  # the test fails anyway: once more without it
        self.copies.put(copy)
        return Outcome(mutant, result, by, round(time.monotonic() - start, 1), *mutant.change(text))

    def unsound(self) -> list[str]:
        return sorted(test for test, sound in list(self.sound.items()) if not sound)

    def judge(self, copy: Path, runs: list[list[str]]) -> tuple[str, str]:
        """`(result, what caught it)`: the first failure, or an end without progress at once."""
        end = time.monotonic() + self.limit
        for n, args in enumerate(runs):
            args = ["-x", *args, *(f"--deselect={test}" for test in self.unsound())]
            code, output, silent = self.run(copy, [*PYTEST, *args], max(end - time.monotonic(), 1))
            if code is None:
                hangs = n == 0 and silent > self.limit / 2
                return ("caught", "timeout") if hangs else (LATE, "")
            if code not in (0, 5):  # 5: no test is left after `-m 'not slow'`
                failed = re.search(r"^(?:FAILED|ERROR) (\S.*?::.*?)(?: - .*)?$", output, re.M)
                return "caught", failed[1] if failed else f"pytest's exit status {code}"
        return "survived", ""


def show(outcome: Outcome) -> str:
    m = outcome.mutant
    old, new = (" ".join(t.split()) for t in (outcome.before, outcome.after))
    end = (f" by {outcome.by}" if outcome.by else "") + f", {outcome.seconds:.0f} s"
    head = f"{m.room:10} {m.file}:{m.line} {m.operator}: {outcome.result}{end}"
    return f"{head}\n    - {old}\n    + {new}" if old else f"{head} ({m.segment})"


def by_room(outcomes: list[Outcome], found: list[Mutant], reached: set[Mutant]) -> list[dict]:
    table = []
    for room in [*sorted({m.room for m in found}), "all"]:
        mine = [m for m in found if room in (m.room, "all")]
        ends = Counter(o.result for o in outcomes if room in (o.mutant.room, "all"))
        planted = sum(ends.values()) - ends["gone"]  # a line that is no longer run is not seen
        row = {"room": room, "candidates": len(mine), "unreached": len(set(mine) - reached)}
        row |= {"planted": planted, "caught": ends["caught"], "share": "-"}
        table.append(row | ({"share": f"{row['caught'] / planted:.0%}"} if planted else {}))
    return table


def run_all(bench: Bench, planned: dict[Mutant, list[list[str]]], jobs: int) -> list[Outcome]:
    """Plants all, and prints each as it ends; what is done so far where it is interrupted."""
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(bench.plant, m, runs) for m, runs in planned.items()]
        try:
            for future in as_completed(futures):
                outcomes.append(future.result())
                print(show(outcomes[-1]), flush=True)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            bench.stop()
            if not isinstance(error, KeyboardInterrupt):
                raise
            print(f"interrupted after {len(outcomes)} of {len(planned)}", file=sys.stderr)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=64, help="mutants to plant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--rooms", default="*", help="a pattern, such as 'o*'")
    parser.add_argument("--repo", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--coverage", type=Path, help="default: .coverage of the repo")
    parser.add_argument("--durations", type=Path, help="output of pytest --durations=0 -vv")
    parser.add_argument("--limit", type=float, default=240, help="seconds for each mutant")
    parser.add_argument("--only", type=Path, help="plant these mutants of an earlier --json")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    repo = args.repo.resolve()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidy up as after Ctrl-C

    found = [m for m in all_candidates(repo) if fnmatch.fnmatch(m.room, args.rooms)]
    coverage = Coverage(args.coverage or repo / ".coverage")
    reached = coverage.reached(found)
    chosen, gone = sample(found, reached, args.count, args.seed), []
    if args.only:
        chosen, gone = named(json.loads(args.only.read_text()), found)
    outcomes = [Outcome(m, "gone") for m in gone]
    outcomes += [Outcome(m, "not reached") for m in chosen if m not in reached]
    chosen = [m for m in chosen if m in reached]
    tests, durations = coverage.tests(chosen), read_durations(args.durations)
    rooms = {m: m.files_of_room(repo) for m in chosen}
    files = {t.partition("::")[0] for ts in tests.values() for t in ts}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        bench = Bench(repo, Path(folder).resolve(), args.jobs, args.limit)
        bench.prepare(files.union(*rooms.values()))
        known = lambda names: [name for name in names if name in bench.known]
        runs = {m: list(batches(known(tests[m]), known(rooms[m]), durations)) for m in chosen}
        outcomes += run_all(bench, runs, args.jobs)

    outcomes.sort(key=lambda o: (o.mutant.file, o.mutant.start))
    table = by_room(outcomes, found, reached)
    for row in [dict(zip(table[0], table[0], strict=True)), *table]:
        print("".join(f"{value:>12}" for value in row.values()))
    left = [o for o in outcomes if o.result != "caught"]
    print(f"\nNot caught: {len(left)}", *map(show, left), sep="\n")
    if bench.unsound():
        print("\nThese tests fail without a fault, and were left out:", *bench.unsound(), sep="\n")
    if args.json:
        given = {"seed": args.seed, "rooms": table, "mutants": [o.row() for o in outcomes]}
        args.json.write_text(json.dumps(given, indent=1) + "\n")
    sys.exit(130 if bench.stopped else 0)


if __name__ == "__main__":
    main()
