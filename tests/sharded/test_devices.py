"""What all the tests in this folder rest on."""

import jax


def test_there_are_eight_devices() -> None:
    assert jax.device_count() == 8
