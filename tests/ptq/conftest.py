"""Settings of tests that make many small programs."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="module")
def cheap_programs() -> Iterator[None]:
    """For programs that run once: compiling them is what takes time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
