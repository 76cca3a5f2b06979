"""Every python block of README.md and docs/*.md runs, in order, in one namespace per file.

Text that is not meant to run is fenced as `text`, not as `python`.
"""

import pathlib
import re
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]

FENCE = re.compile(r"^```python[^\n]*\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)


def python_blocks(text: str) -> list[tuple[int, str]]:
    """The python blocks of a Markdown text as `(line number of the first line of code, code)`."""
    return [(text.count("\n", 0, m.start(1)) + 1, m.group(1)) for m in FENCE.finditer(text)]


def run_blocks(path: pathlib.Path, namespace: dict[str, object]) -> None:
    for line, code in python_blocks(path.read_text(encoding="utf-8")):
        try:
            # Blank lines in front make line numbers in tracebacks those of the Markdown file.
            exec(compile("\n" * (line - 1) + code, str(path), "exec"), namespace)
        except BaseException as error:
            error.add_note(f"in the python block at {path.name}:{line}")
            raise


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_blocks_run(path, monkeypatch, tmp_path):
    module = types.ModuleType(f"blocks_of_{path.stem}")
    # Dataclasses, and so Flax modules, look up the module they are defined in.
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    run_blocks(path, module.__dict__)


def test_a_failing_block_names_its_line(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("# Title\n\n```python\nx = 1\n```\n\n```python\nx += 1\nassert x == 1\n```\n")
    with pytest.raises(AssertionError) as caught:
        run_blocks(path, {})
    assert caught.value.__notes__ == ["in the python block at page.md:8"]
    assert caught.traceback[-1].lineno + 1 == 9
