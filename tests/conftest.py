"""Settings shared by all tests, made before JAX starts a backend.

Tests run as users' programs do: on one device (but for `tests/sharded/`), fully optimised (but for
those marked `cheap`).
"""

import contextlib
import gc
import os
import platform
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

# Tests run on the CPU unless another platform is asked for by name.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

# A scale that broadcasts by accident is the classic quantization bug: ranks must be made to agree.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiled programs are kept for the next run, since compiling is most of a run. The folder has the
# machine's name, as programs are made for its processor. JAX's own variables choose another folder,
# JAX_COMPILATION_CACHE_DIR, which is not bounded here, or none, JAX_ENABLE_COMPILATION_CACHE=0.
CACHES = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "jaxquant"
MOST_KEPT = 1 << 30  # bytes
if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(CACHES / platform.node()))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

# A process that has held more forgets its programs after each module.
MOST_HELD = 3 << 30  # bytes

# What is traced is kept, so that collections find little to free: they would take a tenth of a run.
gc.set_threshold(100_000, 50, 50)

hypothesis.settings.register_profile(
    "local",
    deadline=None,  # the first example of a shape compiles
    max_examples=25,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.differing_executors,
    ],
)
hypothesis.settings.register_profile(
    "ci",
    parent=hypothesis.settings.get_profile("local"),
    derandomize=True,  # a red CI run can be repeated
    database=None,
    print_blob=True,
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Takes the oldest programs away while more than `MOST_KEPT` are kept."""
    if hasattr(session.config, "workerinput"):  # the process that started this one has done so
        return
    with contextlib.suppress(OSError):  # another run may do the same
        found = [(f.stat(), f) for f in CACHES.glob("*/*") if f.is_file()]
        kept = sum(stat.st_size for stat, _ in found)
        for stat, file in sorted(found, key=lambda entry: entry[0].st_mtime):
            if kept <= MOST_KEPT:
                break
            file.unlink()
            kept -= stat.st_size


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Doctests and tests marked `cheap` come first: a change of mode drops what is compiled."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker("cheap")
    items.sort(key=lambda item: item.get_closest_marker("cheap") is None)


class Compiling:
    """Compiles with few optimisations where a test is marked `cheap`, else as users do.

    Compiling is what takes time of programs that run once. And where XLA optimises, a CPU contracts
    a product and a sum to one operation that rounds once, in some programs and not in others: see
    "What is trained is what is served" in docs/architecture.md.
    """

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        cheap = item.get_closest_marker("cheap") is not None
        if cheap != jax.config.read("jax_disable_most_optimizations"):
            jax.config.update("jax_disable_most_optimizations", cheap)
            jax.clear_caches()  # JAX does not tell apart what either mode compiled


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin, which sees doctests in `jaxquant/`, too: hooks here see this folder alone."""
    config.pluginmanager.register(Compiling())


@pytest.fixture(scope="session")
def key() -> jax.Array:
    """A PRNG key to split or fold from; every test may use it, as keys are never consumed."""
    return jax.random.key(0)


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory() -> Iterator[None]:
    """Drops compiled programs after a module if the process has held much memory."""
    yield
    unit = 1 if sys.platform == "darwin" else 1024
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit > MOST_HELD:
        jax.clear_caches()
