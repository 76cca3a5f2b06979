"""The command line, with and without the packages of the demo extra."""

import subprocess
import sys

import pytest

import jaxquant

pytest.importorskip("typer")
from typer.testing import CliRunner

from jaxquant import cli


def invoke(*words: str):
    return CliRunner().invoke(cli.app(), words, env={"COLUMNS": "100", "TERM": "dumb"})


def python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *([code] if code == "-m" else ["-c", code]), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_version():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"jaxquant {jaxquant.__version__}\n")


def test_no_command_shows_the_help():
    result = invoke()
    for command in ("demo", "formats", "--version"):
        assert command in result.output


def test_formats():
    result = invoke("formats")
    assert result.exit_code == 0
    assert result.stdout == jaxquant.formats.table() + "\n"


def test_module_runs():
    result = python("-m", "jaxquant", "formats")
    assert result.returncode == 0, result.stderr
    assert result.stdout == jaxquant.formats.table() + "\n"


WITHOUT = "import sys; sys.modules[{!r}] = None; from jaxquant.cli import main; main()"


def test_without_typer_formats_still_print():
    result = python(WITHOUT.format("typer"), "formats")
    assert result.returncode == 0, result.stderr
    assert result.stdout == jaxquant.formats.table() + "\n"


def test_without_typer_the_version_still_prints():
    result = python(WITHOUT.format("typer"), "--version")
    assert (result.returncode, result.stdout) == (0, f"jaxquant {jaxquant.__version__}\n")


@pytest.mark.parametrize("missing", ["typer", "sklearn"])
def test_missing_packages_name_the_extra(missing):
    result = python(WITHOUT.format(missing), "demo", "--quick")
    assert result.returncode != 0
    assert 'pip install "jaxquant[demo]"' in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_preset_is_a_readable_error():
    result = invoke("demo", "--presets", "w8a8,w9a9")
    assert result.exit_code == 2
    words = " ".join(result.output.replace("│", " ").split())
    assert "expected presets among w8a8, w8a16, w4a16" in words
    assert "got 'w9a9'" in words


@pytest.mark.slow
def test_demo_prints_one_table():
    pytest.importorskip("sklearn")
    from jaxquant import demo

    result = invoke("demo", "--quick", "--presets", "w8a8")
    assert result.exit_code == 0, result.output
    starts = [line.split()[0] for line in result.stdout.splitlines() if line.split()]
    assert [s for s in starts if s == "float32" or s in demo.PRESETS] == ["float32", "w8a8"]
    assert f"jaxquant {jaxquant.__version__}, jax " in result.stdout
    assert "jaxquant.ptq(" in result.stdout
