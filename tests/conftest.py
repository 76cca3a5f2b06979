"""Settings shared by all tests, made before JAX starts a backend."""

import gc
import os
from collections.abc import Iterator

# Tests run on the CPU unless another platform is asked for by name.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

# Eight host devices, so that meshes can be tested anywhere. What names no device or sharding still
# runs on the first one alone.
jax.config.update("jax_num_cpu_devices", 8)

# A scale that broadcasts by accident is the classic quantization bug: ranks must be made to agree.
jax.config.update("jax_numpy_rank_promotion", "raise")

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `JAXQUANT_TESTS=1/2`, only the first of every two tests; `2/2` are the others."""
    part, _, parts = os.environ.get("JAXQUANT_TESTS", "1/1").partition("/")
    left = [item for n, item in enumerate(items) if n % int(parts) != int(part) - 1]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for n, item in enumerate(items) if n % int(parts) == int(part) - 1]


@pytest.fixture(scope="session")
def key() -> jax.Array:
    """A PRNG key to split or fold from; every test may use it, as keys are never consumed."""
    return jax.random.key(0)


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs() -> Iterator[None]:
    """Drops compiled programs after each module: over a whole session they add up to gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module")
def cheap_programs() -> Iterator[None]:
    """For programs that run once: compiling them is what takes time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
