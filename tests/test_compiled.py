"""That tests of optimised code are of the code that users run."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.arrays import normal
from tests.compiled import optimised, without_cheap_flags

ROOT = Path(__file__).parents[1]


def fn(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    """Products and sums that a CPU with FMA contracts where XLA optimises: results tell it."""
    return jnp.cumsum(jnp.tanh(x @ w * 0.3 + b), axis=0) * b + x[:, :1]


def result(jit: Callable[..., Any]) -> np.ndarray:
    return np.asarray(jit(fn)(normal(0, 48, 64), normal(1, 64, 40), normal(2, 1, 40)))


def as_users() -> np.ndarray:
    """The result in a process that has none of the settings of `conftest.py`."""
    env = {k: v for k, v in os.environ.items() if k != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    env["XLA_FLAGS"] = " ".join(without_cheap_flags())  # XLA takes blanks alone for a file's name
    script = (
        "import sys, jax; from tests.test_compiled import result;"
        "sys.stdout.buffer.write(result(jax.jit).tobytes())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=ROOT, capture_output=True, check=True
    )
    return np.frombuffer(run.stdout, np.float32).reshape(48, 40)


def test_optimised_is_what_users_compile() -> None:
    np.testing.assert_array_equal(result(optimised), as_users())
