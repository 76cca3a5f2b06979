"""Eight CPU devices for the tests in this folder; all others run with one."""

from collections.abc import Iterator

import jax
import pytest
from jax.extend.backend import clear_backends


def _restart(devices: int) -> None:
    """Arrays that were made before stay usable, unless they are committed to a device."""
    jax.clear_caches()
    clear_backends()
    jax.config.update("jax_num_cpu_devices", devices)


@pytest.fixture(scope="package", autouse=True)
def _eight_devices() -> Iterator[None]:
    before = jax.config.jax_num_cpu_devices
    _restart(8)
    yield
    _restart(before)
