"""The tool that plants faults: what it changes, and which of them it takes."""

import ast
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from tests import faults, mutants

SOURCE = '''"""Not a - b, nor 1 < 2."""
from typing import TYPE_CHECKING

import lib  # µ: columns are counted in bytes

if TYPE_CHECKING:
    N = 1
__all__ = ["f", "g"][-1:]


class C:
    @lib.cache(8)
    def f(self, a: "int | None" = None, *, n: lib.Of[3] = 2) -> lib.Of[4]:
        """Not 5."""
        if a is None and not n:
            raise ValueError(f"{n + 1} is not {n - 1}")
        assert a, f"{-1}"
        text = "µµ", a <= n  # a < n
        return text if lib.jnp.clip(
            -a,
            n,
        ) else a - (n - a), lib.sum(a[..., 0] + a[0], axis=-1), lib.lax.sub(a, n), lib.max(a, n)
'''

EXPECTED = {
    ("constant", "2", "3"),
    ("logic", "and", "or"),
    ("comparison", "is", "is not"),
    ("not", "not ", ""),
    ("condition", "a is None and not n", "not (a is None and not n)"),
    ("comparison", "<=", "<"),
    ("condition", "CLIP", "not (CLIP)"),
    ("clip", "CLIP", "(-a\n\n\n)"),
    ("sign", "-", ""),
    ("arithmetic", "-", "+"),
    ("swap", "a - (n - a)", "((n - a)) - (a)"),
    ("swap", "n - a", "(a) - (n)"),
    ("axis", "0", "1"),
    ("arithmetic", "+", "-"),
    ("constant", "0", "1"),
    ("axis", "-1", "-2"),
    ("swap", "a, n", "n, a"),
}


def test_candidates_are_the_faults_of_what_is_computed():
    text = SOURCE.encode()
    clip = SOURCE[SOURCE.index("lib.jnp.clip") : SOURCE.index(" else a")]
    found = faults.candidates("jaxquant/room/file.py", text)
    seen = {(m.operator, text[m.start : m.end].decode(), m.new) for m in found}
    assert {tuple(part.replace(clip, "CLIP") for part in s) for s in seen} == EXPECTED
    assert {m.where for m in found} == {"C.f"}
    assert {m.room for m in found} == {"room"}


def test_a_mutant_changes_its_segment_only_and_parses():
    text = SOURCE.encode()
    for mutant in faults.candidates("jaxquant/file.py", text):
        planted = mutant.planted(text)
        assert planted != text
        assert planted.startswith(text[: mutant.start]) and planted.endswith(text[mutant.end :])
        assert planted.count(b"\n") == text.count(b"\n")
        assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(text))
        before, after = mutant.change(text)
        assert before != after and before in SOURCE and after in planted.decode()


@pytest.mark.parametrize(
    ("expression", "operator", "after"),
    [
        ("(a + 1) / (b)  # c / d", "swap", "((b)) / ((a + 1))  # c / d"),
        ("a not  in b", "comparison", "a in b"),
        ("lax.clamp(low, x, high) * 2", "clip", "(x) * 2"),
        ("jnp.minimum(1, x)", "clip", "(x)"),
        ("x.clip(0, 1)", "clip", "(x)"),
        ("min(a, b)", "clip", "(a)"),
        ("x.min(0)", "clip", None),
        ("min(a, b, key=f)", "clip", None),
        ("[a] * n", "arithmetic", None),
        ("isinstance(x, Array | None)", "arithmetic", None),
        ("zip(a, b, strict=True)", "constant", None),
        ("1 if a == b else 2", "condition", None),
    ],
)
def test_operators(expression, operator, after):
    text = expression.encode()
    found = [m for m in faults.candidates("jaxquant/a.py", text) if m.operator == operator]
    assert [m.planted(text).decode() for m in found] == ([] if after is None else [after])


def test_identities_are_unique_and_outlive_moved_lines():
    text = b"def f(a):\n    return a[0] + a[0]\n"
    before = faults.candidates("jaxquant/a.py", text)
    after = faults.candidates("jaxquant/a.py", b"import x\n\n\ny = 1\n\n\n" + text)
    assert len({m.identity for m in before}) == len(before)
    rows = [asdict(m) for m in before]
    again, gone = faults.named(rows, after)
    assert [m.identity for m in again] == [m.identity for m in before] and not gone
    again, gone = faults.named({"mutants": rows}, before[1:])
    assert again == before[1:] and [m.identity for m in gone] == [before[0].identity]


def some(room: str, n: int) -> list[faults.Mutant]:
    return [
        faults.Mutant(f"jaxquant/{room}.py", "", "sign", "-x", i, i, i, i, "") for i in range(n)
    ]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (3, {"big": 1, "mid": 1, "one": 1}),
        (5, {"big": 2, "mid": 2, "one": 1}),
        (25, {"big": 17, "mid": 7, "one": 1}),
        (999, {"big": 300, "mid": 100, "one": 1}),
    ],
)
def test_the_sample_covers_rooms_in_proportion(count, expected):
    found = [*some("big", 300), *some("one", 1), *some("mid", 100)]
    taken = faults.sample(found, set(found), count, seed=0)
    assert Counter(m.room for m in taken) == expected
    assert taken == faults.sample(found, set(found), count, seed=0)
    assert count > 400 or taken != faults.sample(found, set(found), count, seed=1)


def test_coverage_changes_only_what_is_not_reached():
    found = [*some("a", 50), *some("b", 50)]
    taken = faults.sample(found, set(found), 20, seed=0)
    lost = taken[3]
    again = faults.sample(found, set(found) - {lost}, 20, seed=0)
    assert set(taken) - set(again) == {lost} and len(again) == 20


def test_tests_come_by_duration_and_then_by_file():
    tests = ["tests/b.py::x", "tests/a.py::slow", "tests/a.py::quick"]
    durations = {"tests/a.py::slow": 9.0, "tests/a.py::quick": 0.1, "tests/b.py::x": 0.5}
    assert list(mutants.batches(tests, [], durations)) == [
        ["tests/a.py::quick", "tests/b.py::x", "tests/a.py::slow"],
        ["tests/a.py"],
        ["tests/b.py"],
    ]
    # what runs on import only
    assert list(mutants.batches([], ["tests/test_room.py"], {})) == [["tests/test_room.py"]]


def test_all_of_the_package_can_be_planted():
    repo = Path(__file__).parents[1]
    found = faults.all_candidates(repo)
    assert len({m.identity for m in found}) == len(found)
    for mutant in faults.sample(found, set(found), 60, seed=0):
        text = (repo / mutant.file).read_bytes()
        planted = mutant.planted(text)
        ast.parse(planted)
        assert planted.count(b"\n") == text.count(b"\n")
