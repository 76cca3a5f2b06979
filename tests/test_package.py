"""What holds for the package as a whole: names, metadata, imports, and how it is checked."""

import importlib.metadata
import inspect
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import jaxquant

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_all_lists_existing_names_once():
    assert len(jaxquant.__all__) == len(set(jaxquant.__all__))
    missing = [name for name in jaxquant.__all__ if not hasattr(jaxquant, name)]
    assert not missing


def test_public_names_are_explicit():
    # Whatever `jaxquant` shows is in `__all__`, a submodule, or private.
    shown = {
        name
        for name, value in vars(jaxquant).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert shown <= set(jaxquant.__all__)


@pytest.mark.parametrize("name", ["jaxquant", *jaxquant.__all__])
def test_public_objects_have_docstrings(name):
    value = jaxquant if name == "jaxquant" else getattr(jaxquant, name)
    if inspect.ismodule(value) or inspect.isclass(value) or inspect.isroutine(value):
        # Not `inspect.getdoc`, which would accept the docstring of a base class. A docstring made
        # by `@dataclass` or `NamedTuple` repeats the signature and explains nothing.
        doc = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
        assert doc, f"{name} has no docstring"
        assert doc.strip()
        assert not doc.startswith(f"{value.__name__}("), f"{name} has only a generated docstring"


def test_version_is_the_installed_one():
    assert jaxquant.__version__ == importlib.metadata.version("jaxquant") == PROJECT["version"]


def test_import_starts_no_backend():
    # No backend is called "none": whatever makes an array, or asks for devices, at import fails.
    code = f"""
import importlib, jax, jaxquant
for name in {[name for name in jaxquant.__all__ if not name.startswith("_")]}:
    getattr(jaxquant, name)
try:
    jax.devices()
except RuntimeError:
    print("none started")
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "none"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "none started"


def test_import_needs_no_extra():
    # With the packages of the extras hidden, the library itself still imports.
    code = """
import sys
for name in ("typer", "sklearn", "matplotlib", "safetensors", "tokenizers"):
    sys.modules[name] = None
import jaxquant
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_oldest_constraints_are_the_lower_bounds():
    lines = (ROOT / ".ci/constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pins = {line for line in lines if line and not line.startswith("#")}
    assert pins == {bound.replace(">=", "==") for bound in PROJECT["dependencies"]}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test", 'pip install -e ".[dev]" && pytest'),
        ("demo", 'pip install -e ".[demo]" && jaxquant demo'),
    ],
)
def test_ci_runs_the_commands_of_the_readme(name, expected):
    command = subprocess.run(
        ["bash", ".ci/run", f"--print-{name}-command"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    shell_blocks = re.findall(
        r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S
    )
    assert command in "".join(shell_blocks).splitlines()
    assert re.sub(r"\s+#.*", "", command) == expected
