"""How much XLA optimises the programs of tests.

Most programs of tests run once, so compiling them is what takes time: `conftest.py` has XLA
optimise little. A test says `optimised` where what users' programs do is the point.
"""

import functools
import os

import jax

CHEAP_FLAGS = {(0, 10): "--xla_cpu_use_fusion_emitters=false"}.get(jax.__version_info__[:2], "")
"""Kernels by XLA's older emitters, which compile faster. Newer versions have none."""


def without_cheap_flags() -> list[str]:
    """The flags in `XLA_FLAGS` that a user gave: a worker inherits those of `conftest.py`, too."""
    return [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag != CHEAP_FLAGS]


EMITTERS = {"xla_cpu_use_fusion_emitters": True} if CHEAP_FLAGS else {}
LEVEL, LESS = "xla_backend_optimization_level", "xla_llvm_disable_expensive_passes"

optimised = functools.partial(jax.jit, compiler_options={LEVEL: 3, LESS: False, **EMITTERS})
"""`jax.jit`, compiled as users' programs are."""

uncontracted = functools.partial(jax.jit, compiler_options={LEVEL: 0, LESS: True, **EMITTERS})
"""`jax.jit` of what is compared bit for bit: each product and each sum is rounded.

Otherwise, a CPU contracts a product and a sum to one operation in some programs and not in others:
see "What is trained is what is served" in docs/architecture.md. The older emitters were seen to
round otherwise from one program to another as well, so the newer ones are taken.
"""
