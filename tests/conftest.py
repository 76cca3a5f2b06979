"""Settings shared by all tests, made before JAX starts a backend.

Tests run as users' programs do on one device (but for `tests/sharded/`). XLA optimises little, but
for what is `optimised`: see `compiled.py`.
"""

import contextlib
import ctypes
import gc
import os
import platform
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

# JAX reads these when it is imported, here and in processes that tests start.
# Tests run on the CPU unless another platform is asked for by name.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of a run: `JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest` has XLA optimise all.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Every program that was compiled is kept for the next run.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import hypothesis
import jax
import pytest

from tests.compiled import CHEAP_FLAGS, without_cheap_flags

# XLA reads this when JAX starts a backend.
if CHEAP_FLAGS and jax.config.read("jax_disable_most_optimizations"):
    os.environ["XLA_FLAGS"] = " ".join([*without_cheap_flags(), CHEAP_FLAGS])

# A folder of the tests alone, since what is oldest in it is deleted. JAX's own variables choose
# another, JAX_COMPILATION_CACHE_DIR, which is not bounded here, or none,
# JAX_ENABLE_COMPILATION_CACHE=0.
CACHES = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "jaxquant-tests"
MOST_KEPT = 1 << 30  # bytes


def _machine() -> str:
    """A name for this machine and its processor, for which programs are made."""
    flags = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.node()}-{zlib.crc32((platform.machine() + flags).encode()):08x}"


if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(CACHES / _machine()))

# A scale that broadcasts by accident is the classic quantization bug: ranks must be made to agree.
jax.config.update("jax_numpy_rank_promotion", "raise")

# A process that holds more forgets its programs after a module.
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
    found = []
    for file in CACHES.glob("*/*-cache"):
        with contextlib.suppress(OSError):  # another run may delete it
            found.append((file.stat(), file))
    kept = sum(stat.st_size for stat, _ in found)
    for stat, file in sorted(found, key=lambda entry: entry[0].st_mtime):
        if kept <= MOST_KEPT:
            break
        with contextlib.suppress(OSError):
            file.unlink()
        kept -= stat.st_size


@pytest.fixture(scope="session")
def key() -> jax.Array:
    """A PRNG key to split or fold from; every test may use it, as keys are never consumed."""
    return jax.random.key(0)


@pytest.fixture(scope="module")
def uncontracted() -> Iterator[None]:
    """For a module whose programs are compared bit for bit: XLA optimises little in any run.

    `compiled.uncontracted` says why. It takes the newer emitters, too, which no setting brings
    back in a process that has the older ones (JAX 0.10): there, these modules hold by those.
    """
    option = "jax_disable_most_optimizations"
    if jax.config.read(option):
        yield
        return
    jax.config.update(option, True)
    jax.clear_caches()  # JAX does not tell apart what either mode compiled
    yield
    jax.config.update(option, False)
    jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory() -> Iterator[None]:
    """Drops compiled programs after a module if the process holds much memory."""
    yield
    if _held() > MOST_HELD:
        jax.clear_caches()
        # What was freed is given back, or the next modules would be seen to hold it, too.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _held() -> int:
    """Bytes: what the process holds where Linux says it, else the most it has held."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
