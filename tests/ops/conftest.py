"""What tests of contractions share."""

from collections.abc import Iterator

import jax
import pytest

from jaxquant.ops import lowering


@pytest.fixture(scope="module")
def fused_sums() -> Iterator[None]:
    """The forms that JAX 0.12 makes fast; JAX 0.10 computes them, too."""
    with pytest.MonkeyPatch.context() as patch:
        jax.clear_caches()  # contractions are jitted by their operands: what is patched is not one
        patch.setattr(lowering, "FUSES_SUMS", True)
        yield
    jax.clear_caches()
